"""Results of torch functions: by rule, on ``meta``, or from values that are there; with MACs where they have any."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.cost import PricingMode
from ..core.nested import Args, Kwargs, Tree, map_tensors
from ..core.operations import BY_FUNCTION, FREE_FUNCTIONS
from . import functions
from .origins import NeedsValues, Origins
from .shapes import FUNCTION_RULES

_IN_PLACE = frozenset(FUNCTION_RULES) | {"fill", "zero", "copy", "masked_fill"}
"""Functions whose in-place form (``add_``) returns its first argument and nothing new."""


Function = Callable[..., Any]


class Result(NamedTuple):
    """What a function returned, its MACs, and what of it has no price."""

    out: Tree
    macs: int = 0
    unpriced: tuple[str, ...] = ()


class Evaluator:
    """Finds out what torch functions return, and remembers which were found to have no MACs."""

    def __init__(self) -> None:
        self._free: set[object] = set()

    def result(self, func: Function, name: str, args: Args, kwargs: Kwargs, on_meta: bool) -> Result:
        """What a function returns, its MACs and what of it has no price; arguments are as tensors stand for them here.

        ``name`` is empty where no rule holds, as for custom operations and wrappers of ``vmap``.
        """
        if not name:
            return self._priced(func, args, kwargs)
        out: Tree = NotImplemented
        if on_meta:
            rule = FUNCTION_RULES.get(name)
            if rule is not None:
                out = rule(*args, **kwargs)
            elif name[-1] == "_" and name[-2] != "_" and name[0] != "_" and name[:-1] in _IN_PLACE and args:
                out = args[0]
        row = BY_FUNCTION.get(name)
        macs_of = None if row is None else row.macs
        if out is NotImplemented and macs_of is None and name not in FREE_FUNCTIONS and func not in self._free:
            return self._priced(func, args, kwargs, remember=name not in functions.SOMETIMES_PRODUCTS)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        return Result(out, 0 if macs_of is None else macs_of(args, kwargs, out))

    def _priced(self, func: Function, args: Args, kwargs: Kwargs, *, remember: bool = False) -> Result:
        if func is getattr:
            return Result(func(*args, **kwargs))
        with PricingMode() as pricing:
            out = func(*args, **kwargs)
        if remember and not pricing.macs and not pricing.unpriced and not isinstance(func, FunctionType):
            self._free.add(func)
        return Result(out, pricing.macs, tuple(pricing.unpriced))


def read(func: Function, name: str, args: Args, kwargs: Kwargs, tensors: list[Tensor], origins: Origins) -> object:
    """Reads values where all of them are the user's own, as a learnt scalar's are; else raises `NeedsValues`."""
    if any(t.is_meta or (origins.overwritten(t) and not isinstance(t, nn.Parameter)) for t in tensors):
        raise NeedsValues(f"{name} reads the values of a tensor of shape {tuple(tensors[0].shape)}")
    return func(*map_tensors(args, Tensor.detach), **map_tensors(kwargs, Tensor.detach))


def redirect(
    func: Function, name: str, args: Args, kwargs: Kwargs, device: torch.device | str
) -> tuple[Function, Args, Kwargs]:
    """The function to call and its arguments, so that what code moves to a device goes to where values live here."""
    if name in functions.DEVICE_METHODS:
        return Tensor.to, (args[0], device), {}
    rest = tuple(torch.device(device) if functions.is_device(a) else a for a in args[1:])
    return func, (*args[:1], *rest), {**kwargs, "device": device} if kwargs.get("device") is not None else kwargs


def without_masks(index: object, values: object, origins: Origins) -> object:
    """An index on ``meta`` whose boolean masks, where their values are known, are the positions they select."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(p, Tensor) and p.dtype == torch.bool for p in parts):
        return values
    positions: list[object] = []
    for part, value in zip(parts, values if isinstance(values, tuple) else (values,)):
        mask = origins.value(part) if isinstance(part, Tensor) and part.dtype == torch.bool else None
        if mask is None or mask.is_meta:
            positions.append(value)
        else:
            positions += [i.to("meta") for i in mask.nonzero(as_tuple=True)]
    return tuple(positions)
