"""Copying modules as `copy.deepcopy` does, in less than half of its time.

``deepcopy`` takes every attribute of every module through several calls, though nearly all are numbers and empty
containers of hooks. What is plain is copied here: modules that leave copying and pickling to Python, their dicts,
parameters, and tensors that are a whole storage. Anything else goes to ``deepcopy``, with the same memo, so that what
was shared is shared in the copy.
"""

from __future__ import annotations

import copyreg
import gc
from collections import OrderedDict
from copy import deepcopy
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_M = TypeVar("_M", bound=nn.Module)

_ATOMS = frozenset((int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device))
"""Types of which ``deepcopy`` returns the object itself, or an equal one that cannot change."""

_PLAIN: dict[str, int] = {}
_ORDERED: OrderedDict[str, int] = OrderedDict()
_VIEWS = {type(getattr(made, name)()): name for made in (_PLAIN, _ORDERED) for name in ("keys", "values", "items")}
"""What a dict gives of its keys and values, which a module may hold (``self.names = self.layers.keys()``)."""


def copy_module(module: _M, memo: dict[Any, Any]) -> _M:
    """A deep copy of a module; ``memo`` is that of ``deepcopy``: by ``id``, what has been copied."""
    kind: Any = type(module)
    if id(module) in memo or getattr(module, "__deepcopy__", None) is not None or not _left_to_python(kind):
        made = deepcopy(module, memo)
        for theirs, own in zip(module.modules(), made.modules()):
            own.__dict__["training"] = theirs.training  # some classes make theirs anew, in training mode
        return made
    copied: _M = kind.__new__(kind)
    memo[id(module)] = copied
    state: dict[str, Any] = kind.__getstate__(module)
    kind.__setstate__(copied, {k: v if type(v) in _ATOMS else _copy(v, memo) for k, v in state.items()})
    return copied


@cache
def _left_to_python(kind: Any) -> bool:
    """Whether a class of modules is copied by its ``__dict__`` alone."""
    return (
        all(getattr(kind, name) is getattr(object, name) for name in ("__reduce_ex__", "__reduce__", "__new__"))
        and kind.__getstate__ is getattr(nn.Module, "__getstate__")  # noqa: B009
        and not any(hasattr(kind, name) for name in ("__getnewargs__", "__getnewargs_ex__"))
        and not any(vars(base).get("__slots__") for base in kind.__mro__)
        and not issubclass(kind, (list, dict))
        and kind not in copyreg.dispatch_table
    )


def _copy(value: Any, memo: dict[Any, Any]) -> Any:
    known = memo.get(id(value))
    if known is not None:
        return known
    kind = type(value)
    if kind is dict or (kind is OrderedDict and not vars(value)):
        copied = memo[id(value)] = kind()
        if value:  # most are empty: hooks
            for key, item in value.items():
                name = key if type(key) is str else deepcopy(key, memo)
                copied[name] = item if type(item) in _ATOMS else _copy(item, memo)
        return copied
    if (kind is tuple or kind is frozenset) and _ATOMS.issuperset(map(type, value)):
        return value
    if (kind is set or kind is list) and _ATOMS.issuperset(map(type, value)):
        copied = memo[id(value)] = value.copy()
        return copied
    if kind is Tensor:
        return _copy_tensor(value, memo)
    if kind in _VIEWS:  # which deepcopy refuses
        (viewed,) = gc.get_referents(value)
        return getattr(_copy(viewed, memo), _VIEWS[kind])()
    if kind is nn.Parameter and not vars(value):
        parameter = memo[id(value)] = nn.Parameter(value.data.clone(), value.requires_grad)  # as it copies itself
        return parameter
    return copy_module(value, memo) if isinstance(value, nn.Module) else deepcopy(value, memo)


def _copy_tensor(t: Tensor, memo: dict[Any, Any]) -> Tensor:
    """A copy of a tensor that is all of its storage, and the first there: ``deepcopy`` finds its copy in the memo."""
    plain = t.layout is torch.strided and t.device.type in ("cpu", "cuda") and t.is_contiguous() and not t.is_quantized
    if not plain or t.requires_grad or t.dtype.is_complex or vars(t):
        return deepcopy(t, memo)
    storage, storages = t.untyped_storage(), memo.setdefault("torch", {})
    if storage._cdata in storages or storage.nbytes() != t.nbytes:
        return deepcopy(t, memo)
    copied = memo[id(t)] = t.clone()
    storages[storage._cdata] = copied.untyped_storage()
    return copied
