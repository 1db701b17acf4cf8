"""Random networks full of what `fuse` looks for, and of what looks like it and must stay: `fusibles`.

The steps of `random_networks`, and with them: norms and activations behind and before convolutions, as modules and in
code; residual blocks that call one ReLU several times; blocks that are called twice; outputs that are read again or
written into; neighbours of which one is 1×1; code that does nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from random_networks import CONVS, LARGEST, NORMS, SMALLEST, Network, Steps, _Architect, _settle
from torch import Tensor, nn


class Gamma(nn.Module):
    """An activation and more, as a module without children or weights (timm's GammaAct)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).mul_(1.7)


class Swish(nn.Module):
    """An activation of two operations."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


MODULES: tuple[Any, ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.LeakyReLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.ELU,
    nn.Mish,
    Gamma,
    Swish,
)
CALLS: tuple[Any, ...] = (
    F.relu,
    torch.relu_,
    lambda x: F.silu(x, inplace=True),
    lambda x: x.clamp(-0.5, 0.5),
    lambda x: x.sigmoid(),
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.leaky_relu(x, 0.3),
    lambda x: x * x.sigmoid(),
)


class Called(nn.Module):
    """A layer and an activation that the code calls as a function."""

    def __init__(self, body: nn.Module, number: int) -> None:
        super().__init__()
        self.body, self.number = body, number

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = CALLS[self.number](self.body(x))
        return out


class CodeNorm(nn.Module):
    """A norm whose weights and statistics the module holds, before or behind a convolution."""

    def __init__(self, conv: nn.Module, channels: int, first: bool, affine: bool, twice: bool) -> None:
        super().__init__()
        self.conv, self.first, self.twice = conv, first, twice
        self.scale = nn.Parameter(torch.ones(channels)) if affine else None
        self.shift = nn.Parameter(torch.ones(channels)) if affine else None
        self.register_buffer("running_mean", torch.ones(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def norm(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.scale, self.shift, False, 0.1, 1e-3)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.norm(x)) if self.first else self.norm(self.conv(x))
        return F.relu(self.norm(out)) if self.twice else out


class Block(nn.Module):
    """torchvision's block, and what could be different in one."""

    def __init__(self, first: nn.Module, second: nn.Module, down: nn.Module | None, act: nn.Module, way: int) -> None:
        super().__init__()
        self.first, self.second, self.down, self.act, self.way = first, second, down, act, way

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        short = x if self.down is None else self.down(x)
        out = self.second(self.act(self.first(x)))
        if self.way == 0:
            out += short
        elif self.way == 1:
            out = torch.add(short, out)
        elif self.way == 2:
            out = short + out * 0.5
        elif self.way == 3:
            short = short.mul_(2)
            out = out + short
        elif self.way == 4:
            short += out
            out = short
        elif self.way == 5:
            return self.act(out + short) * out  # type: ignore[no-any-return]
        else:
            out = out.contiguous().contiguous() + short
        return self.act(out)  # type: ignore[no-any-return]


class Given(nn.Module):
    """A block whose shortcut may be left out, or that assigns items of a list that it is given."""

    def __init__(self, first: nn.Module, second: nn.Module, act: nn.Module, way: int) -> None:
        super().__init__()
        self.first, self.second, self.act, self.way = first, second, act, way

    def forward(self, x: Any, short: Tensor | None = None) -> Tensor:
        if self.way > 4:
            x[0] = self.act(self.first(x[0]))
            out = self.second(x[0])
            if self.way == 6:
                x[1][:, :1] = 0.5
            elif self.way == 7:
                x[0] = out
                out += 1.0
            return self.act(out + x[1]) + x[0].mean()  # type: ignore[no-any-return]
        if short is None:
            short = x if self.way < 4 else x.sin()
        out = self.second(self.act(self.first(x)))
        if self.way == 3:
            short += out
            return self.act(short)  # type: ignore[no-any-return]
        out += short
        return self.act(out)  # type: ignore[no-any-return]


class Giving(nn.Module):
    """Calls such a block, in one way or in two."""

    def __init__(self, block: Given, down: nn.Module, way: int) -> None:
        super().__init__()
        self.block, self.down, self.way = block, down, way

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        if self.block.way > 4:
            maps = [x.sin(), x.cos()]
            out: Tensor = self.block(maps)
            return out + maps[1] + maps[0].mean()
        short = self.down(x)
        if self.way == 0:
            out = self.block(x) + x
        elif self.way == 1:
            out = self.block(x, short) + short
        else:
            out = self.block(x, short) + self.block(x) + short
        return out + x.cos()  # what a ReLU leaves may be as small as rounding


class Reread(nn.Module):
    """What a layer makes is read in several places."""

    def __init__(self, conv: nn.Module, norm: nn.Module, act: nn.Module, way: int) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.way = conv, norm, act, way

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.way == 0:
            return self.act(self.norm(y)) * y  # type: ignore[no-any-return]
        if self.way == 1:
            z = self.norm(y)
            return self.act(z) + z  # type: ignore[no-any-return]
        if self.way == 2:
            return self.act(y) + y.detach().relu()  # type: ignore[no-any-return]
        if self.way == 3:
            return self.norm(self.conv.weight.mean() * y)  # type: ignore[no-any-return, operator]
        view = y.flatten(1)
        z = self.act(self.norm(y))
        return z + view.view(y.shape)  # type: ignore[no-any-return]


class Again(nn.Module):
    """One block, called twice, or its parts in another order."""

    def __init__(self, block: nn.Sequential, way: int) -> None:
        super().__init__()
        self.block, self.way = block, way
        self.other = block[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            return self.block(self.block(x))  # type: ignore[no-any-return]
        if self.way == 1:
            return self.block(x) + self.other(x)  # type: ignore[no-any-return]
        return self.block[1](self.block(x))  # type: ignore[no-any-return]


class Noise(nn.Module):
    """Code that does nothing, twice, or for nobody."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv, self.drop = conv, nn.Dropout(0.3)
        self.unread = CONVS[1](channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous().contiguous()
        shape = x.shape
        x = x.reshape(shape[0], -1).reshape(shape)
        self.unread(x.flatten(2))
        torch.tanh(x)
        y = self.conv(F.dropout(self.drop(x), 0.2, self.training))
        return F.relu(y) + F.relu(y) + torch.sigmoid(y) * torch.sigmoid(y)


class _Fusing(_Architect):
    def step(self, x: Tensor) -> nn.Module:
        kinds: list[Any] = [self._block, self._block, self._called, self._code_norm, self._residual_block]
        kinds += [self._given, self._residual_block, self._reread, self._again, self._before, self._pair]
        kinds += [self._noise, self._scaled]
        if self.number(0, 3) == 0:
            return super().step(x)
        return self.pick(*kinds)(x.shape[1])  # type: ignore[no-any-return]

    def norm(self, channels: int) -> nn.Module:
        return NORMS[self.dims](channels, affine=self.flag())

    def act(self) -> nn.Module:
        kind = self.pick(*MODULES)
        inplace = kind in (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Mish)
        return kind(inplace=self.flag()) if inplace else kind()  # type: ignore[no-any-return]

    def conv_norm(self, c: int, **settings: Any) -> nn.Sequential:
        conv = self.conv(c, **settings)
        return nn.Sequential(conv, self.norm(conv.out_channels))  # type: ignore[arg-type]

    def _block(self, c: int) -> nn.Module:
        layers = [*self.conv_norm(c), self.pick(nn.Identity(), nn.Dropout()), self.act()]
        return nn.Sequential(*layers[: self.number(2, 4)])

    def _called(self, c: int) -> nn.Module:
        return Called(self.conv_norm(c) if self.flag() else self.conv(c), self.number(0, len(CALLS) - 1))

    def _code_norm(self, c: int) -> nn.Module:
        first = self.flag()
        conv = self.conv(c) if self.flag() else CONVS[self.dims](c, self.number(1, 8), 1)
        twice = self.number(0, 3) == 0 and conv.out_channels == c
        return CodeNorm(conv, c if first else conv.out_channels, first, self.flag(), twice)  # type: ignore[arg-type]

    def _residual_block(self, c: int) -> nn.Module:
        down = self.conv_norm(c, keeps=True, out=c) if self.flag() else None
        first = self.conv_norm(c, keeps=True)
        second = self.conv_norm(first[0].out_channels, keeps=True, out=c)  # type: ignore[arg-type]
        act = nn.ReLU(inplace=self.flag()) if self.flag() else self.act()
        return Block(first, second, down, act, self.number(0, 6))

    def _given(self, c: int) -> nn.Module:
        first = self.conv_norm(c, keeps=True)
        second = self.conv_norm(first[0].out_channels, keeps=True, out=c)  # type: ignore[arg-type]
        act = nn.ReLU(inplace=self.flag()) if self.flag() else self.act()
        block = Given(first, second, act, self.number(0, 7))
        return Giving(block, self.conv_norm(c, keeps=True, out=c), self.number(0, 2))

    def _reread(self, c: int) -> nn.Module:
        act = self.pick(*MODULES)()
        conv, norm = self.conv_norm(c)
        return Reread(conv, norm, act, self.number(0, 4))

    def _again(self, c: int) -> nn.Module:
        return Again(nn.Sequential(*self.conv_norm(c, keeps=True, out=c), self.act()), self.number(0, 2))

    def _before(self, c: int) -> nn.Module:
        conv = self.conv(c) if self.flag() else CONVS[self.dims](c, self.number(1, 8), 1, bias=self.flag())
        return nn.Sequential(nn.ReLU(), self.norm(c), conv, self.norm(conv.out_channels))  # type: ignore[arg-type]

    def _pair(self, c: int) -> nn.Module:
        wide = c * self.number(1, 8)
        first = CONVS[self.dims](c, wide, 1, stride=self.pick(1, 1, 2), bias=self.flag())
        second = self.conv(wide) if self.flag() else CONVS[self.dims](wide, self.number(1, 8), 1)
        return nn.Sequential(*((first, second) if self.flag() else (first, nn.Identity(), second, self.act())))

    def _noise(self, c: int) -> nn.Module:
        return Noise(self.conv(c), c)

    def _scaled(self, c: int) -> nn.Module:
        """Squeeze and excitation."""
        pool = nn.AdaptiveAvgPool1d(1) if self.dims == 1 else nn.AdaptiveAvgPool2d(1)
        conv, gate = CONVS[self.dims], self.pick(nn.Sigmoid, nn.Hardsigmoid)()
        return Scaled(nn.Sequential(pool, conv(c, 2, 1), nn.ReLU(), conv(2, c, 1), gate))


class Scaled(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)  # type: ignore[no-any-return]


@st.composite
def fusibles(draw: st.DrawFn, max_steps: int = 4) -> Network:
    """Draws a model in evaluation mode and its input, in float64."""
    architect = _Fusing(draw, draw(st.sampled_from((1, 2, 2))))
    seed = draw(st.integers(0, 2**16))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        x = torch.randn((2, architect.number(1, 6), *architect.each(8, 10)), dtype=torch.float64)
        model, reached = Steps().double(), x
        for _ in range(architect.number(1, max_steps)):
            step = architect.step(reached).double().eval()
            _settle(step)
            try:
                out = step(reached.clone())
            except (RuntimeError, ValueError, AssertionError):
                continue  # too small for the step's padding or window
            if out.shape[1] > 48 or not all(SMALLEST <= n <= LARGEST for n in out.shape[2:]):
                continue
            model.steps.append(step)
            reached = out
    return Network(model.eval(), x)
