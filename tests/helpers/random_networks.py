"""Random small networks for property tests: what real models do to a rewriting tool, drawn by hypothesis.

`networks()` draws a model in eval mode and its input, in float64. A network is a list of steps; each is drawn together
with the tensor that reaches it, so every network runs. Steps are convolutions of all settings, depthwise, grouped,
transposed, functional and shared ones, modules under two names, branches that are concatenated or added, norms,
activations in place or not, pools, padding and resizing. `fingerprint` is all that must not change in a model that was
only looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

CONVS = {1: nn.Conv1d, 2: nn.Conv2d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d}
FUNCTIONS = {1: F.conv1d, 2: F.conv2d}
SMALLEST, LARGEST = 3, 20


@dataclass(frozen=True)
class Network:
    """A model and what it takes."""

    model: nn.Module
    x: Tensor

    def run(self, model: nn.Module | None = None) -> Any:
        """What the model, or a rewritten one, makes of a copy of the input."""
        with torch.no_grad():
            return (model or self.model)(self.x.clone())

    def __repr__(self) -> str:
        return f"{self.model}\non {tuple(self.x.shape)}"


class Steps(nn.Module):
    """Runs steps in order; the last output is what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Functional(nn.Module):
    """A convolution that is a function call in this module's code."""

    def __init__(self, shape: tuple[int, ...], bias: bool, settings: dict[str, Any]) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(shape))
        self.offset = nn.Parameter(torch.empty(shape[0])) if bias else None
        self.unused = nn.Parameter(torch.zeros(2))
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.dims, self.settings = len(shape) - 2, settings

    def forward(self, x: Tensor) -> Tensor:
        y = FUNCTIONS[self.dims](x, self.kernel, bias=self.offset, **self.settings)
        return F.relu(y) * self.scale


class Branching(Functional):
    """The same in code that no graph can hold, because it asks for a shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[0] > 1 else x * 2)


class Twice(nn.Module):
    """One convolution, called twice."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.conv(x)))


class Aliased(nn.Module):
    """One convolution under two names, each called once."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.first = conv
        self.others = nn.ModuleDict({"second": conv})

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) - 0.5 * self.others["second"](x.flip(-1))


class Joined(nn.Module):
    """Branches side by side, concatenated along the channels."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Residual(nn.Module):
    """A branch that is added to its input, in place where asked."""

    def __init__(self, body: nn.Module, inplace: bool) -> None:
        super().__init__()
        self.body, self.inplace = body, inplace

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.inplace:
            out += x
            return F.relu_(out)
        return out + x


class Resized(nn.Module):
    """Resizing and padding, as functions."""

    def __init__(self, scale: float, pad: int) -> None:
        super().__init__()
        self.scale, self.pad = scale, pad

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.scale)
        return F.pad(x, [self.pad, 0] * (x.dim() - 2))


class Classified(nn.Module):
    """Average over positions and a linear map; returns it beside what went in where asked."""

    def __init__(self, channels: int, both: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 5)
        self.both = both

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x.flatten(2).mean(-1))
        return {"features": x, "logits": y} if self.both else y


Draw = Callable[[st.SearchStrategy[Any]], Any]


