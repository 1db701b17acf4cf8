"""Plain modules for a fused layer: what `torch.jit.script` compiles, exports write and quantizers look for."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def same_padding(size: list[int], kernel: list[int], stride: list[int], dilation: list[int]) -> list[int]:
    """TensorFlow's ``SAME`` for the spatial size of an input, as ``F.pad`` takes it: the last axis first."""
    pads: list[int] = []
    for i in range(len(size) - 1, -1, -1):
        reach = dilation[i] * (kernel[i] - 1) + 1
        total = max(((size[i] + stride[i] - 1) // stride[i] - 1) * stride[i] + reach - size[i], 0)
        pads += [total // 2, total - total // 2]
    return pads


class SamePadded(nn.Conv2d):
    """A convolution with TensorFlow's ``SAME`` padding, worked out from each input's size."""

    def forward(self, input: Tensor) -> Tensor:
        """Pads, then convolves."""
        kernel, stride = [self.kernel_size[0], self.kernel_size[1]], [self.stride[0], self.stride[1]]
        dilation = [self.dilation[0], self.dilation[1]]
        pads = same_padding([input.shape[-2], input.shape[-1]], kernel, stride, dilation)
        return F.conv2d(F.pad(input, pads), self.weight, self.bias, stride, [0, 0], dilation, self.groups)


class Unfused(nn.Module):
    """A layer, the addition of a residual where there is one, and an activation or nothing."""

    def __init__(self, layer: nn.Module, act: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.act = layer, nn.Identity() if act is None else act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Runs them in order."""
        out: Tensor = self.layer(x)
        if residual is not None:
            out = out + residual
        result: Tensor = self.act(out)
        return result
