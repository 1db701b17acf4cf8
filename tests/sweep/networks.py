"""`network(seed)`: a random network and its input; the same seed gives the same one."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from . import blocks as b


@dataclass(frozen=True)
class Network:
    """A model and what it takes.

    Attributes:
        model: In eval mode.
        x: Its input.
        parts: Names of its parts.
    """

    model: nn.Module
    x: Tensor
    parts: tuple[str, ...]


class Halved(nn.Module):
    """A parametrization of a user's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Architect:
    """Draws parts.

    Args:
        seed: What it draws from.
        dims: Number of spatial dims.
    """

    def __init__(self, seed: int, dims: int) -> None:
        self.random, self.dims = random.Random(seed), dims
        self.shared = self.activation()

    def pick(self, *values: Any) -> Any:
        return self.random.choice(values)

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def conv(self, c: int, out: int | None = None, *, keeps: bool = True) -> Any:
        """A convolution; by default one that keeps the size."""
        groups = self.pick(*(g for g in (1, 1, 1, 2, 3) if c % g == 0))
        out = groups * self.number(1, 12 // groups) if out is None else out
        groups = groups if out % groups == 0 else 1
        settings: dict[str, Any] = {"padding": "same", "dilation": self.number(1, 2), "groups": groups}
        kernel = tuple(self.number(1, 3) for _ in range(self.dims))
        if not keeps and self.random.random() < 0.6:
            settings |= {"stride": tuple(self.number(1, 2) for _ in range(self.dims)), "padding": self.number(0, 1)}
        mode = self.pick("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
        kind = b.CONVS[self.dims]
        if self.random.random() < 0.12:
            kind = b.KINDS[self.pick(b.Standardised, b.Centred), self.dims]
        conv = kind(c, out, kernel, bias=self.pick(True, False), padding_mode=mode, **settings)
        return self.parametrized(conv) if self.random.random() < 0.12 else conv

    def parametrized(self, conv: nn.Module) -> nn.Module:
        how = self.pick("weight", "spectral", "own", "old weight", "old spectral")
        if how == "weight":
            return parametrizations.weight_norm(conv)
        if how == "spectral":
            return parametrizations.spectral_norm(conv)
        if how == "own":
            parametrize.register_parametrization(conv, "weight", Halved())
            return conv
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            old = nn.utils.weight_norm if how == "old weight" else nn.utils.spectral_norm
            return old(conv)

    def activation(self) -> nn.Module:
        return self.pick(*b.ACTIVATIONS)()

    def norm(self, c: int) -> nn.Module:
        groups = self.pick(*(g for g in (1, 2, 3) if c % g == 0))
        return self.pick(
            b.NORMS[self.dims](c, affine=self.pick(True, False)),
            b.NORMS[self.dims](c),
            b.FrozenNorm(c),
            nn.GroupNorm(groups, c),
            b.INSTANCE[self.dims](c, affine=True),
        )

    def block(self, c: int, out: int | None = None) -> nn.Module:
        """Convolution, norm and activation, or some of them; keeps the size."""
        conv = self.conv(c, out)
        parts = [conv]
        if self.random.random() < 0.6:
            parts.append(self.norm(conv.out_channels))
        if self.random.random() < 0.8:
            parts.append(self.shared if self.random.random() < 0.3 else self.activation())
        return nn.Sequential(*parts)

    def step(self, c: int) -> nn.Module:
        """Any part."""

        def same() -> nn.Module:
            return self.block(c, c)

        made: dict[str, Callable[[], nn.Module]] = {
            "block": lambda: self.block(c),
            "conv": lambda: self.conv(c, keeps=False),
            "pointwise": lambda: b.CONVS[self.dims](c, self.number(1, 12), 1, self.pick(1, 1, 2)),
            "depthwise": lambda: b.CONVS[self.dims](c, c * self.number(1, 2), 3, padding=1, groups=c),
            "up": lambda: b.UPS[self.dims](c, self.number(1, 8), self.number(1, 3), self.number(1, 2)),
            "functional": lambda: b.FunctionalConv(b.CONVS[self.dims](c, self.number(1, 8), 3)),
            "twice": lambda: b.Twice(self.conv(c, c)),
            "loop": lambda: b.Loop(self.conv(c, c)),
            "width loop": lambda: b.WidthLoop(self.conv(c, c), self.activation()),
            "aliased": lambda: b.Aliased(self.conv(c)),
            "shared weight": lambda: b.SharedWeight(*(b.CONVS[self.dims](c, c, 3, padding=1) for _ in range(2))),
            "residual": lambda: b.Residual(same()),
            "residual in place": lambda: b.ResidualInPlace(same()),
            "gated": lambda: b.Gated(b.CONVS[self.dims](c, c, 1)),
            "joined": lambda: b.Joined(*(self.block(c) for _ in range(self.number(2, 3))), nn.Identity()),
            "split": lambda: b.Split(self.block(c - (c + 1) // 2)) if c > 1 else nn.Identity(),
            "view written": lambda: b.ViewWritten(self.block(c)),
            "view read": lambda: b.ViewRead(same(), self.conv(c, c)),
            "written input": lambda: b.WrittenInput(self.block(c, c), self.block(c, c)),
            "by value": lambda: b.ByValue(same(), same()),
            "by mask": lambda: b.ByValueMask(same(), same()),
            "by size": lambda: b.BySize(same(), same()),
            "by batch": lambda: b.ByBatch(same(), same()),
            "dead": lambda: b.Dead(self.block(c), self.block(c)),
            "unused": lambda: b.Unused(self.block(c), self.block(c)),
            "lost": lambda: b.Lost(self.block(c, c), self.conv(c, c)),
            "attention": lambda: b.Attention(c, self.pick(*(h for h in (1, 2) if c % h == 0)), self.pick(True, False)),
            "recurrent": lambda: b.Recurrent(c),
            "counted": lambda: b.Counted(self.block(c)),
            "norm": lambda: self.norm(c),
            "activation": self.activation,
            "pool": lambda: self.pick(b.MAX, b.AVG)[self.dims](2),
            "resized": lambda: b.Resized(self.pick(0.5, 1.5, 2.0)),
            "matmul": lambda: b.Matmul(c),
        }
        weights = [6 if name in ("block", "conv") else 1 for name in made]
        name = self.random.choices(list(made), weights)[0]
        step = made[name]()
        step.drawn = name
        return step

    def hook(self, model: nn.Module) -> str:
        """A hook on some part: one that looks, or one that changes what goes in or comes out."""
        module = self.pick(*model.modules())
        kind = self.pick("sees", "changes output", "changes input")
        if kind == "sees":
            module.register_forward_hook(_see)
        elif kind == "changes output":
            module.register_forward_hook(_scale)
        else:
            module.register_forward_pre_hook(_shift)
        return f"hook that {kind} on a {type(module).__name__}"


def _see(module: nn.Module, args: Any, out: Any) -> None:
    """Looks."""


def _scale(module: nn.Module, args: Any, out: Any) -> Any:
    return out * 0.5 if isinstance(out, Tensor) else None


def _shift(module: nn.Module, args: Any) -> Any:
    return tuple(a + 0.1 if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def network(seed: int) -> Network:
    """A network of 1 to 7 parts; one that a part does not fit into leaves the part out."""
    draws = random.Random(seed)
    dims, dtype = draws.choice((1, 2, 2, 2, 3)), draws.choice((torch.float32, torch.float64))
    architect = Architect(seed, dims)
    parts = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        sizes = [draws.randint(6, 10) if dims < 3 else draws.randint(5, 6) for _ in range(dims)]
        x = torch.randn(draws.randint(1, 3), draws.choice((1, 2, 3, 4, 6, 8)), *sizes, dtype=dtype)
        model, reached = b.Steps(), x
        for _ in range(draws.randint(1, 7)):
            try:
                step = architect.step(reached.shape[1]).to(dtype).eval()
                _settle(step)
                out = step(reached.clone())
            except (RuntimeError, ValueError, AssertionError, ZeroDivisionError, IndexError):
                continue  # too few channels or positions for it
            if out.dim() != dims + 2 or out.shape[1] > 32 or not all(3 <= n <= 24 for n in out.shape[2:]):
                continue
            if not bool(out.isfinite().all()):
                continue
            model.steps.append(step)
            parts.append(str(step.drawn))
            reached = out
        kind = draws.choice(("features", "scores", "scores", "nested", "probabilities"))
        head = b.Head(reached.shape[1], kind).to(dtype)
        _settle(head)
        model.steps.append(head)
        parts.append(kind)
        if draws.random() < 0.2:
            parts.append(architect.hook(model))
        if draws.random() < 0.2:
            parts.append("frozen in part")
            for parameter in model.parameters():
                parameter.requires_grad_(draws.random() < 0.5)
    return Network(model.eval(), x, tuple(parts))


def _settle(module: nn.Module) -> None:
    """Weights and statistics of ordinary sizes."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point() and not name.endswith(("_u", "_v", "original0", "weight_g")):
            tensor.normal_(std=1 / max(1, tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.3)
