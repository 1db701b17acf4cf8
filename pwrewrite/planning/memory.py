"""Numbers that took long to work out and are next to nothing to keep: `Memory`.

What each layer loses at each width follows from its statistics. It is stored beside them, so that a second plan for the
same model and inputs neither calibrates nor decomposes again. A file that is damaged is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ..core.files import new_file, prune

_VERSION = 1
"""Goes up with every change of what losses are."""
LIMIT = 256 * 1024**2
"""Bytes that all such files may take."""

Numbers = Tensor | float | Sequence[Sequence[float]]


class Memory:
    """Float64 tensors of numbers from 0 up by what they are of.

    Args:
        file: Where they are kept; None for as long as this object lives.
        stale: Whether what the file holds is of other statistics.
    """

    def __init__(self, file: Path | None = None, *, stale: bool = False) -> None:
        self._file, self._known, self._stale, self._grown = file, dict[str, Tensor](), stale, False
        if file is not None and not stale:
            self._known = _read(file)

    def once(self, what: object, shape: Sequence[int], make: Callable[[], Numbers]) -> Tensor:
        """The numbers ``(*shape)`` of ``what``, which JSON can hold, made when they are not known."""
        key = hashlib.sha256(json.dumps([_VERSION, what], sort_keys=True).encode()).hexdigest()
        known = self._known.get(key)
        if known is None or known.dtype != torch.float64 or known.shape != tuple(shape) or not bool((known >= 0).all()):
            made = torch.as_tensor(make(), dtype=torch.float64, device="cpu")
            known = self._known[key] = made.reshape(shape).contiguous()
            self._grown = True
        return known

    def store(self) -> None:
        """Writes what came on top, if it can; a full disk or a folder that cannot be written is no error."""
        if self._file is None or not self._grown:
            return
        with suppress(OSError, SafetensorError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            others = {} if self._stale else _read(self._file)
            with new_file(self._file) as scratch:
                save_file(others | self._known, scratch)
            prune(self._file.parent.glob("*.safetensors"), LIMIT)
        self._grown = self._stale = False


def _read(file: Path) -> dict[str, Tensor]:
    with suppress(OSError, SafetensorError, ValueError, LookupError):
        known = load(file.read_bytes())
        os.utime(file)
        return known
    return {}
