"""The fused kernels of oneDNN on the CPU and of cuDNN on CUDA, and where they may run.

oneDNN's are operations of ``torch.ops.mkldnn``, which are private to torch and named in this file alone; where one
is gone or the machine has none, `CPU_DTYPES` is empty and fused layers run as plain ones. They return right values for
plain CPU tensors and nothing else: under autograd their gradients are silently None, fake tensors get wrong strides or
crash, function transforms and autocast do not know them, and torch's FLOP counter takes them for nothing. So they run
only where nobody is watching: `unwatched` says where.

On CUDA cuDNN knows ReLU only. A 1×1 in channels_last is, without a copy, the matrix of its input's positions, and
``torch._addmm_activation`` applies ReLU behind the product; its GELU is the tanh approximation, another function than
``F.gelu``. Kernels above 3×3 take the plain path, since a 7×7 in channels_last was 17 times slower through cuDNN's
fused kernel (pytorch#68506).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..core.errors import UsageError, first_line

_C: Any = torch._C
_mkldnn: Any = torch.ops.mkldnn
_functions_watch: Any = _C._len_torch_function_stack
_dispatch_watch: Any = _C._len_torch_dispatch_stack
_autocast: Any = _C._is_any_autocast_enabled
_jit_tracing: Any = _C._get_tracing_state
_transforms: Any = _C._functorch.peek_interpreter_stack
_PLAIN = (Tensor, nn.Parameter)

LOSES_NAN = frozenset({"relu", "relu6", "hardtanh", "hardsigmoid"})
"""Activations whose kernels return a number for NaN: a comparison picks the bound."""

EXPONENTIAL = frozenset({"swish", "gelu", "sigmoid", "tanh"})
"""Activations, as oneDNN calls them, that cost so much that `VECTOR` / 2 lanes filled with padding are felt."""

VECTOR = 16
"""Channels that oneDNN computes at once; of fewer it computes as many, and throws the rest away."""

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format with channels last, by number of axes."""


def in_channels_last(module: nn.Module) -> nn.Module:
    """A module with its 2-D and 3-D convolutions' tensors in the memory format with channels last."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() in FORMATS:
            tensor.data = tensor.data.contiguous(memory_format=FORMATS[tensor.dim()])
    return module


def in_last(x: Tensor) -> bool:
    """Whether a plain layer would compute an input, of four axes or five, in channels_last.

    With one channel, or one position, it is in both formats at once, and torch goes by its strides.
    """
    if not x.is_contiguous(memory_format=FORMATS[x.dim()]):
        return False
    if not x.is_contiguous():
        return True
    strides = x.stride()
    return strides[-1] >= strides[1] * x.shape[1] and x.numel() > x.shape[0]


def unwatched() -> bool:
    """Whether no mode, transform, tracer or autocast is active that a fused kernel would escape or break."""
    watched = _functions_watch() or _dispatch_watch() or _autocast()
    return not watched and _jit_tracing() is None and _transforms() is None and forward_ad._current_level < 0


def enabled() -> bool:
    """Whether torch's own switch for oneDNN is on."""
    return bool(_C._get_mkldnn_enabled())


def plain_input(x: object) -> bool:
    """Whether this is an ordinary dense tensor whose memory holds its values."""
    return type(x) is Tensor and x.layout is torch.strided and not x.is_neg()


