"""Tensors in nested Python containers: finding them, rebuilding the containers around others, copying models.

A container is opened one level at a time: tuples, lists, dicts and slices, mappings and sequences of the user's own,
whatever is registered with ``torch.utils._pytree`` (many libraries register their outputs; it is private to torch, used
here only, and done without where it is gone), and dataclasses and other plain objects by their attributes. A container
that holds itself is not followed around.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from operator import setitem
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .module_copy import copy_module

Tree = Any
"""Tensors and anything else, alone or in nested containers."""

Args = tuple[Tree, ...]

Kwargs = dict[str, Tree]

_SCALARS = frozenset((int, float, bool, str, type(None), type(Ellipsis), torch.dtype, torch.device))
_REGISTERED: Mapping[type, _pytree.NodeDef] = getattr(_pytree, "SUPPORTED_NODES", {})
_CLOSED = ("torch", "numpy", "builtins")
"""Packages whose objects are not opened by their attributes."""

_M = TypeVar("_M", bound=nn.Module)
_Opened = tuple[Mapping[Any, Tree], Callable[[Iterable[Tree]], Tree]]
"""One level of a container: its items by key, and how it is put together around others."""


def _open(value: Tree) -> _Opened | None:
    """Opens a container; None for anything that holds nothing."""
    kind = type(value)
    put: Callable[[Tree, str, Tree], None] = setitem
    if isinstance(value, slice):
        return {"start": value.start, "stop": value.stop, "step": value.step}, lambda new: slice(*new)
    if isinstance(value, tuple):
        return dict(enumerate(value)), getattr(kind, "_make", kind)
    if isinstance(value, (list, Mapping)):
        items = dict(enumerate(value) if isinstance(value, list) else value.items())
    elif (registered := _REGISTERED.get(kind)) is not None:
        children, context = registered.flatten_fn(value)
        return dict(enumerate(children)), lambda new: registered.unflatten_fn(list(new), context)
    else:
        items, put = _attributes(value), object.__setattr__  # whether frozen or not
        if not items:
            return None

    def refilled(new: Iterable[Tree]) -> Tree:
        same = copy(value)
        for key, item in zip(items, new):
            put(same, key, item)
        return same

    return items, refilled


def _attributes(value: Tree) -> dict[Any, Tree]:
    """The attributes of a plain object: one that is no function, class or module, and not torch's or NumPy's."""
    kind = type(value)
    if kind.__module__.partition(".")[0] in _CLOSED or callable(value) or isinstance(value, nn.Module):
        return {}
    slots = [name for base in kind.__mro__ for name in vars(base).get("__slots__", ()) if name[:2] != "__"]
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def tensors_of(value: object) -> list[Tensor]:
    """All tensors in nested containers, in order."""
    tensors: list[Tensor] = []
    _collect(value, tensors, ())
    return tensors


def _collect(value: Tree, tensors: list[Tensor], above: tuple[int, ...]) -> None:
    """Appends the tensors in ``value``; ``above`` are the containers that it is in."""
    kind = type(value)
    if isinstance(value, Tensor):
        tensors.append(value)
    elif kind is tuple or kind is list:  # the usual case, without a detour
        for item in value:
            if isinstance(item, Tensor):
                tensors.append(item)
            elif type(item) not in _SCALARS:
                _collect(item, tensors, above)
    elif kind not in _SCALARS and id(value) not in above:
        opened = _open(value)
        if opened is not None:
            for item in opened[0].values():
                _collect(item, tensors, (*above, id(value)))


def is_plain(value: object) -> bool:
    """Whether all tensors lie in plain tuples, lists and dicts, and not in classes of the user's or of a library."""
    if isinstance(value, Tensor):
        return True
    if type(value) in (tuple, list, dict):
        return all(map(is_plain, value.values() if isinstance(value, dict) else value))  # type: ignore[call-overload]
    return not tensors_of(value)


def hash_tensors(value: object) -> str:
    """A hash of all tensors in nested containers, in order, 64 hex digits: dtypes, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors_of(value):
        digest.update(f"{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def map_tensors(value: Tree, convert: Callable[[Tensor], Tree], *, plain: bool = False) -> Tree:
    """Rebuilds nested containers with every tensor converted; what holds no tensor stays the object that it is.

    With ``plain``, containers with keys become plain dicts and others plain tuples and lists, as in a graph.
    """
    return _map(value, convert, plain, ())


def _map(value: Tree, convert: Callable[[Tensor], Tree], plain: bool, above: tuple[int, ...]) -> Tree:
    kind = type(value)
    if isinstance(value, Tensor):
        return convert(value)
    if kind is tuple or kind is list:
        return kind([_map(item, convert, plain, above) for item in value])
    if kind in _SCALARS or id(value) in above:
        return value
    opened = _open(value)
    if opened is None:
        return value
    old, rebuild = opened
    items = {key: _map(item, convert, plain, (*above, id(value))) for key, item in old.items()}
    if all(items[key] is item for key, item in old.items()) and not (plain and tensors_of(value)):
        return value
    if plain and not isinstance(value, slice):
        return next((kind(items.values()) for kind in (tuple, list) if isinstance(value, kind)), items)
    return rebuild(items.values())


def to_meta(t: Tensor) -> Tensor:
    """A meta tensor of the same shape, strides and dtype; the tensor itself where it is one."""
    return t if t.is_meta else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def deep_copy(model: _M, memo: dict[int, object] | None = None) -> _M:
    """A deep copy of a model, also of one that holds tensors with a gradient history, which ``copy.deepcopy`` refuses.

    Those are what a run left behind, such as what weight norm of the older kind computes; the copy has their values.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _SCALARS or name in ("_parameters", "_modules") or (issubclass(kind, (dict, set)) and not value):
                continue
            for tensor in tensors_of(value):
                if not tensor.is_leaf and id(tensor) not in memo:
                    memo[id(tensor)] = tensor.detach().clone()
    return copy_module(model, memo)
