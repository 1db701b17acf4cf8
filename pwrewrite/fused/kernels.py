"""Where the fused kernels may run: the guards, and the prepacked weights.

The kernels of ``torch.ops.mkldnn`` return right values for plain CPU tensors and nothing else: under autograd their
gradients are silently None, fake tensors get wrong strides or crash, function transforms and autocast do not know them,
and torch's FLOP counter takes them for nothing. So they run only where nobody is watching: `unwatched` says where.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_C: Any = torch._C
_functions_watch: Any = _C._len_torch_function_stack
_dispatch_watch: Any = _C._len_torch_dispatch_stack
_autocast: Any = _C._is_any_autocast_enabled
_jit_tracing: Any = _C._get_tracing_state
_transforms: Any = _C._functorch.peek_interpreter_stack
_PLAIN = (Tensor, nn.Parameter)
_SHAPES = 4
"""Input shapes for which a layer keeps packed weights; from then on the last packing serves all."""


def unwatched() -> bool:
    """Whether no mode, transform, tracer or autocast is active that a fused kernel would escape or break."""
    return (
        not _functions_watch()
        and not _dispatch_watch()
        and not _autocast()
        and _jit_tracing() is None
        and _transforms() is None
        and forward_ad._current_level < 0
    )


def plain_tensors(x: Any, weight: Any, bias: Any) -> bool:
    """Whether these are ordinary tensors of one dtype and device that need no gradient."""
    if type(x) is not Tensor or type(weight) not in _PLAIN or x.dtype is not weight.dtype or x.device != weight.device:
        return False
    if x.layout is not torch.strided or weight.layout is not torch.strided:
        return False
    if bias is not None and (type(bias) not in _PLAIN or bias.dtype is not x.dtype):
        return False
    if not torch.is_grad_enabled():
        return True
    return not (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))


def _supported() -> frozenset[torch.dtype]:
    """The dtypes that oneDNN computes in on this machine."""
    if not torch._C._has_mkldnn:
        return frozenset()
    mkldnn: Any = torch.ops.mkldnn
    found = {torch.float32}
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")):
        try:
            if getattr(mkldnn, name)():
                found.add(dtype)
        except (AttributeError, RuntimeError):
            continue
    return frozenset(found)


CPU_DTYPES = _supported()
"""Dtypes with a fused kernel on this CPU."""


class Packed:
    """Prepacked forms of one weight: valid as long as the weight is the same tensor with the same values.

    A write through ``weight.data`` moves no version counter and is not seen until the layer changes its mode, its dtype
    or its device.

    Args:
        weight: The weight.
    """

    __slots__ = ("_forms", "_pointer", "_version", "_weight")

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._version, self._pointer = weight, weight._version, weight.data_ptr()
        self._forms: dict[Any, Tensor] = {}

    def of(self, weight: Tensor) -> bool:
        """Whether this is the weight, unchanged."""
        return weight is self._weight and weight._version == self._version and weight.data_ptr() == self._pointer

    def get(self, shape: Any) -> Tensor | None:
        """The packed weight for an input shape; None where it has to be made."""
        found = self._forms.get(shape)
        if found is None and len(self._forms) >= _SHAPES:
            return next(reversed(self._forms.values()))
        return found

    def put(self, shape: Any, packed: Tensor) -> Tensor:
        """Keeps a packed weight for an input shape."""
        self._forms[shape] = packed
        return packed
