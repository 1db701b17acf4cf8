"""The fused kernels on CUDA: cuDNN's convolution + ReLU, and a 1×1 in channels_last as a matrix product with epilogue.

In channels_last a 1×1 convolution's input is, without a copy, the matrix of its positions, and
``torch._addmm_activation`` applies ReLU behind the product (beta 1, a 1-D bias, contiguous output). GELU is not taken
from there: its epilogue is the tanh approximation on CUDA, another function than ``F.gelu``. cuDNN's kernels take the
stride before the padding and know ReLU only.

Limits: one published case of a 7×7 in channels_last is 17 times slower through cuDNN's fused kernel (pytorch#68506), so
kernels above 3×3 take the plain path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def run(layer: Any, x: Tensor, weight: Any, bias: Any, residual: Tensor | None) -> Tensor | None:
    """Runs a `PointwiseActivation` on CUDA by a fused kernel; None where there is none for this call.

    Args:
        layer: The layer.
        x: A plain tensor on CUDA that needs no gradient.
        weight: Its weight, of the same dtype, on the same device.
        bias: Its bias, or None.
        residual: What is added before the activation, or None.
    """
    spec = layer.spec
    if layer.activation != "relu" or bias is None or x.dtype not in _DTYPES or not x.numel():
        return None
    if not spec.dims:
        return None if residual is not None or x.dim() < 2 else _product(x, weight, bias)
    if spec.dims != 2 or x.dim() != 4 or layer.same or layer._pad is not None:
        return None
    if layer.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    if layer._step and spec.groups == 1 and residual is None and x.is_contiguous(memory_format=torch.channels_last):
        out = _product(x.permute(0, 2, 3, 1), weight.flatten(1), bias)
        return out.permute(0, 3, 1, 2)
    if max(spec.kernel_size) > 3 or not torch._C._has_cudnn or not torch.backends.cudnn.enabled:
        return None
    padding, stride, dilation, groups = layer._settings
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    if type(residual) is not Tensor or residual.device != x.device or not layer._adds(x, weight, residual):
        return None
    if x.is_contiguous(memory_format=torch.channels_last):
        residual = residual.contiguous(memory_format=torch.channels_last)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``relu(x · Wᵀ + b)`` over the last axis."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = torch._addmm_activation(bias, rows, weight.t())
    return out.view(*x.shape[:-1], weight.shape[0])
