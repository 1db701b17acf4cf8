"""Sizes of tensors of every kind, also of those that are no plain block of memory; `conventions` says how to count."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cache
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_PLAIN = (Tensor, nn.Parameter)
_ORDINARY = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64))
_CONVENTIONS = {
    "sparse": "sparse tensors: a product counts the stored elements, bytes are those of indices and values",
    "uninitialized": "uninitialized parameters have no shape yet and count as nothing",
    "quantized": "quantized tensors: what is computed with them has no formula and is unpriced",
    "nested": "nested tensors: sizes are those of all parts together",
    "complex": "complex tensors: a product of two complex numbers counts as one multiply-accumulate",
}


def kind_of(t: Tensor) -> str:
    """``sparse``, ``uninitialized``, ``quantized``, ``nested``, ``complex``, or empty for a plain tensor."""
    if t.dtype in _ORDINARY and type(t) in _PLAIN and t.layout is torch.strided and not t.is_nested:
        return ""
    if is_lazy(t):
        return "uninitialized"
    if t.is_nested:
        return "nested"
    if t.layout is not torch.strided:
        return "sparse"
    return "quantized" if t.is_quantized else "complex" if t.is_complex() else ""


def all_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the kind of each is empty."""
    dtypes, layouts = set(map(attrgetter("dtype"), tensors)), set(map(attrgetter("layout"), tensors))
    ordinary = dtypes <= _ORDINARY and layouts <= {torch.strided} and set(map(type, tensors)) <= {*_PLAIN}
    return ordinary and not any(map(attrgetter("is_nested"), tensors))


def has_shape_only(t: Tensor) -> bool:
    """Whether a tensor on ``meta`` can stand for one."""
    return kind_of(t) in ("", "complex")


def element_count(t: Tensor) -> int:
    """Elements of a tensor, for a sparse one as if it were dense."""
    return 0 if is_lazy(t) else t.numel()


def byte_count(t: Tensor) -> int:
    """Bytes that a tensor holds."""
    if t.layout is torch.strided or t.is_nested:
        return t.nbytes
    t = t.detach()
    if t.layout is torch.sparse_coo:
        parts = [t._indices(), t._values()]
    elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [t.crow_indices(), t.col_indices(), t.values()]
    else:
        parts = [t.ccol_indices(), t.row_indices(), t.values()]
    return sum(part.nbytes for part in parts)


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def conventions(kinds: Set[str]) -> list[str]:
    """How tensors of these kinds count."""
    return [text for kind, text in _CONVENTIONS.items() if kind in kinds]
