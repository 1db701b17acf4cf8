"""Output shapes by rule: what common modules and functions return, without running them.

A rule takes tensors on the ``meta`` device and returns a new one of the right shape, dtype and memory format, or
`NotImplemented` where the call is unusual; the operation then runs on ``meta`` itself, which is right for everything but
ten to a hundred times slower (batch norm on meta runs a Python decomposition, 0.3 ms each).

Rules are found by the *forward function* of a module, so a subclass that inherits ``forward`` is covered and one that
overrides it is not, and by the *name* of a torch function, since ``F.relu``, ``torch.relu`` and ``Tensor.relu`` agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..convolution import CONV_MODULES, ConvSpec
from ..cost import attention_macs, matmul_macs
from .records import Window

FunctionRule = Callable[..., Any]


class Leaf(NamedTuple):
    """How a module that is not looked into is handled.

    Attributes:
        op: Canonical name; None for a convolution, whose spec names it.
        output: ``output(module, x, *args, **kwargs) -> Tensor``.
    """

    op: str | None
    output: Callable[..., Any]


class ShapeError(ValueError):
    """An input that a rule knows the real operation would refuse."""


def new(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty meta tensor in the memory format that an operation keeps from ``like``."""
    if len(shape) == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        return torch.empty(
            tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last
        )
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)


def same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """A new tensor as ``x``, strides kept where ``x`` is dense."""
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty_like(x)


# ---------------------------------------------------------------------------------------------------- modules


