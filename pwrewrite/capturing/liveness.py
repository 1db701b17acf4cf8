"""Births and deaths of activation storages while a model runs.

A storage is born when an operation makes it and dies with the last tensor object that shares it. Tensors are watched
through weak references, so that deaths come when Python's reference counts bring them, as in an ordinary run.
"""

from __future__ import annotations

import weakref

from torch import Tensor

from .records import MemoryEvent

_NO_STORAGE = (NotImplementedError, RuntimeError, ValueError)
"""What wrappers, sparse and uninitialized tensors raise that have none."""


class _Birth(weakref.ref[Tensor]):
    """A weak reference that remembers which storage its tensor belongs to."""

    __slots__ = ("key",)
    key: int


class _Storage:
    """A live storage: who made it, how many tensor objects share it, how large it is."""

    __slots__ = ("nbytes", "node", "users")

    def __init__(self, node: str, nbytes: int) -> None:
        self.node, self.nbytes, self.users = node, nbytes, 0


class Liveness:
    """Watches tensors and logs births and deaths in ``events``."""

    def __init__(self) -> None:
        self.events: list[MemoryEvent] = []
        self._storages: dict[int, _Storage] = {}
        self._births: set[_Birth] = set()

    def watch(self, t: Tensor, node: str, *, known: bool) -> str | None:
        """Starts to watch a tensor that ``node`` made; ``known`` says that this object is watched already.

        Returns the node that made its storage, where that is another tensor's; None for a new storage.
        """
        try:
            untyped = t.untyped_storage()
        except _NO_STORAGE:
            return None
        key = untyped._cdata
        storage = self._storages.get(key)
        if storage is None:
            nbytes = untyped.nbytes()
            storage = self._storages[key] = _Storage(node, nbytes)
            if nbytes:
                self.events.append(MemoryEvent(node, nbytes))
            maker = None
        else:
            maker = storage.node or node
            if known:
                return maker
        storage.users += 1
        birth = _Birth(t, self._died)
        birth.key = key
        self._births.add(birth)
        return maker

    def maker(self, t: Tensor) -> str:
        """Name of the node that made a tensor's storage; empty where none did."""
        try:
            storage = self._storages.get(t.untyped_storage()._cdata)
        except _NO_STORAGE:
            return ""
        return "" if storage is None else storage.node

    def pass_by(self, node: str, nbytes: int) -> None:
        """Notes memory that an operation holds beside its result while it runs."""
        if nbytes:
            self.events.append(MemoryEvent(node, nbytes))
            self.events.append(MemoryEvent(node, -nbytes))

    def ignore(self, t: Tensor) -> None:
        """Takes a tensor's storage for no activation: it belongs to the model or to the user's code."""
        try:
            key = t.untyped_storage()._cdata
        except _NO_STORAGE:
            return
        self._storages.setdefault(key, _Storage("", 0)).users += 1

    def _died(self, birth: _Birth) -> None:
        self._births.discard(birth)
        storage = self._storages.get(birth.key)
        if storage is not None:
            storage.users -= 1
            if not storage.users:
                del self._storages[birth.key]
                if storage.nbytes:
                    self.events.append(MemoryEvent(storage.node, -storage.nbytes))
