"""Output shapes and costs of common torch functions, found by name: ``F.relu``, ``torch.relu`` and ``Tensor.relu``
agree.

A rule takes the function's arguments, tensors on ``meta``, and returns an empty tensor, or `NotImplemented` where the
call is unusual; the function then runs on ``meta`` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..core.convolution import ConvSpec
from ..core.cost import attention_macs, matmul_macs
from ..core.nested import tensors_of
from .functions import words
from .records import Window
from .recurrent import RECURRENT, recurrent, recurrent_macs
from .shapes import ShapeError, adaptive, broadcast, convolve, new, pool_window, pooled, project, same, spread

FunctionRule = Callable[..., Any]


def _inplace(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("inplace")) or any(a is True for a in args)


def _pointwise(x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point() or tensors_of((args, kwargs)):
        return NotImplemented
    return x if _inplace(args, kwargs) else same(x)


def _normalized(x: Any, *args: Any, **kwargs: Any) -> Any:
    return new(x.shape, x)


def _softmax(x: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    return NotImplemented if dtype is not None or not x.is_floating_point() else _plain(x)


def _plain(x: Any, *args: Any, **kwargs: Any) -> Any:
    """The same shape in the default format."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _function_dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return x if not training or inplace else same(x)


def _binary(a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs.get("out") is not None or kwargs.get("rounding_mode"):
        return NotImplemented
    if not isinstance(a, Tensor):
        a, b = b, a
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return NotImplemented
    if not isinstance(b, Tensor):
        return same(a) if isinstance(b, (int, float)) else NotImplemented
    if a.dtype != b.dtype:
        return NotImplemented
    if a.shape == b.shape:
        return same(a)
    shape = broadcast(a.shape, b.shape)
    if shape == tuple(a.shape):
        return same(a)
    if not (a.is_contiguous() and b.is_contiguous()):
        return NotImplemented
    return torch.empty(shape, dtype=a.dtype, device=a.device)


def _cat(tensors: Any, dim: Any = 0, **kwargs: Any) -> Any:
    if not isinstance(tensors, (tuple, list)) or not tensors or kwargs or not isinstance(dim, int):
        return NotImplemented
    first = tensors[0]
    rank, dtype, shape = first.dim(), first.dtype, tuple(first.shape)
    if not rank or not -rank <= dim < rank:
        return NotImplemented
    dim %= rank
    before, after, total = shape[:dim], shape[dim + 1 :], 0
    for t in tensors:
        size = tuple(t.shape)
        if t.dtype is not dtype or len(size) != rank:
            return NotImplemented
        if size[:dim] != before or size[dim + 1 :] != after:
            shapes = [tuple(t.shape) for t in tensors]
            raise ShapeError(f"cat along dim {dim} takes tensors equal in all other dims, got shapes {shapes}")
        total += size[dim]
    if not all(t.is_contiguous() for t in tensors):
        return NotImplemented
    return torch.empty((*before, total, *after), dtype=dtype, device=first.device)


def _reduce(x: Any, dim: Any = None, keepdim: Any = False, **kwargs: Any) -> Any:
    if kwargs or not isinstance(x, Tensor) or not x.is_floating_point() or not isinstance(keepdim, bool):
        return NotImplemented
    dims = range(x.dim()) if dim is None else spread(dim, 1)
    if not all(isinstance(d, int) for d in dims):
        return NotImplemented
    gone = {d % x.dim() for d in dims} if x.dim() else set()
    if not gone or not x.is_contiguous():
        return NotImplemented
    shape = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _function_conv(name: str) -> FunctionRule:
    transposed = "transpose" in name

    def ordinary(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        return convolve(ConvSpec.of_call(weight.shape, stride, padding, dilation, groups), x, weight)

    def transpose(
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        spec = ConvSpec.of_call(
            weight.shape, stride, padding, dilation, groups, transposed=True, output_padding=output_padding
        )
        return convolve(spec, x, weight)

    return transpose if transposed else ordinary


def conv_call(name: str, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> tuple[ConvSpec, Any, Any]:
    """The spec of a functional convolution call, with its weight and bias.

    Args:
        name: ``conv1d`` … ``conv_transpose3d``.
        x: Its input.
        weight: Its weight.
        bias: Its bias or None.
        *args: Further positional arguments.
        **kwargs: Further keyword arguments.
    """
    order = (
        ("stride", "padding", "output_padding", "groups", "dilation")
        if "transpose" in name
        else ("stride", "padding", "dilation", "groups")
    )
    settings = {**dict(zip(order, args)), **kwargs}
    spec = ConvSpec.of_call(weight.shape, bias=bias is not None, transposed="transpose" in name, **settings)
    return spec, weight, bias


def _function_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return project(x, weight.shape[-1], weight.shape[0]) if weight.dim() == 2 else NotImplemented


def _function_pool(dims: int, average: bool) -> FunctionRule:
    def max_pool(
        x: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if return_indices:
            return NotImplemented
        return pooled(x, pool_window(dims, kernel_size, stride, padding, dilation), ceil_mode, average=False)

    def avg_pool(
        x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, *_: Any, **__: Any
    ) -> Any:
        return pooled(x, pool_window(dims, kernel_size, stride, padding), ceil_mode, average=True)

    return avg_pool if average else max_pool


def pool_call_window(
    name: str, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, *args: Any, **kwargs: Any
) -> Window:
    """The window of a functional pooling call named ``max_pool2d`` or ``avg_pool1d`` and the like."""
    dilation = kwargs.get("dilation", args[0] if args and name.startswith("max") else 1)
    return pool_window(int(name[-2]), kernel_size, stride, padding, dilation)


def _function_adaptive(dims: int) -> FunctionRule:
    return lambda x, output_size: adaptive(x, output_size, dims)


def _interpolate(x: Any, size: Any = None, scale_factor: Any = None, *args: Any, **kwargs: Any) -> Any:
    dims = x.dim() - 2
    if size is not None:
        target = tuple(int(n) for n in spread(size, dims))
    elif scale_factor is not None:
        target = tuple(int(n * s) for n, s in zip(x.shape[2:], spread(scale_factor, dims)))
    else:
        return NotImplemented
    if not x.is_contiguous():
        return NotImplemented
    return torch.empty((*x.shape[:2], *target), dtype=x.dtype, device=x.device)


def _pad(x: Any, pad: Any, *args: Any, **kwargs: Any) -> Any:
    if not x.is_contiguous():
        return NotImplemented
    shape = list(x.shape)
    for i in range(len(pad) // 2):
        shape[-1 - i] += int(pad[2 * i]) + int(pad[2 * i + 1])
    return torch.empty(shape, dtype=x.dtype, device=x.device)


_POINTWISE = words(
    """relu relu6 silu gelu hardswish hardsigmoid hardtanh sigmoid tanh elu selu celu leaky_relu mish
    softplus softsign exp sqrt rsqrt neg abs log log1p expm1 sin cos erf square sign reciprocal floor ceil round
    clamp clamp_min clamp_max threshold normalize"""
)
_BINARY = words(
    "add sub mul div true_divide divide multiply subtract pow maximum minimum rsub __rsub__ __rdiv__ __rpow__"
)


def _function_rules() -> dict[str, FunctionRule]:
    rules: dict[str, FunctionRule] = dict.fromkeys(_POINTWISE, _pointwise)
    rules |= dict.fromkeys(_BINARY, _binary)
    rules |= {"batch_norm": _normalized, "group_norm": _normalized, "instance_norm": _plain, "logsigmoid": _plain}
    rules |= {"local_response_norm": same, "rms_norm": _normalized, "layer_norm": _plain}
    rules |= {"softmax": _softmax, "log_softmax": _softmax}
    rules |= dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), _function_dropout)
    rules |= {"cat": _cat, "concat": _cat, "concatenate": _cat, "mean": _reduce, "sum": _reduce}
    rules |= {"linear": _function_linear, "interpolate": _interpolate, "pad": _pad}
    for d in (1, 2, 3):
        rules |= {name: _function_conv(name) for name in (f"conv{d}d", f"conv_transpose{d}d")}
        rules |= {f"max_pool{d}d": _function_pool(d, False), f"avg_pool{d}d": _function_pool(d, True)}
        rules |= {f"adaptive_avg_pool{d}d": _function_adaptive(d)}
    return rules | dict.fromkeys(RECURRENT, recurrent)


FUNCTION_RULES = _function_rules()
"""Name of a torch function or tensor method to its rule."""

INPLACE = frozenset(FUNCTION_RULES) | {"fill", "zero", "copy", "masked_fill"}
"""Functions whose in-place form (``add_``) returns its first argument and nothing new."""

CONV_FUNCTIONS = frozenset(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3))
POOL_FUNCTIONS = frozenset(f"{kind}_pool{d}d" for kind in ("max", "avg") for d in (1, 2, 3))


def _matmul(args: Any, kwargs: Any, out: Any) -> int:
    a, b = _operands(args, kwargs, 0, ("input", "other", "mat2", "vec", "tensor"))
    if a.dim() == 1 and b.dim() == 1:
        return int(a.shape[0])
    return matmul_macs(tuple(a.shape), tuple(out.shape))


def _addmm(args: Any, kwargs: Any, out: Any) -> int:
    a, _ = _operands(args, kwargs, 1, ("mat1", "batch1", "mat", "mat2", "batch2", "vec"))
    return matmul_macs(tuple(a.shape), tuple(out.shape))


def _operands(args: Any, kwargs: Any, first: int, names: tuple[str, ...]) -> tuple[Any, Any]:
    found = [*args[first:], *(kwargs[n] for n in names if n in kwargs)]
    return found[0], found[1]


def _linear_macs(args: Any, kwargs: Any, out: Any) -> int:
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return int(out.numel() * weight.shape[-1])


def _attention_call(args: Any, kwargs: Any, out: Any) -> int:
    tensors = [*args[:3], *(kwargs[n] for n in ("query", "key", "value") if n in kwargs)]
    query, key, value = (tuple(t.shape) for t in tensors[:3])
    return attention_macs((*out.shape[:-2], *query[-2:]), key, value)


def _conv_macs(args: Any, kwargs: Any, out: Any) -> int:
    raise AssertionError("convolutions are priced by their spec")


FUNCTION_MACS: dict[str, Callable[[Any, Any, Any], int]] = {
    "linear": _linear_macs,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _matmul,
    "dot": _matmul,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "addmv": _addmm,
    "scaled_dot_product_attention": _attention_call,
    **dict.fromkeys(RECURRENT, recurrent_macs),
}
"""Name of a torch function to its MACs; the rest is priced under a dispatch mode the first time it is met."""

INDEXED = frozenset(["max_pool2d", "max_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d"])
"""Operations that make an index tensor beside their result, asked for or not."""


def indices(out: Any) -> int:
    """Bytes of the index tensor of a max pooling; 0 where it was asked for and is a result."""
    return int(out.numel() * torch.int64.itemsize) if isinstance(out, Tensor) else 0


def _copied_operands(values: Any, out: Any) -> int:
    """Bytes of the operands that a batched matrix product copies, to have one batch dim."""
    return sum(t.nbytes for t in values[:2] if t.dim() > 3 and not _one_batch(t))


def _one_batch(t: Tensor) -> bool:
    """Whether the leading dims of a tensor are one dim as they lie in memory."""
    lead = [(n, s) for n, s in zip(t.shape[:-2], t.stride()[:-2]) if n != 1]
    return all(outer == inner * n for (_, outer), (n, inner) in pairwise(lead))


TEMPORARIES: dict[str, Callable[[Any, Any], int]] = {
    "matmul": _copied_operands,
    "__matmul__": _copied_operands,
    **dict.fromkeys(INDEXED, lambda values, out: indices(out)),
}
"""Name of a torch function to the bytes that it holds beside its result while it runs."""

FREE_FUNCTIONS = frozenset(FUNCTION_RULES) - CONV_FUNCTIONS - {"linear", *RECURRENT} | frozenset(
    words(
        """view reshape permute transpose flatten unflatten squeeze unsqueeze expand expand_as contiguous clone to
    float half bfloat16 double type_as detach t chunk split unbind stack __getitem__ __setitem__ view_as
    reshape_as narrow select size numel dim ndimension stride is_contiguous element_size is_floating_point
    is_complex __len__ argmax argmin max min amax amin all any roll flip repeat repeat_interleave movedim
    swapaxes zeros ones full empty arange linspace tensor as_tensor zeros_like ones_like empty_like full_like
    new_zeros new_ones new_empty new_full masked_fill where pixel_shuffle pixel_unshuffle channel_shuffle unfold
    fold embedding one_hot topk sort meshgrid tril triu cumsum __eq__ __ne__ __lt__ __le__ __gt__ __ge__ eq ne
    lt le gt ge logical_and logical_or logical_not __and__ __or__ __invert__ type broadcast_to index_select
    gather scatter var std norm"""
    )
)
"""Names of torch functions that have no MACs whatever their arguments."""
