"""Tensors in nested Python containers: finding them, and rebuilding the containers around others."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_PLURAL = (tuple, list)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts, slices and dataclasses, in order."""
    found: list[Tensor] = []
    collect(value, found)
    return found


def collect(value: Any, found: list[Tensor]) -> None:
    """Appends all tensors in ``value`` to ``found``."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, _PLURAL):
        for item in value:
            if isinstance(item, Tensor):
                found.append(item)
            elif type(item) not in _SCALARS:
                collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            collect(item, found)
    elif isinstance(value, slice):
        collect((value.start, value.stop, value.step), found)
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            collect(getattr(value, f.name), found)


_SCALARS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))


def map_tensors(value: Any, convert: Callable[[Tensor], Any], *, plain: bool = False) -> Any:
    """Rebuilds nested containers with every tensor converted.

    Args:
        value: Tuples, lists, dicts, slices and dataclasses of tensors and other things.
        convert: What becomes of a tensor.
        plain: Whether named tuples become tuples, and dicts and dataclasses plain dicts, as in a graph's arguments.
    """
    if isinstance(value, Tensor):
        return convert(value)
    if type(value) in _SCALARS:
        return value
    if isinstance(value, tuple):
        items = [map_tensors(item, convert, plain=plain) for item in value]
        if hasattr(value, "_fields") and not plain:
            return type(value)(*items)
        return tuple(items)
    if isinstance(value, list):
        return [map_tensors(item, convert, plain=plain) for item in value]
    if isinstance(value, dict):
        mapped = {key: map_tensors(item, convert, plain=plain) for key, item in value.items()}
        if plain or type(value) is dict:
            return mapped
        same = copy(value)
        same.update(mapped)
        return same
    if isinstance(value, slice):
        return slice(*(map_tensors(item, convert, plain=plain) for item in (value.start, value.stop, value.step)))
    if is_dataclass(value) and not isinstance(value, type):
        mapped = {f.name: map_tensors(getattr(value, f.name), convert, plain=plain) for f in fields(value)}
        if plain:
            return mapped
        rebuilt = copy(value)
        for name, item in mapped.items():
            object.__setattr__(rebuilt, name, item)
        return rebuilt
    return value


def to_meta(t: Tensor) -> Tensor:
    """A meta tensor of the same shape, strides and dtype; the tensor itself where it is one."""
    if t.is_meta:
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
