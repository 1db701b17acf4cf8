"""What need not be traced twice: modules that are alike (`alike_key`), and questions about one value (`question`)."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..core.nested import Tree

FACTS = ("shape", "ndim", "dtype", "device", "is_cuda", "is_meta", "layout", "requires_grad")
_FACT_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "get_device")


def asks_for_facts(node: fx.Node) -> bool:
    """Whether a node reads a tensor's shape, dtype or the like, and none of its values."""
    if node.op == "call_method":
        return node.target in _FACT_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in FACTS


_IN_PLACE = frozenset(getattr(operator, name) for name in dir(operator) if name.startswith("__i") and name != "__inv__")
_PURE = frozenset(value for name, value in vars(operator).items() if callable(value) and not name.startswith("_")) - {
    operator.setitem,
    operator.delitem,
    *_IN_PLACE,
}


def question(node: fx.Node) -> Hashable | None:
    """A key that is equal for nodes which ask the same facts of the same tensors, as ``x.shape[0] > 1`` does twice;
    None of those that read values, and of others.
    """
    fact = asks_for_facts(node)
    if not fact and (node.op != "call_function" or node.target not in _PURE):
        return None
    read: list[Hashable] = []

    def leaf(each: Tree) -> None:
        if isinstance(each, fx.Node):
            read.append(each.name if fact else question(each))
        else:
            read.append((type(each), repr(each)))

    fx.node.map_aggregate((node.args, node.kwargs), leaf)
    return None if None in read or not read else (node.op, node.target, len(node.args), *node.kwargs, *read)


def may_change(kind: str, target: Any, args: Tree, kwargs: Tree) -> bool:
    """Whether a call may change the values or the shapes of what there is: in place, or by code that is not torch's."""
    if kind not in ("call_function", "call_method"):
        return kind == "call_module"
    name = target if isinstance(target, str) else str(getattr(target, "__name__", ""))
    if "out" in kwargs or any(each is True for each in (*args, *kwargs.values())):  # such as ``F.relu(x, True)``
        return True
    if kind == "call_method":
        return not hasattr(Tensor, name) or (name.endswith("_") and not name.endswith("__"))
    if target in _PURE or target is getattr:
        return False
    own = isinstance(target, nn.Module) or target in (setattr, delattr, operator.setitem, operator.delitem)
    room = str(getattr(target, "__module__", None) or "torch").partition(".")[0]
    return own or target in _IN_PLACE or name.endswith("_") or room not in ("torch", "math", "builtins", "_operator")


class _One:
    """An object that is equal to itself only."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _One) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)


def alike_key(module: nn.Module) -> Hashable:
    """A key that is equal for modules whose code does the same: equal classes, attributes and shapes of weights, of the
    module and of all in it. Objects that are no plain numbers, texts or containers have to be the same ones.
    """
    return _module(module, {})


def _module(module: nn.Module, seen: dict[int, int]) -> Hashable:
    if id(module) in seen:
        return "seen", seen[id(module)]
    seen[id(module)] = len(seen)
    attributes: list[Hashable] = []
    for name, value in vars(module).items():
        if name == "_modules":
            children = [(path, child and _module(child, seen)) for path, child in value.items()]
            attributes.append((name, *children))
        elif name in ("_parameters", "_buffers"):
            attributes.append((name, *((each, _weight(tensor, seen)) for each, tensor in value.items())))
        else:
            attributes.append((name, _attribute(value, seen)))
    return type(module), *attributes


def _weight(tensor: Tensor | None, seen: dict[int, int]) -> Hashable:
    if tensor is None:
        return None
    if id(tensor) in seen:
        return "seen", seen[id(tensor)]
    seen[id(tensor)] = len(seen)
    return type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad


def _attribute(value: Tree, seen: dict[int, int]) -> Hashable:
    kind = type(value)
    if kind in _PLAIN:
        return kind, repr(value)
    if kind is set:
        return kind, frozenset(_attribute(each, seen) for each in value)
    if kind not in (tuple, torch.Size, list, dict, OrderedDict):
        return _One(value)
    if kind in (list, dict, OrderedDict):  # which may hold themselves
        if id(value) in seen:
            return "seen", seen[id(value)]
        seen[id(value)] = len(seen)
    each = (*value, *value.values()) if isinstance(value, dict) else value
    return kind, *(_attribute(one, seen) for one in each)
