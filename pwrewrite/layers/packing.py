"""Packed weights and compiled functions: what is held to be fast, how much of it, and until when.

oneDNN computes in a layout of its own, into which a weight is packed once. Input shapes that want the same layout share
one packed form, so a layer holds its weight once more, twice where its shapes want different layouts. A compiled
function (a layer as a partition, a model as a function) packs the weights again, for one shape. Those are held in a
`Pool`, which bounds their bytes in the whole process: the ones that were not used for longest go first, and where all
are in use, no further one is made.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .forking import ForkSafeLock

_SHAPES = 4
"""Input shapes for which a layer asks for a layout; from then on the last packed form serves all."""
_LAYOUTS = 2
"""Layouts in which a layer's weight is held."""
_IN_USE = 1.0
"""Seconds since its last call for which a compiled function is in use and stays."""


@dataclass(eq=False)
class Compiled:
    """A function that was compiled for one shape.

    Attributes:
        run: What computes it.
        threads: The number of threads for which it was made.
        nbytes: Size of the packed weights that it holds.
        used: When it was last called, by the monotonic clock.
    """

    run: Callable[..., Any]
    threads: int
    nbytes: int
    used: float = field(default_factory=time.monotonic)


class Holder(Protocol):
    """What has compiled functions, and is itself held by nobody for their sake."""

    @property
    def compiled(self) -> dict[Any, Any]:
        """The functions by shape."""


class Pool:
    """A bound on the bytes that compiled functions hold in the whole process.

    Args:
        limit: Bytes; a single function may be larger.
    """

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
        """Holds a function, and lets go those that were not used for longest where there is no room.

        Args:
            holder: Whose function it is.
            key: Its key there.
            entry: The function.

        Returns:
            Whether there is room: not where all that would have to go is in use.
        """
        with self._lock:
            entries = sorted(self._entries(), key=lambda held: held[2].used)
            excess = sum(held.nbytes for _, _, held in entries) + entry.nbytes - self.limit
            leaving = []
            for held in entries:
                if excess <= 0:
                    break
                if time.monotonic() - held[2].used < _IN_USE:
                    return False
                leaving.append(held)
                excess -= held[2].nbytes
            for owner, old, _ in leaving:
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
    or its device.

    Args:
        weight: The weight.
        bias: The bias.

    Attributes:
        weight: The weight.
        compiled: Partitions by input shape and whether a residual is added.
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
        """The weight packed for an input shape.

        Args:
            shape: The shape.
            pack: Packs the weight for it; returns the name of the layout, too.
        """
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

    @property
    def nbytes(self) -> int:
        """Size of the packed forms, partitions left out."""
        return len(dict(self._forms.values())) * self.weight.nbytes

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