def plain_tensors(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether these are ordinary tensors of one dtype and device that need no gradient."""
    if not plain_input(x) or type(weight) not in _PLAIN or weight is None:
        return False
    if x.dtype is not weight.dtype or x.device != weight.device or weight.layout is not torch.strided:
        return False
    if bias is not None and (type(bias) not in _PLAIN or bias.dtype is not x.dtype):
        return False
    if not torch.is_grad_enabled():
        return True
    return not (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))


def _supported() -> frozenset[torch.dtype]:
    """The dtypes that oneDNN computes in on this machine."""
    names = ("_convolution_pointwise", "_linear_pointwise", "_reorder_convolution_weight")
    dtypes = set[torch.dtype]()
    if _C._has_mkldnn and all(hasattr(_mkldnn, name) for name in names):
        dtypes.add(torch.float32)
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            with suppress(AttributeError, RuntimeError):
                if getattr(_mkldnn, f"_is_mkldnn_{name}_supported")():
                    dtypes.add(dtype)
    return frozenset(dtypes)


CPU_DTYPES = _supported()
"""Dtypes with a fused kernel on this CPU."""
_convolution: object = getattr(_mkldnn, "_convolution_pointwise", None)
_unary = cast("Callable[..., Tensor]", getattr(_convolution, "default", None))
_binary = cast("Callable[..., Tensor]", getattr(_convolution, "binary", None))
_product = cast("Callable[..., Tensor]", getattr(_mkldnn, "_linear_pointwise", None))
_select: Any = getattr(_C, "_select_conv_backend", None)
_layout: Any = getattr(_mkldnn, "_get_mkldnn_serialized_md", None)


class Geometry(NamedTuple):
    """How a convolution moves over its input, in the order in which its kernel takes that."""

    padding: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int


Act = tuple[str, list[float], str]
"""An activation as oneDNN takes it: its name there, its numbers, which approximation."""


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, how: Geometry, act: Act) -> Tensor:
    """``act(conv(x))`` in one kernel."""
    return _unary(x, weight, bias, *how, *act)


def convolve_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, how: Geometry, act: str | None
) -> Tensor:
    """``act(conv(x) + residual)`` in one kernel; the activation is ``relu`` or None."""
    return _binary(x, residual, weight, bias, *how, "add", 1.0, act, [], "")


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, act: Act) -> Tensor:
    """``act(x · Wᵀ + b)`` in one kernel."""
    return _product(x, weight, bias, *act)


def chosen(x: Tensor, weight: Tensor, bias: Tensor | None, how: Geometry) -> bool:
    """Whether torch itself takes oneDNN for a convolution; True where it does not say.

    For single small images in the contiguous format it does not, and is right: oneDNN brings them into blocks of
    channels first, which for a 1×1 takes longer than the convolution (1.4 to 7 times, measured).
    """
    if _select is None:
        return True
    settings = (how.stride, how.padding, how.dilation, False, [0] * len(how.stride), how.groups)
    return bool(_select(x, weight, bias, *settings) == _C._ConvBackend.Mkldnn)


def check_known(name: str, act: Act) -> None:
    """Raises a `UsageError` that names the row where oneDNN does not take an activation as its row says."""
    unit = torch.ones(1, 1, 1, 1, device="cpu")
    try:
        convolve(unit, unit, None, Geometry([0, 0], [1, 1], [1, 1], 1), act)
    except RuntimeError as error:
        message = f"oneDNN does not know the kernel of the operation {name!r}"
        where = f"the row {name!r} of pwrewrite.core.operations"
        expected = "a name, numbers and an algorithm that torch.ops.mkldnn._convolution_pointwise takes"
        got = f"{act[0]!r} with {act[1]} and {act[2]!r}: {first_line(error)}"
        hint = "correct the row, or leave its kernel out"
        raise UsageError(message, where=where, expected=expected, got=got, hint=hint) from error


def pack(weight: Tensor, how: Geometry, shape: Sequence[int]) -> tuple[bytes, Tensor]:
    """A weight in the layout that a convolution computes in for an input shape, and that layout's name."""
    with torch.no_grad():
        packed: Tensor = _mkldnn._reorder_convolution_weight(weight.detach(), *how, list(shape))
        return (b"" if _layout is None else _layout(packed).numpy().tobytes()), packed


CUDA_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""Dtypes that the kernels on CUDA take."""
LARGEST_ON_CUDA = 3  # kernel size above which cuDNN's fused kernel is not taken


def multiply_on_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``relu(x · Wᵀ + b)`` over the last axis."""
    out: Tensor = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t())
    return out.view(*x.shape[:-1], weight.shape[0])


def convolve_on_cuda(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, how: Geometry) -> Tensor | None:
    """``relu(conv(x) + residual)`` by cuDNN; None where torch was built without it."""
    if not torch._C._has_cudnn or not torch.backends.cudnn.enabled:
        return None
    settings = (how.stride, how.padding, how.dilation, how.groups)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *settings)
    if x.is_contiguous(memory_format=torch.channels_last):
        residual = residual.contiguous(memory_format=torch.channels_last)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *settings)
