"""Shapes by rule: what operations return, as empty tensors of the right shape, dtype and memory format.

Everything here takes tensors on ``meta`` (or any device) and makes new ones without computing. An input that the real
operation would refuse raises `ShapeError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ..core.convolution import ConvSpec
from .records import Window


class ShapeError(ValueError):
    """An input that a rule knows the real operation would refuse."""


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def new(shape: Sequence[int], like: Tensor, other: Tensor | None = None) -> Tensor:
    """An empty tensor in the memory format that an operation keeps.

    Args:
        shape: Its shape.
        like: Gives dtype and device, and ``channels_last`` where it has that format.
        other: A second tensor that may bring ``channels_last``, such as a convolution's weight.
    """
    if like.is_contiguous() and (other is None or other.is_contiguous()):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    last = _LAST.get(len(shape))
    if last is not None and (_is_last(like, last) or (other is not None and _is_last(other, last))):
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=last)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _is_last(t: Tensor, last: torch.memory_format) -> bool:
    return _LAST.get(t.dim()) is last and not t.is_contiguous() and t.is_contiguous(memory_format=last)


def same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """A new tensor as ``x``, strides kept where ``x`` is dense."""
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty_like(x)


def convolve(
    spec: ConvSpec, x: Tensor, weight: Tensor | None = None, output_size: Sequence[int] | None = None
) -> Tensor:
    """What a convolution returns for ``x``.

    Raises:
        ShapeError: If the convolution does not take ``x``.
    """
    try:
        shape = spec.output_shape(x.shape, output_size)
    except ValueError as error:
        raise ShapeError(str(error)) from None
    if weight is not None and weight.dtype != x.dtype and not torch.is_autocast_enabled("cpu"):
        raise ShapeError(f"{spec.op} with a weight of {_plain(weight)} takes {_plain(weight)}, got {_plain(x)}")
    if spec.padding_mode == "circular":  # the padding is a copy of its own, in the default format
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    return new(shape, x, weight)


def project(x: Tensor, in_features: int, out_features: int) -> Tensor:
    """What a linear map over the last axis returns for ``x``."""
    if not x.shape or x.shape[-1] != in_features:
        raise ShapeError(f"linear takes {in_features} features in the last dim, got shape {tuple(x.shape)}")
    return torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)


def _plain(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def spread(value: Any, dims: int) -> tuple[Any, ...]:
    """One value for every dim, from one value or a sequence."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims


def adaptive(x: Tensor, output_size: Any, dims: int) -> Any:
    """What adaptive pooling over the last ``dims`` axes returns for ``x``."""
    keep = x.dim() - dims
    if keep not in (1, 2):
        raise ShapeError(f"adaptive pooling over {dims} dims takes {dims + 1} or {dims + 2} dims, got {tuple(x.shape)}")
    size = tuple(n if wanted is None else int(wanted) for wanted, n in zip(spread(output_size, dims), x.shape[keep:]))
    if dims == 1 and not x.is_contiguous():
        return NotImplemented
    if dims == 3:
        return torch.empty((*x.shape[:keep], *size), dtype=x.dtype, device=x.device)
    return new((*x.shape[:keep], *size), x)


def pooled(x: Tensor, window: Window, ceil_mode: bool, *, average: bool) -> Any:
    """What local pooling over the last dims returns for ``x``."""
    dims = len(window.kernel)
    shape = pooled_shape(x.shape, window, ceil_mode)
    if dims == 1 and not x.is_contiguous():
        return NotImplemented
    if dims == 3 and average:  # this kernel knows no channels_last
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    return new(shape, x)


def pooled_shape(shape: Sequence[int], window: Window, ceil_mode: bool) -> tuple[int, ...]:
    """Output shape of local pooling over the last dims (torch's rule: a window may not start in the right padding)."""
    dims = len(window.kernel)
    if len(shape) - dims not in (1, 2):
        raise ShapeError(f"pooling over {dims} dims takes {dims + 1} or {dims + 2} dims, got shape {tuple(shape)}")
    size = []
    for n, k, s, (p, _), d in zip(shape[-dims:], window.kernel, window.stride, window.padding, window.dilation):
        span = n + 2 * p - d * (k - 1) - 1
        out = (ceil(span / s) if ceil_mode else span // s) + 1
        if ceil_mode and (out - 1) * s >= n + p:
            out -= 1
        if out < 1:
            raise ShapeError(f"pooling with kernel {window.kernel} does not fit an input of shape {tuple(shape)}")
        size.append(out)
    return (*shape[:-dims], *size)


def pool_window(dims: int, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1) -> Window:
    """The window of a pooling call, from its arguments."""
    kernel = tuple(int(k) for k in _each(kernel, dims))
    stride = kernel if stride is None or stride == [] or stride == () else _each(stride, dims)
    return Window(kernel, tuple(stride), tuple((p, p) for p in _each(padding, dims)), _each(dilation, dims))


def _each(value: Any, dims: int) -> tuple[Any, ...]:
    values = spread(value, dims)
    return values * dims if len(values) == 1 else values


def broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The shape that two shapes broadcast to.

    Raises:
        ShapeError: If they do not.
    """
    if len(a) < len(b):
        a, b = b, a
    out = list(a)
    offset = len(a) - len(b)
    for i, n in enumerate(b, start=offset):
        if out[i] == 1:
            out[i] = n
        elif n not in (1, out[i]):
            raise ShapeError(f"shapes {tuple(a)} and {tuple(b)} do not broadcast")
    return tuple(out)