class _Architect:
    def __init__(self, draw: Draw, dims: int) -> None:
        self.draw, self.dims = draw, dims

    def number(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def each(self, low: int, high: int) -> tuple[int, ...]:
        return tuple(self.number(low, high) for _ in range(self.dims))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def pick(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def groups(self, channels: int) -> int:
        return int(self.pick(*(g for g in (1, 1, 2, 3) if channels % g == 0)))

    def conv(self, channels: int, *, keeps: bool = False, out: int | None = None) -> nn.Module:
        """A convolution of any settings; with ``keeps`` one that keeps the size."""
        groups = self.groups(channels)
        out = out if out is not None else groups * self.number(1, 12 // groups)
        groups = groups if out % groups == 0 else 1
        kernel, dilation = self.each(1, 3), self.each(1, 2)
        stride, padding = (1,) * self.dims, "same"
        mode = self.pick("zeros", "zeros", "reflect", "replicate", "circular")
        if not keeps:
            padding = self.pick("same", "valid", "tuple")
            if padding == "tuple":
                stride, padding = self.each(1, 2), self.each(0, 2)
            elif padding == "valid":
                stride = self.each(1, 2)
        return CONVS[self.dims](
            channels,
            out,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            self.flag(),
            mode,
        )

    def step(self, x: Tensor) -> nn.Module:
        kinds = (self._conv, self._conv, self._conv, self._pointwise, self._depthwise, self._transposed)
        kinds += (self._functional, self._twice, self._aliased, self._norm, self._act, self._pool, self._resized)
        kinds += (self._joined, self._joined, self._residual)
        return self.pick(*kinds)(x.shape[1])  # type: ignore[no-any-return]

    def _conv(self, c: int) -> nn.Module:
        return self.conv(c)

    def _pointwise(self, c: int) -> nn.Module:
        return CONVS[self.dims](c, self.number(1, 12), 1, stride=self.pick(1, 1, 2), bias=self.flag())

    def _depthwise(self, c: int) -> nn.Module:
        return CONVS[self.dims](c, c * self.number(1, 2), 3, padding=1, groups=c)

    def _transposed(self, c: int) -> nn.Module:
        groups, stride = self.groups(c), self.each(1, 2)
        out = groups * self.number(1, 8 // groups)
        extra = tuple(self.number(0, s - 1) for s in stride)
        return TRANSPOSED[self.dims](c, out, self.each(1, 3), stride, 0, extra, groups, self.flag(), self.number(1, 2))

    def _functional(self, c: int) -> nn.Module:
        groups = self.groups(c)
        out = groups * self.number(1, 8 // groups)
        settings = {"padding": self.pick(0, 1, "same"), "groups": groups}
        kind = self.pick(Functional, Functional, Functional, Branching)
        return kind((out, c // groups, *self.each(1, 3)), self.flag(), settings)  # type: ignore[no-any-return]

    def _twice(self, c: int) -> nn.Module:
        return Twice(self.conv(c, keeps=True, out=c))

    def _aliased(self, c: int) -> nn.Module:
        return Aliased(self.conv(c))

    def _norm(self, c: int) -> nn.Module:
        return NORMS[self.dims](c, affine=self.flag())

    def _act(self, c: int) -> nn.Module:
        kind: nn.Module = self.pick(nn.ReLU(), nn.SiLU(inplace=True), nn.PReLU(), nn.Dropout(), nn.Identity())
        return kind

    def _pool(self, c: int) -> nn.Module:
        return self.pick(MAX_POOLS, AVG_POOLS)[self.dims](2)  # type: ignore[no-any-return]

    def _resized(self, c: int) -> nn.Module:
        return Resized(self.pick(0.5, 1.5, 2.0), self.number(0, 1))

    def _joined(self, c: int) -> nn.Module:
        branches: list[nn.Module] = []
        for _ in range(self.number(2, 3)):
            kind = self.pick("conv", "pool", "deep", "identity")
            if kind == "conv":
                branches.append(self.conv(c, keeps=True))
            elif kind == "pool":
                branches.append(self.pick(MAX_POOLS, AVG_POOLS)[self.dims](3, 1, 1))
            elif kind == "deep":
                first = self.conv(c, keeps=True)
                branches.append(nn.Sequential(first, nn.ReLU(), self.conv(first.out_channels, keeps=True)))  # type: ignore[arg-type]
            else:
                branches.append(nn.Identity())
        return Joined(branches)

    def _residual(self, c: int) -> nn.Module:
        return Residual(self.conv(c, keeps=True, out=c), self.flag())


@st.composite
def networks(draw: st.DrawFn, max_steps: int = 5, dims: tuple[int, ...] = (1, 2), plain: bool = False) -> Network:
    """Draws a model and its input.

    Args:
        draw: From hypothesis.
        max_steps: Most steps.
        dims: Numbers of spatial dims to choose from.
        plain: Whether the output is always one tensor.
    """
    architect = _Architect(draw, draw(st.sampled_from(dims)))
    seed = draw(st.integers(0, 2**16))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        shape = (2, architect.number(1, 6), *architect.each(8, 10))
        x = torch.randn(shape, dtype=torch.float64)
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
        if architect.flag():
            last = Classified(reached.shape[1], not plain and architect.flag()).double()
            _settle(last)
            model.steps.append(last)
    return Network(model.eval(), x)


def _settle(module: nn.Module) -> None:
    """Weights and statistics of ordinary sizes, so that neither signals nor errors blow up."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point() and not name.endswith("scale"):
            tensor.normal_(std=1 / max(1, tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.3)


def flat(out: Any) -> list[Tensor]:
    """All tensors of an output."""
    if isinstance(out, Tensor):
        return [out]
    return [t for item in (out.values() if isinstance(out, dict) else out) for t in flat(item)]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that must not change: values, identities, flags, hooks and attributes of every module, and the RNG."""
    found: dict[str, Any] = {"rng": torch.get_rng_state().numpy().tobytes()}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            key = f"{path}:{name}"
            if name in ("_parameters", "_buffers"):
                found[key] = [(n, id(t), None if t is None else _value(t)) for n, t in value.items()]
            elif isinstance(value, dict):
                found[key] = [(n, id(item)) for n, item in value.items()]
            elif isinstance(value, (bool, int, float, str, tuple)):
                found[key] = value
            else:
                found[key] = id(value)
    return found


def _value(t: Tensor) -> tuple[Any, ...]:
    raw = t.detach().contiguous().reshape(-1).view(torch.uint8) if t.dim() else t.detach().reshape(1).view(torch.uint8)
    return (raw.numpy().tobytes(), t.dtype, t.stride(), t.requires_grad, t._version)
