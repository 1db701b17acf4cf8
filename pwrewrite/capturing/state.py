"""Leaving a model as it was: a snapshot of everything that running its forward can change, and its restoration.

Restored are every module's ``__dict__`` (by identity: training flags, hooks, replaced submodules and new attributes,
also of modules in plain lists), the contents of plain containers in it, the values of its tensors where real values
ran, and the random states of torch, Python and NumPy. Objects that the model only refers to (a config object's
attributes) are not followed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..core.files import same_directory
from ..core.nested import Tree
from ..core.random_state import keeping_random_state
from .inventory import Inventory
from .tensors import kind_of

CONTAINERS = (dict, list, set, deque)
_HELD = frozenset((dict, OrderedDict, defaultdict, Counter, list, set, deque))
_PLAIN = frozenset((bool, int, float, str, tuple, type(None)))
_DEPTH = 3


def contents(value: Tree, copies: list[tuple[Tree, Tree]], depth: int) -> None:
    """Appends ``(container, shallow copy)`` for ``value`` and the containers in it."""
    copies.append((value, value.copy()))
    if depth and value:
        for item in value.values() if isinstance(value, dict) else value:
            if type(item) not in _PLAIN and isinstance(item, CONTAINERS):
                contents(item, copies, depth - 1)


def refill(container: Tree, saved: Tree) -> None:
    """Gives a container its earlier contents."""
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(saved)
    else:
        container.extend(saved)


def same(container: Tree, saved: Tree) -> bool:
    """Whether a container holds the very objects that it held."""
    if len(container) != len(saved):
        return False
    if isinstance(container, dict):
        return all(map(is_, container, saved)) and all(map(is_, container.values(), saved.values()))
    if isinstance(container, set):
        return bool(container == saved)
    return all(map(is_, container, saved))


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Sets an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Kept:
    """A tensor with its values, however forward may change them: in place, or by another ``data``."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.data, self.values = tensor, tensor.data, tensor.detach().clone()

    def put_back(self) -> None:
        """Puts the values back where they changed."""
        with torch.no_grad():
            if kind_of(self.tensor) in ("sparse", "nested"):  # it has no place of its own, and no comparison
                self.tensor.copy_(self.values)
                return
            if self.tensor.data_ptr() != self.data.data_ptr() or self.tensor.shape != self.data.shape:
                self.tensor.data = self.data
            if not torch.equal(self.tensor, self.values):
                self.tensor.copy_(self.values)


@contextmanager
def untouched(inventory: Inventory, *, values: bool) -> Iterator[None]:
    """Restores a model, the random states and the working directory on leaving, whatever happened in between.

    ``values`` says that real values will run through the model, so that forward may write into its tensors, too.
    """
    dicts: list[tuple[dict[str, Tree], dict[str, Tree]]] = []
    containers: list[tuple[Tree, Tree]] = []
    empty: list[Tree] = []
    strays = inventory.strays.values()
    for module in (*inventory.modules, *strays):
        attributes = module.__dict__
        dicts.append((attributes, attributes.copy()))
        for value in attributes.values():
            kind = type(value)
            if kind in _HELD or (kind not in _PLAIN and isinstance(value, CONTAINERS)):
                if value:
                    contents(value, containers, _DEPTH)
                else:
                    empty.append(value)
    owned = {id(t): t for _, t in inventory.owned.values()} if values else {}
    for stray in strays if values else ():
        owned |= {id(t): t for t in (*stray.parameters(recurse=False), *stray.buffers(recurse=False))}
    tensors = [_Kept(t) for t in owned.values() if not t.is_meta and not is_lazy(t)]
    try:
        with same_directory(), keeping_random_state():
            yield
    finally:
        for attributes, saved in dicts:
            if not same(attributes, saved):
                attributes.clear()
                attributes.update(saved)
        for container, held in containers:
            if not same(container, held):
                refill(container, held)
        if any(empty):
            for container in empty:
                container.clear()
        for tensor in tensors:
            tensor.put_back()
