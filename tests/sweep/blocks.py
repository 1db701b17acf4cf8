"""The parts of the sweep's networks, for 1 to 3 spatial dims: each a module that takes and gives ``(N, C, *size)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
UPS: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE: dict[int, type[nn.Module]] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
MAX: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
FUNCTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.SiLU,
    lambda: nn.SiLU(inplace=True),
    nn.GELU,
    lambda: nn.GELU("tanh"),
    nn.Hardswish,
    nn.ReLU6,
    nn.Sigmoid,
    nn.Tanh,
    nn.ELU,
    nn.Mish,
    nn.PReLU,
    lambda: nn.LeakyReLU(0.2, inplace=True),
    nn.Softplus,
    nn.Dropout,
    nn.Identity,
)


class Run(nn.Module):
    """A body in the middle of code that a subclass writes."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @property
    def body(self) -> nn.Module:
        return self.parts[0]

    @property
    def other(self) -> nn.Module:
        return self.parts[1]


class FunctionalConv(nn.Module):
    """A convolution that is a function call."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.kernel, self.offset = conv.weight, conv.bias
        self.dims, self.settings = conv.weight.dim() - 2, {"groups": conv.groups, "dilation": conv.dilation}

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.dims](x, self.kernel, self.offset, padding=1, **self.settings).relu()


class Standardised(nn.Module):
    """Mixed into a convolution: standardises its weight in each call."""

    def forward(self: Any, x: Tensor) -> Tensor:
        axes = tuple(range(1, self.weight.dim()))
        centred = self.weight - self.weight.mean(axes, keepdim=True)
        return self._conv_forward(x, centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt(), self.bias)


class Centred(nn.Module):
    """Mixed into a convolution: takes the mean off its weight by a batch norm over it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


KINDS = {
    (mixin, dims): type(f"{mixin.__name__}{dims}d", (mixin, conv), {})
    for mixin in (Standardised, Centred)
    for dims, conv in CONVS.items()
}


class Twice(Run):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.tanh(self.body(x)))


class Loop(Run):
    """The same layer and activation several times."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.relu(self.body(x))
        return x


class WidthLoop(Run):
    """As many calls as the input is wide."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(min(x.shape[-1] // 4, 3)):
            x = self.other(self.body(x))
        return x


class Aliased(nn.Module):
    """One layer under two names."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.first, self.others = conv, nn.ModuleDict({"second": conv})

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) - 0.5 * self.others["second"](x.flip(-1))


class SharedWeight(Run):
    """Two layers that hold the same parameter."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__(first, second)
        second.weight = first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.body(x).relu())


class Residual(Run):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


class ResidualInPlace(Run):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += x
        return F.relu_(out)


class Gated(Run):
    """Squeeze and excitation."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.flatten(2).mean(-1).reshape(*x.shape[:2], *(1,) * (x.dim() - 2))
        return x * torch.sigmoid(self.body(pooled))


class Joined(Run):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=1)


class Split(Run):
    """Half of the channels through the body, as in C2f blocks."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([first, self.body(second)], 1)


class ViewWritten(Run):
    """Writes into views of what a layer made."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y[:, :1] += 1.0
        y.narrow(1, 0, 1).mul_(2.0)
        torch.relu_(y[..., ::2])
        return y


class ViewRead(Run):
    """A view that sees a later write, and an input written in place after it was read."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        view = y.flatten(2)
        y.clamp_(-1, 1)
        return self.other(view.reshape(y.shape)) + y


class WrittenInput(Run):
    """What a layer reads is overwritten before another reads it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        first = self.body(x)
        x.mul_(-1.0)
        return self.other(x) + first.mean()


class ByValue(Run):
    """One of two bodies, by what the input is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if float(x.mean()) > 0 else self.other(x)


class ByValueMask(Run):
    """A choice by value that no code sees."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, self.body(x), self.other(x))


class BySize(Run):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.shape[-1] > 9 else self.other(x)


class ByBatch(Run):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.shape[0] > 1 else self.other(x)


class Dead(Run):
    """A branch whose result nobody uses."""

    def forward(self, x: Tensor) -> Tensor:
        self.other(x).sum()
        return self.body(x)


class Unused(Run):
    """A part that is never called."""

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Lost(nn.Module):
    """A layer in a plain list, which its model does not know."""

    def __init__(self, body: nn.Module, lost: nn.Module) -> None:
        super().__init__()
        self.body, self.layers = body, [lost]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](self.body(x))


class Attention(nn.Module):
    """Attention over positions, by the module or by the function."""

    def __init__(self, channels: int, heads: int, functional: bool) -> None:
        super().__init__()
        self.heads, self.functional = heads, functional
        self.norm, self.qkv = nn.LayerNorm(channels), nn.Linear(channels, 3 * channels)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x.flatten(2).transpose(1, 2))
        if self.functional:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(rows).chunk(3, -1))
            rows = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            rows = self.attention(rows, rows, rows, need_weights=False)[0]
        return x + rows.transpose(1, 2).reshape(x.shape)


class Recurrent(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(channels, channels, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(x.shape)


class FrozenNorm(nn.Module):
    """A batch norm of buffers only, as detection networks have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.dim() - 2))
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(shape) + (self.bias - self.running_mean * scale).reshape(shape)


class Counted(Run):
    """Counts its calls in a buffer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x)


class Resized(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(F.interpolate(x, scale_factor=self.scale), [1, 0] * (x.dim() - 2))


class Matmul(nn.Module):
    """Channels mixed by a matrix product and by einsum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.empty(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oc,nc...->no...", self.mixing, x) + (self.mixing @ x.flatten(2)).reshape(x.shape)


class Head(nn.Module):
    """What comes last: the features, scores, several outputs, or probabilities."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "features":
            return x
        scores = self.fc(x.flatten(2).mean(-1))
        if self.kind == "probabilities":
            return scores.softmax(-1)
        return {"scores": scores, "all": [x, (x.amax(1),)]} if self.kind == "nested" else scores


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList()

    def forward(self, x: Tensor) -> Any:
        for step in self.steps:
            x = step(x)
        return x