def _convolution(module: Any, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
    return convolve(ConvSpec.of_module(module), x, output_size)


def convolve(spec: ConvSpec, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
    """What a convolution returns for ``x``.

    Raises:
        ShapeError: If the convolution does not take ``x``.
    """
    try:
        shape = spec.output_shape(x.shape, output_size)
    except ValueError as error:
        raise ShapeError(str(error)) from None
    return new(shape, x)


def _linear(module: Any, x: Tensor) -> Tensor:
    return project(x, module.in_features, module.out_features)


def project(x: Tensor, in_features: int, out_features: int) -> Tensor:
    """What a linear map over the last axis returns for ``x``."""
    if not x.shape or x.shape[-1] != in_features:
        raise ShapeError(f"linear takes {in_features} features in the last dim, got shape {tuple(x.shape)}")
    return torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)


def _norm(module: Any, x: Tensor) -> Tensor:
    features = getattr(module, "num_features", None)
    if features is not None and x.dim() > 1 and x.shape[1] != features:
        raise ShapeError(f"{type(module).__name__} takes {features} channels, got shape {tuple(x.shape)}")
    return same(x)


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    wanted = tuple(module.normalized_shape)
    if tuple(x.shape[-len(wanted) :]) != wanted:
        raise ShapeError(f"LayerNorm takes {wanted} in the last dims, got shape {tuple(x.shape)}")
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _activation(module: Any, x: Tensor) -> Tensor:
    return x if getattr(module, "inplace", False) else same(x)


def _identity(module: Any, x: Tensor) -> Tensor:
    return x


def _dropout(module: Any, x: Tensor) -> Tensor:
    return x if not module.training or module.inplace else same(x)


def _pool(module: Any, x: Tensor) -> Any:
    if getattr(module, "return_indices", False):
        return NotImplemented
    return new(pooled_shape(x.shape, module_window(module), module.ceil_mode), x)


def _adaptive_pool(module: Any, x: Tensor) -> Any:
    if getattr(module, "return_indices", False):
        return NotImplemented
    return adaptive(x, module.output_size, _POOL_DIMS[type(module).forward])


def _flatten(module: Any, x: Tensor) -> Tensor:
    return x.flatten(module.start_dim, module.end_dim)


def _tuple(value: Any, dims: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims


def adaptive(x: Tensor, output_size: Any, dims: int) -> Tensor:
    """What adaptive pooling over the last ``dims`` axes returns for ``x``."""
    keep = x.dim() - dims
    size = tuple(
        n if wanted is None else int(wanted) for wanted, n in zip(_tuple(output_size, dims), x.shape[keep:])
    )
    return new((*x.shape[:keep], *size), x)


def pooled_shape(shape: Sequence[int], window: Window, ceil_mode: bool) -> tuple[int, ...]:
    """Output shape of local pooling over the last dims (torch's rule: a window may not start in the right padding)."""
    dims = len(window.kernel)
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
    kernel = tuple(int(k) for k in _tuple(kernel, dims))
    stride = kernel if stride is None or stride == [] or stride == () else _tuple(stride, dims)
    return Window(kernel, tuple(stride), tuple((p, p) for p in _tuple(padding, dims)), _tuple(dilation, dims))


def module_window(module: Any) -> Window:
    """The window of a pooling module."""
    dims = _POOL_DIMS[type(module).forward]
    return pool_window(dims, module.kernel_size, module.stride, module.padding, getattr(module, "dilation", 1))


_POOL_DIMS: dict[Any, int] = {
    kind.forward: dims
    for dims, kinds in enumerate(
        (
            (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
            (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
            (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
        ),
        start=1,
    )
    for kind in kinds
}

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardtanh: "hardtanh",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.CELU: "celu",
    nn.LeakyReLU: "leaky_relu",
    nn.Mish: "mish",
    nn.Softplus: "softplus",
    nn.PReLU: "prelu",
    nn.Softmax: "softmax",
    nn.LogSoftmax: "log_softmax",
}

_NORMS: dict[type[nn.Module], str] = {
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
    nn.InstanceNorm1d: "instance_norm",
    nn.InstanceNorm2d: "instance_norm",
    nn.InstanceNorm3d: "instance_norm",
    nn.GroupNorm: "group_norm",
}

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _module_rules() -> dict[Any, Leaf]:
    rules: dict[Any, Leaf] = {kind.forward: Leaf(None, _convolution) for kind in CONV_MODULES}
    rules[nn.Linear.forward] = Leaf("linear", _linear)
    rules[nn.Identity.forward] = Leaf("identity", _identity)
    rules[nn.LayerNorm.forward] = Leaf("layer_norm", _layer_norm)
    rules[nn.Flatten.forward] = Leaf("flatten", _flatten)
    rules |= {kind.forward: Leaf(op, _activation) for kind, op in _ACTIVATIONS.items()}
    rules |= {kind.forward: Leaf(op, _norm) for kind, op in _NORMS.items()}
    rules |= {kind.forward: Leaf("dropout", _dropout) for kind in _DROPOUTS}
    for dims in (1, 2, 3):
        pools = ((f"MaxPool{dims}d", "max_pool", _pool), (f"AvgPool{dims}d", "avg_pool", _pool))
        pools += ((f"AdaptiveAvgPool{dims}d", "adaptive_avg_pool", _adaptive_pool),)
        pools += ((f"AdaptiveMaxPool{dims}d", "adaptive_max_pool", _adaptive_pool),)
        rules |= {getattr(nn, name).forward: Leaf(f"{op}{dims}d", rule) for name, op, rule in pools}
    return rules


MODULE_RULES = _module_rules()
"""Forward function to how its module is handled."""

_leaf_of_type: dict[type, Leaf | None] = {}


def leaf_rule(kind: type[Any]) -> Leaf | None:
    """The rule for modules of class ``kind``; None where they are looked into."""
    try:
        return _leaf_of_type[kind]
    except KeyError:
        leaf = MODULE_RULES.get(getattr(kind, "forward", None))
        if leaf is not None and leaf.op is None:
            base: Any = next(base for base in CONV_MODULES if issubclass(kind, base))
            if getattr(kind, "_conv_forward", None) is not getattr(base, "_conv_forward", None):
                leaf = None
        _leaf_of_type[kind] = leaf
        return leaf


# -------------------------------------------------------------------------------------------------- functions


def _inplace(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("inplace")) or any(a is True for a in args)


def _pointwise(x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point() or any(isinstance(a, Tensor) for a in args):
        return NotImplemented
    return x if _inplace(args, kwargs) else same(x)


def _normalized(x: Any, *args: Any, **kwargs: Any) -> Any:
    return same(x)


def _softmax(x: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    return NotImplemented if dtype is not None or not x.is_floating_point() else same(x)


def _function_layer_norm(x: Any, *args: Any, **kwargs: Any) -> Any:
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
    if shape == tuple(b.shape):
        return same(b)
    return torch.empty(shape, dtype=a.dtype, device=a.device)


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


def _cat(tensors: Any, dim: Any = 0, **kwargs: Any) -> Any:
    if not isinstance(tensors, (tuple, list)) or not tensors or kwargs or not isinstance(dim, int):
        return NotImplemented
    first = tensors[0]
    if any(t.dtype != first.dtype or t.dim() != first.dim() or not t.dim() for t in tensors):
        return NotImplemented
    dim %= first.dim()
    shape = list(first.shape)
    for t in tensors[1:]:
        if any(n != m for i, (n, m) in enumerate(zip(t.shape, first.shape)) if i != dim):
            shapes = [tuple(t.shape) for t in tensors]
            raise ShapeError(f"cat along dim {dim} takes tensors equal in all other dims, got shapes {shapes}")
        shape[dim] += t.shape[dim]
    if all(t.is_contiguous() for t in tensors):
        return torch.empty(shape, dtype=first.dtype, device=first.device)
    return new(shape, next(t for t in tensors if not t.is_contiguous()))


def _reduce(x: Any, dim: Any = None, keepdim: Any = False, **kwargs: Any) -> Any:
    if kwargs or not isinstance(x, Tensor) or not x.is_floating_point() or not isinstance(keepdim, bool):
        return NotImplemented
    dims = range(x.dim()) if dim is None else _tuple(dim, 1)
    if not all(isinstance(d, int) for d in dims):
        return NotImplemented
    gone = {d % x.dim() for d in dims} if x.dim() else set()
    if not gone:
        return NotImplemented
    shape = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]
    return new(shape, x)


def _function_conv(name: str) -> FunctionRule:
    transposed = "transpose" in name

    def ordinary(x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:  # fmt: skip
        return convolve(ConvSpec.of_call(weight.shape, stride, padding, dilation, groups), x)

    def transpose(x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Any:  # fmt: skip
        spec = ConvSpec.of_call(
            weight.shape, stride, padding, dilation, groups, transposed=True, output_padding=output_padding
        )
        return convolve(spec, x)

    return transpose if transposed else ordinary


def conv_call(
    name: str, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
) -> tuple[ConvSpec, Any, Any]:
    """The spec of a functional convolution call, with its weight and bias.

    Args:
        name: ``conv1d`` … ``conv_transpose3d``.
        x: Its input.
        weight: Its weight.
        bias: Its bias or None.
        *args: Further positional arguments.
        **kwargs: Further keyword arguments.
    """
    order = ("stride", "padding", "output_padding", "groups", "dilation") if "transpose" in name else ("stride", "padding", "dilation", "groups")  # fmt: skip
    settings = {**dict(zip(order, args)), **kwargs}
    spec = ConvSpec.of_call(weight.shape, bias=bias is not None, transposed="transpose" in name, **settings)
    return spec, weight, bias


def _function_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return project(x, weight.shape[-1], weight.shape[0]) if weight.dim() == 2 else NotImplemented


def _function_pool(dims: int, average: bool) -> FunctionRule:
    def max_pool(x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False) -> Any:  # fmt: skip
        if return_indices:
            return NotImplemented
        return new(pooled_shape(x.shape, pool_window(dims, kernel_size, stride, padding, dilation), ceil_mode), x)

    def avg_pool(x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, *_: Any, **__: Any) -> Any:  # fmt: skip
        return new(pooled_shape(x.shape, pool_window(dims, kernel_size, stride, padding), ceil_mode), x)

    return avg_pool if average else max_pool


def pool_call_window(name: str, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, *args: Any, **kwargs: Any) -> Window:  # fmt: skip
    """The window of a functional pooling call named ``max_pool2d`` or ``avg_pool1d`` and the like."""
    dilation = kwargs.get("dilation", args[0] if args and name.startswith("max") else 1)
    return pool_window(int(name[-2]), kernel_size, stride, padding, dilation)


def _function_adaptive(dims: int) -> FunctionRule:
    return lambda x, output_size: adaptive(x, output_size, dims)


def _interpolate(x: Any, size: Any = None, scale_factor: Any = None, *args: Any, **kwargs: Any) -> Any:
    dims = x.dim() - 2
    if size is not None:
        target = tuple(int(n) for n in _tuple(size, dims))
    elif scale_factor is not None:
        target = tuple(int(n * s) for n, s in zip(x.shape[2:], _tuple(scale_factor, dims)))
    else:
        return NotImplemented
    return new((*x.shape[:2], *target), x)


def _pad(x: Any, pad: Any, *args: Any, **kwargs: Any) -> Any:
    shape = list(x.shape)
    for i in range(len(pad) // 2):
        shape[-1 - i] += int(pad[2 * i]) + int(pad[2 * i + 1])
    return new(shape, x)


_POINTWISE = """relu relu6 silu gelu hardswish hardsigmoid hardtanh sigmoid logsigmoid tanh elu selu celu leaky_relu mish
softplus softsign exp sqrt rsqrt neg abs log log1p expm1 sin cos erf square sign reciprocal floor ceil round clamp
clamp_min clamp_max threshold normalize""".split()
_BINARY = "add sub mul div true_divide divide multiply subtract pow maximum minimum rsub __rsub__ __rdiv__ __rpow__".split()


def _function_rules() -> dict[str, FunctionRule]:
    rules: dict[str, FunctionRule] = {name: _pointwise for name in _POINTWISE}
    rules |= {name: _binary for name in _BINARY}
    rules |= {name: _normalized for name in ("batch_norm", "group_norm", "instance_norm", "local_response_norm")}
    rules |= {"layer_norm": _function_layer_norm, "rms_norm": _function_layer_norm}
    rules |= {"softmax": _softmax, "log_softmax": _softmax}
    rules |= {name: _function_dropout for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")}
    rules |= {"cat": _cat, "concat": _cat, "concatenate": _cat, "mean": _reduce, "sum": _reduce}
    rules |= {"linear": _function_linear, "interpolate": _interpolate, "pad": _pad}
    for d in (1, 2, 3):
        rules |= {name: _function_conv(name) for name in (f"conv{d}d", f"conv_transpose{d}d")}
        rules |= {f"max_pool{d}d": _function_pool(d, False), f"avg_pool{d}d": _function_pool(d, True)}
        rules |= {f"adaptive_avg_pool{d}d": _function_adaptive(d)}
    return rules


FUNCTION_RULES = _function_rules()
"""Name of a torch function or tensor method to its rule."""

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
}
"""Name of a torch function to its MACs; the rest is priced under a dispatch mode the first time it is met."""

FREE_FUNCTIONS = frozenset(FUNCTION_RULES) - CONV_FUNCTIONS - {"linear"} | frozenset(
    """view reshape permute transpose flatten unflatten squeeze unsqueeze expand expand_as contiguous clone to float half
    bfloat16 double type_as detach t chunk split unbind stack __getitem__ __setitem__ view_as reshape_as narrow select
    size numel dim ndimension stride is_contiguous element_size is_floating_point is_complex __len__ argmax argmin max min
    amax amin all any roll flip repeat repeat_interleave movedim swapaxes zeros ones full empty arange linspace tensor
    as_tensor zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full masked_fill where
    pixel_shuffle pixel_unshuffle channel_shuffle unfold fold embedding one_hot topk sort meshgrid tril triu cumsum
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__ eq ne lt le gt ge logical_and logical_or logical_not __and__ __or__ __invert__
    type broadcast_to index_select gather scatter var std norm""".split()
)
"""Names of torch functions that have no MACs whatever their arguments."""
