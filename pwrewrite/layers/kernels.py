"""Where the fused kernels may run: the guards, and the prepacked weights.

The kernels of ``torch.ops.mkldnn`` return right values for plain CPU tensors and nothing else: under autograd their
gradients are silently None, fake tensors get wrong strides or crash, function transforms and autocast do not know them,
and torch's FLOP counter takes them for nothing. So they run only where nobody is watching: `unwatched` says where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

Key = tuple[torch.Size, bool]
"""An input's shape, and whether there is no residual."""


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
    if x.layout is not torch.strided or weight.layout is not torch.strided or x.is_neg():
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
    """Prepacked forms of one weight: valid as long as weight and bias are the same tensors with the same values.

    A write through ``weight.data`` moves no version counter and is not seen until the layer changes its mode, its dtype
    or its device.

    Args:
        weight: The weight.
        bias: The bias.

    Attributes:
        weight: The weight.
        partitions: Compiled partitions by input shape and whether a residual is added; see `graphs`.
    """

    __slots__ = ("_bias", "_calls", "_facts", "_forms", "partitions", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self._bias, self._facts = weight, bias, _facts(weight, bias)
        self._forms: dict[Any, Tensor] = {}
        self._calls: dict[Key, int] = {}
        self.partitions: dict[Key, Partition] = {}

    def of(self, weight: Any, bias: Any) -> bool:
        """Whether these are the weight and the bias, unchanged."""
        return weight is self.weight and bias is self._bias and _facts(weight, bias) == self._facts

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

    def due(self, key: Key, calls: int) -> bool:
        """Counts a call; whether it is the one after which a partition is to be made."""
        if len(self._calls) >= 16 * _SHAPES:
            self._calls.clear()
        self._calls[key] = count = self._calls.get(key, 0) + 1
        return count == calls and len(self.partitions) < _SHAPES

    def add(self, key: Key, partition: Partition) -> None:
        """Keeps a partition, which has a packed weight of its own."""
        self.partitions[key] = partition
        self._forms.pop(key[0], None)


@dataclass(frozen=True, slots=True)
class Partition:
    """A compiled partition.

    Attributes:
        run: What computes it.
        threads: The number of threads for which it was made.
    """

    run: Callable[..., Tensor]
    threads: int


def _facts(weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    if bias is None:
        return weight._version, weight.data_ptr()
    return weight._version, weight.data_ptr(), bias._version, bias.data_ptr()
