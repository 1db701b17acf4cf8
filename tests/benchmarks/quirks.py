"""Small models, one for each way in which counting tools differ from one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import relu as bound_relu
from torch.nn.utils import spectral_norm

aten = torch.ops.aten


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


class Indices(nn.Module):
    """Pools with indices, which a function that ptflops replaces hands on to one that it does not."""

    def forward(self, x: Tensor) -> Tensor:
        y, places = F.max_pool2d(x, 2, return_indices=True)
        z = F.adaptive_max_pool2d(x, 8, return_indices=True)[0]
        return F.max_pool1d(y[:, :, 0], 2, return_indices=True)[0] + z[:, :, 0, :4] + places[:, :, 0, :4]


class DirectIndices(nn.Module):
    """The same by the function that ptflops does not replace."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d_with_indices(x, 2)[0]


class ComplexNet(nn.Module):
    """Complex convolutions, which torch runs as three real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 3, dtype=torch.complex64)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2, dtype=torch.complex64)
        self.weight = nn.Parameter(torch.rand(3, 2, 1, 1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.up(self.conv(x.to(torch.complex64))), self.weight).real


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
        "old spectral norm": nn.Sequential(spectral_norm(nn.Conv2d(8, 4, 3)), nn.BatchNorm2d(4)),
        "old spectral norm, twice": Calls(lambda x, conv: conv(x) + conv(2 * x), spectral_norm(nn.Conv2d(8, 4, 3))),
        "old spectral norm, linear": nn.Sequential(spectral_norm(nn.Linear(16, 4))),
        "pools with indices": Indices(),
        "pool with indices, direct": DirectIndices(),
        "complex": ComplexNet(),
        "not batched": Calls(lambda x, conv: conv(x[0]), nn.Conv2d(8, 4, 3)),
        "products": Calls(
            lambda x: (
                torch.addbmm(x[0, 0], x[0], x[1]) + (torch.inner(x, x[0, 0]) + torch.tensordot(x, x[0, 0], 1))[0, 0]
            )
        ),
        "products of vectors": Calls(
            lambda x: (
                torch.mv(x[0, 0], x[0, 0, 0]) * torch.dot(x[0, 0, 0], x[0, 0, 1])
                + torch.addmv(x[0, 0, 0], x[0, 0], x[0, 0, 0])
                + torch.inner(x[0, 0, 0], x[0, 0, 1])
            )
        ),
        "a vector times matrices": Calls(lambda x: x[0, 0, 0] @ x[0] + x[0, 0] @ x[0, 0, 0]),
        "a chain": Calls(
            lambda x: torch.linalg.multi_dot([x[0, 0], x[0, 1], x[0, 2]]) + torch.matrix_power(x[0, 0], 3)
        ),
        "bilinear": Calls(lambda x, pair: pair(x, x), nn.Bilinear(16, 16, 3)),
        "composite aten": Calls(
            lambda x: (
                aten.conv2d(x, x[:1, :, :3, :3]).sum()
                + aten.linear(x, x[0, 0])
                + aten.matmul(x, x)
                + aten.scaled_dot_product_attention(x, x, x)
                + aten.inner(x, x[0, 0])
            )
        ),
        "products of pieces": Calls(
            lambda x: torch.inner(*x.split([8, 8], 3)).sum() + torch.tensordot(*x.split([4, 4], 1), dims=([1], [1]))
        ),
        "aten resizes": Calls(
            lambda x: (
                aten.upsample_bilinear2d(aten.upsample_nearest2d.vec(x, None, [2.0, 2.0]), [16, 16], False)
                + aten.upsample_nearest2d.vec(aten._adaptive_avg_pool2d(x, [8, 8]), None, [2.0, 2.0])
            )
        ),
        "aten einsum": Calls(lambda x: aten.einsum("bchw,bchv->bcwv", [x, x])),
        "aten": Calls(
            lambda x: (
                aten.convolution(x, x[:1, :, :3, :3], None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
                + aten.mm(x[0, 0], x[0, 1])
                + aten.addbmm(x[0, 0], x[0], x[1])
            )
        ),
        "dropped": nn.Sequential(nn.Dropout(), nn.Conv2d(8, 4, 1), nn.Identity()),
    }
    return {name: module.eval() for name, module in kinds.items()}
