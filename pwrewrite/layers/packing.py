"""Packed weights and compiled functions: what is held to be fast, how much of it, and until when.

oneDNN computes in a layout of its own, into which a weight is packed once; input shapes that want the same layout share
one packed form. A compiled function (a layer as a partition, a whole model) packs the weights again, for one shape.
Those are held in a `Pool`, which bounds their bytes in the whole process: the ones that were not used for longest go
first, and where all are in use, no further one is made.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

_SHAPES = 4  # input shapes for which a layer asks for a layout; from then on the last packed form serves all
_LAYOUTS = 2  # layouts in which a layer's weight is held
_IN_USE = 1.0  # seconds since its last call for which a compiled function is in use and stays
_PATIENCE = 60.0  # seconds that a fork waits for a lock; then the child gets a fresh one


class ForkSafeLock:
    """A reentrant lock: a fork waits until it is free, so that no child finds it held by a thread that it has not.

    Servers and data loaders fork while other threads work; what the lock guards would be half done in the child.
    """

    def __init__(self) -> None:
        self._lock, self._waited = threading.RLock(), False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._after_in_child)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _before(self) -> None:
        self._waited = self._lock.acquire(timeout=_PATIENCE)

    def _after(self) -> None:
        if self._waited:
            self._lock.release()

    def _after_in_child(self) -> None:
        if not self._waited:
            self._lock = threading.RLock()
        self._after()


@dataclass(eq=False)
class Compiled:
    """A function compiled for one shape and number of threads, the bytes of weights that it holds, and its last use."""

    run: Callable[..., Any]
    threads: int
    nbytes: int
    used: float = field(default_factory=time.monotonic)


class Holder(Protocol):
    """What has compiled functions by shape, and is itself held by nobody for their sake."""

    compiled: dict[Any, Any]


class Pool:
    """A bound on the bytes that compiled functions hold in the whole process; a single one may be larger."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._holders: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = ForkSafeLock()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(entry.nbytes for _, _, entry in self._entries())

    def _entries(self) -> list[tuple[Holder, Hashable, Compiled]]:
        return [(holder, key, entry) for holder in self._holders for key, entry in list(holder.compiled.items())]

    def admit(self, holder: Holder, key: Hashable, entry: Compiled) -> bool:
        """Holds a function under a key of its holder, and lets go the oldest ones; False where all are in use."""
        with self._lock:
            excess, leaving = self.nbytes + entry.nbytes - self.limit, []
            for owner, old, held in sorted(self._entries(), key=lambda item: item[2].used):
                if excess <= 0:
                    break
                if time.monotonic() - held.used < _IN_USE:
                    return False
                leaving.append((owner, old))
                excess -= held.nbytes
            for owner, old in leaving:
                owner.compiled.pop(old, None)
            self._holders.add(holder)
            holder.compiled[key] = entry
            return True


PARTITIONS = Pool(128 * 2**20)
"""Layers as partitions."""

Key = tuple[torch.Size, bool]
"""An input's shape, and whether there is no residual."""


class Packed:
    """Packed forms of one weight: valid as long as weight and bias are the same tensors with the same values.

    A write through ``weight.data`` moves no version counter and is not seen until the layer changes its mode, its dtype
    or its device. ``compiled`` holds partitions by input shape and whether a residual is added.
    """

    __slots__ = ("__weakref__", "_bias", "_calls", "_facts", "_forms", "compiled", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self._bias, self._facts = weight, bias, _facts(weight, bias)
        self._forms: dict[torch.Size, tuple[bytes, Tensor]] = {}
        self._calls: dict[Key, int] = {}
        self.compiled: dict[Key, Compiled] = {}

    def of(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether these are the weight and the bias, unchanged."""
        return weight is self.weight and bias is self._bias and _facts(weight, bias) == self._facts

    def form(self, shape: torch.Size, pack: Callable[[], tuple[bytes, Tensor]]) -> Tensor:
        """The weight packed for an input shape; ``pack`` makes it, and names the layout."""
        form = self._forms.get(shape)
        if form is None:
            if len(self._forms) >= _SHAPES:
                return next(reversed(self._forms.values()))[1]
            layout, packed = pack()
            held = dict(self._forms.values())
            if layout not in held and len(held) >= _LAYOUTS:
                layout = next(reversed(held))
            form = self._forms[shape] = layout, held.get(layout, packed)
        return form[1]

    def due(self, key: Key, calls: int) -> bool:
        """Counts a call; whether it is the one after which a partition is to be made."""
        if len(self._calls) >= 16 * _SHAPES:
            self._calls.clear()
        self._calls[key] = count = self._calls.get(key, 0) + 1
        return count == calls and len(self.compiled) < _SHAPES

    def add(self, key: Key, partition: Compiled) -> None:
        """Keeps a partition, where there is room; its shape then needs no packed form."""
        if PARTITIONS.admit(self, key, partition):
            self._forms.pop(key[0], None)


def _facts(weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    if bias is None:
        return weight._version, weight.data_ptr()
    return weight._version, weight.data_ptr(), bias._version, bias.data_ptr()
