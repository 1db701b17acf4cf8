"""Small models, one for each way in which counting tools differ from one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import relu as bound_relu


class Calls(nn.Module):
    """Hands its input and its parts to a function."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


class Patched(nn.Module):
    """Uses methods and functions that ptflops replaces."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.add(x, x.mul(2.0))
        y = F.silu(F.max_pool2d(F.softmax(y, dim=1), 2))
        return torch.matmul(F.relu6(y), y.transpose(-1, -2)).bmm(y) if y.dim() == 3 else F.gelu(y).matmul(y)


class Operators(nn.Module):
    """Uses operators that ptflops does not replace, and a function bound by name."""

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x @ x * 2 + x)


class Bound(nn.Module):
    """Holds a function of ``functional`` as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = bound_relu

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)


class LayerNorm2d(nn.LayerNorm):
    """A norm over channels, applied twice in a row on different inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class WeightNet(nn.Module):
    """Convolves with a weight that is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


class StandardConv2d(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)


class Shared(nn.Module):
    """One convolution under two parents, called through both."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(8, 8, 3, padding=1)
        self.first = nn.Sequential(conv, nn.ReLU())
        self.second = nn.Sequential(conv, nn.BatchNorm2d(8))
        self.again = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.first(x)))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query @ key.transpose(-1, -2) @ value


SHAPE = (2, 8, 16, 16)


def quirks() -> dict[str, nn.Module]:
    """The models by name, in evaluation mode; each takes an input of `SHAPE`."""
    norm = LayerNorm2d(8)
    kinds: dict[str, Any] = {
        "transposed": nn.Sequential(nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2)),
        "same padding": nn.Sequential(nn.Conv2d(8, 4, 3, padding="same")),
        "reflected padding": nn.Sequential(nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")),
        "conv1d": Calls(lambda x, conv: conv(x[:, :, 0]), nn.Conv1d(8, 4, 3, bias=False)),
        "conv3d": Calls(lambda x, conv: conv(x[:, None]), nn.Conv3d(1, 4, 3)),
        "functional": WeightNet(),
        "subclass": nn.Sequential(StandardConv2d(8, 4, 3)),
        "linear over rows": nn.Sequential(nn.Linear(16, 4)),
        "matrix times vector": Calls(lambda x: x @ x[0, 0, 0].relu()),
        "broadcast product": Calls(lambda x: x[0, 0] @ x),
        "split product": Calls(lambda x: _attend(*x.split([4, 6, 6], dim=2))),
        "einsum": Calls(lambda x: torch.einsum("bchw,bcvw->bhv", x, x)),
        "norms": nn.Sequential(nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.BatchNorm2d(8, affine=False)),
        "more norms": nn.Sequential(nn.LayerNorm(16), nn.InstanceNorm2d(8, affine=True), nn.LayerNorm((16, 16))),
        "no running statistics": nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False)),
        "norm twice in a row": Calls(lambda x, n: n(x) + n(x[..., :8])[..., :1], norm),
        "pools": nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(3)),
        "adaptive max": nn.Sequential(nn.AdaptiveMaxPool2d(3)),
        "activations": nn.Sequential(nn.GELU(), nn.SiLU(), nn.PReLU(), nn.LeakyReLU(), nn.ELU(), nn.ReLU6()),
        "softmax": nn.Sequential(nn.Softmax(dim=1)),
        "upsample": nn.Sequential(nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear")),
        "upsample to a size": nn.Sequential(nn.Upsample(size=(20, 24), mode="bicubic")),
        "interpolate": Calls(lambda x: F.interpolate(x, size=(20, 24), mode="bilinear", align_corners=True)),
        "interpolate by factors": Calls(lambda x: F.interpolate(x, scale_factor=1.5)),
        "grid sample": Calls(lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False)),
        "patched": Patched(),
        "operators": Operators(),
        "bound": Bound(),
        "shared": Shared(),
        "pixel shuffle": nn.Sequential(nn.Conv2d(8, 16, 1), nn.PixelShuffle(2)),
        "dropped": nn.Sequential(nn.Dropout(), nn.Conv2d(8, 4, 1), nn.Identity()),
    }
    return {name: module.eval() for name, module in kinds.items()}
