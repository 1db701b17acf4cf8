"""The fused kernels on CUDA: cuDNN's convolution + ReLU, and a 1×1 in channels_last as a matrix product with epilogue.

In channels_last a 1×1 convolution's input is, without a copy, the matrix of its positions, and
``torch._addmm_activation`` applies ReLU behind the product. Its GELU is the tanh approximation, another function than
``F.gelu``. cuDNN's kernels take the stride before the padding and know ReLU only; kernels above 3×3 take the plain
path, since a 7×7 in channels_last was 17 times slower through cuDNN's fused kernel (pytorch#68506).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import Geometry

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""Dtypes that the kernels take."""
LARGEST_KERNEL = 3
"""Kernel size above which cuDNN's fused kernel is not taken."""


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``relu(x · Wᵀ + b)`` over the last axis."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = torch._addmm_activation(bias, rows, weight.t())
    return out.view(*x.shape[:-1], weight.shape[0])


def convolve(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, how: Geometry) -> Tensor | None:
    """``relu(conv(x) + residual)`` by cuDNN; None where torch was built without it."""
    if not torch._C._has_cudnn or not torch.backends.cudnn.enabled:
        return None
    settings = (how.stride, how.padding, how.dilation, how.groups)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *settings)
    if x.is_contiguous(memory_format=torch.channels_last):
        residual = residual.contiguous(memory_format=torch.channels_last)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *settings)
