"""Shapes by rule: what operations return, as empty tensors of the right shape, dtype and memory format.

A rule takes a function's arguments, tensors on ``meta`` (or any device), and makes a new tensor. It returns
`NotImplemented` where the call is unusual; the function then runs on ``meta`` itself. Only what is slow there has a
rule. An input that the real operation would refuse raises `ShapeError`. Which operation follows which rule stands in
`pwrewrite.core.operations`; names there are keys of `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ..core.convolution import ConvSpec, Sizes
from ..core.nested import Tree, tensors_of
from ..core.operations import OPERATIONS, convolution_call
from .records import Window
from .tensors import dtype_name

Rule = Callable[..., object]
ON_META: Tensor = NotImplemented
"""What a rule returns where the function has to run on ``meta``."""

_T = TypeVar("_T")


class ShapeError(ValueError):
    """An input that a rule knows the real operation would refuse."""


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An empty tensor in the default format, with the dtype and device of another; faster than ``like.new_empty``."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def new(shape: Sequence[int], like: Tensor, other: Tensor | None = None) -> Tensor:
    """An empty tensor like another, ``channels_last`` where it or ``other`` (such as a convolution's weight) is.

    A 3-D convolution without oneDNN (in float64, of one small sample) keeps no format, which is not followed here.
    """
    if like.is_contiguous() and (other is None or other.is_contiguous()):
        return empty(shape, like)
    last = _LAST.get(len(shape))
    if last is not None and (_is_last(like, last) or (other is not None and _is_last(other, last))):
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=last)
    return empty(shape, like)


def _is_last(t: Tensor, last: torch.memory_format) -> bool:
    return _LAST.get(t.dim()) is last and not t.is_contiguous() and t.is_contiguous(memory_format=last)


def same(x: Tensor) -> Tensor:
    """A new tensor as ``x``, strides kept where ``x`` is dense."""
    if x.is_contiguous():
        return empty(x.shape, x)
    return torch.empty_like(x)


def default(x: Tensor, *_: object, **__: object) -> Tensor:
    """A new tensor as ``x`` in the default memory format."""
    return empty(x.shape, x)


def convolve(
    spec: ConvSpec, x: Tensor, weight: Tensor | None = None, output_size: Sequence[int] | None = None
) -> Tensor:
    """What a convolution returns for ``x``; raises `ShapeError` if it does not take it."""
    try:
        shape = spec.output_shape(x.shape, output_size)
    except ValueError as error:
        raise ShapeError(str(error)) from None
    if weight is not None and weight.dtype != x.dtype and not torch.is_autocast_enabled("cpu"):
        dtype = dtype_name(weight.dtype)
        raise ShapeError(f"{spec.op} with a weight of {dtype} takes {dtype}, got {dtype_name(x.dtype)}")
    if spec.padding_mode == "circular":  # the padding is a copy of its own, in the default format
        return empty(shape, x)
    return new(shape, x, weight)


def project(x: Tensor, in_features: int, out_features: int) -> Tensor:
    """What a linear map over the last axis returns for ``x``."""
    if not x.shape or x.shape[-1] != in_features:
        raise ShapeError(f"linear takes {in_features} features in the last dim, got shape {tuple(x.shape)}")
    return empty((*x.shape[:-1], out_features), x)


def adaptive(dims: int, x: Tensor, output_size: Sizes, return_indices: bool = False) -> Tensor:
    """What adaptive pooling over the last ``dims`` axes returns for ``x``."""
    keep = x.dim() - dims
    if keep not in (1, 2) or return_indices or (dims == 1 and not x.is_contiguous()):
        return ON_META
    size = [n if wanted is None else int(wanted) for wanted, n in zip(_spread(output_size, dims), x.shape[keep:])]
    return empty((*x.shape[:keep], *size), x) if dims == 3 else new((*x.shape[:keep], *size), x)


def pool_window(
    dims: int, kernel: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1
) -> Window:
    """The window of a pooling call, from its arguments."""
    size = _spread(kernel, dims)
    steps = size if stride is None or stride == [] or stride == () else _spread(stride, dims)
    return Window(size, steps, tuple((p, p) for p in _spread(padding, dims)), _spread(dilation, dims))


def pool_call_window(
    name: str, x: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, *args: int, **kwargs: int
) -> Window:
    """The window of a functional pooling call named ``max_pool2d`` or ``avg_pool1d`` and the like."""
    dilation = kwargs.get("dilation", args[0] if args and name.startswith("max") else 1)
    return pool_window(int(name[-2]), kernel_size, stride, padding, dilation)


def _spread(value: Sequence[_T] | _T, dims: int) -> tuple[_T, ...]:
    """One value for every dim, from one value or a sequence."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values


def _broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The shape that two shapes broadcast to; raises `ShapeError` if they do not."""
    if len(a) < len(b):
        a, b = b, a
    out = list(a)
    for i, n in enumerate(b, start=len(a) - len(b)):
        if out[i] == 1:
            out[i] = n
        elif n not in (1, out[i]):
            raise ShapeError(f"shapes {tuple(a)} and {tuple(b)} do not broadcast")
    return tuple(out)


def _elementwise(x: object, *args: object, **kwargs: object) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point() or tensors_of((args, kwargs)):
        return ON_META
    return x if kwargs.get("inplace") or any(a is True for a in args) else same(x)


def _binary(a: object, b: object, *args: object, **kwargs: object) -> Tensor:
    if args or kwargs.get("out") is not None or kwargs.get("rounding_mode"):
        return ON_META
    if not isinstance(a, Tensor):
        a, b = b, a
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return ON_META
    if not isinstance(b, Tensor):
        return same(a) if isinstance(b, (int, float)) else ON_META
    if a.dtype != b.dtype:
        return ON_META
    shape = a.shape if a.shape == b.shape else _broadcast(a.shape, b.shape)
    if shape == tuple(a.shape):
        return same(a)
    contiguous = a.is_contiguous() and b.is_contiguous()
    return empty(shape, a) if contiguous else ON_META


def _cat(tensors: Sequence[Tensor], dim: int = 0, **kwargs: object) -> Tensor:
    if not isinstance(tensors, (tuple, list)) or not tensors or kwargs or type(dim) is not int:
        return ON_META
    first = tensors[0]
    rank, dtype, shape = first.dim(), first.dtype, tuple(first.shape)
    if not rank or not -rank <= dim < rank:
        return ON_META
    dim %= rank
    before, after, total = shape[:dim], shape[dim + 1 :], 0
    for t in tensors:
        size = tuple(t.shape)
        if t.dtype is not dtype or len(size) != rank:
            return ON_META
        if size[:dim] != before or size[dim + 1 :] != after:
            shapes = [tuple(t.shape) for t in tensors]
            raise ShapeError(f"cat along dim {dim} takes tensors equal in all other dims, got shapes {shapes}")
        total += size[dim]
    if not all(t.is_contiguous() for t in tensors):
        return ON_META
    return empty((*before, total, *after), first)


def _reduce(x: object, dim: Sizes | None = None, keepdim: object = False, **kwargs: object) -> Tensor:
    if kwargs or not isinstance(x, Tensor) or not x.is_floating_point() or not isinstance(keepdim, bool):
        return ON_META
    dims = range(x.dim()) if dim is None else _spread(dim, 1)
    if not x.dim() or not x.is_contiguous() or not all(isinstance(d, int) for d in dims):
        return ON_META
    gone = {d % x.dim() for d in dims}
    shape = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]
    return empty(shape, x) if gone else ON_META


def _resize(
    x: Tensor, size: Sizes | None = None, scale_factor: float | Sequence[float] | None = None, *_: object, **__: object
) -> Tensor:
    dims = x.dim() - 2
    if not x.is_contiguous():
        return ON_META
    if size is not None:
        target = [int(n) for n in _spread(size, dims)]
    elif scale_factor is not None:
        target = [int(n * s) for n, s in zip(x.shape[2:], _spread(scale_factor, dims))]
    else:
        return ON_META
    return empty((*x.shape[:2], *target), x)


def _linear(x: Tensor, weight: Tensor, bias: object = None) -> Tensor:
    return project(x, weight.shape[-1], weight.shape[0]) if weight.dim() == 2 else ON_META


def _convolution(name: str, *args: Tree, **kwargs: Tree) -> Tensor:
    spec, weight, _ = convolution_call(name, args, kwargs)
    return convolve(spec, args[0] if args else kwargs["input"], weight)


def _recurrent(*args: Tree, **kwargs: Tree) -> Tree:
    """The output and the last state or states of ``torch.lstm`` and its kin, which ``meta`` runs step by step."""
    if kwargs:
        return ON_META
    packed = isinstance(args[3], (list, tuple))  # input, batch sizes, state, weights, …
    x, state = args[0], args[2 if packed else 1]
    states = [state] if isinstance(state, Tensor) else list(state)
    bidirectional = bool(args[8 if packed else 7])
    shape = (*x.shape[:-1], states[0].shape[-1] * (2 if bidirectional else 1))
    if not packed and bool(args[8]) and x.dim() == 3:  # batch first: the output is a transposed view
        out = empty((shape[1], shape[0], shape[2]), x).transpose(0, 1)
    else:
        out = empty(shape, x)
    return (out, *map(default, states))


RULES: dict[str, Rule] = {
    "same": _elementwise,
    "default": default,
    "layer": default,
    "format": lambda x, *args, **kwargs: new(x.shape, x),
    "broadcast": _binary,
    "cat": _cat,
    "reduce": _reduce,
    "resize": _resize,
    "linear": _linear,
    "recurrent": _recurrent,
}


def _rule(shape: str, name: str) -> Rule:
    if shape == "convolution":
        return partial(_convolution, name)
    return partial(adaptive, int(name[-2])) if shape == "adaptive" else RULES[shape]


FUNCTION_RULES: dict[str, Rule] = {
    name: _rule(row.shape, name)
    for row in OPERATIONS
    if row.shape not in ("", "input", "pool")
    for name in row.functions
}
"""Name of a torch function or tensor method to its rule."""
