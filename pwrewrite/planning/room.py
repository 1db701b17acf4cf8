"""How many calibration inputs there is room for at once, in memory and on disk, from a capture's shapes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator

import torch

from ..capturing.records import Capture, info
from .running import Chunk, samples_of

_MOST = 32
_RUN_BYTES = 3 * 2**28
"""About how many bytes of activations one calibration run, forward and backward, may hold."""
MEMORY = 2 * 1024**3
"""Bytes of live activations that two models that run in lock-step may hold in memory; the rest goes to disk."""
_MOST_CHUNKS = 512
_MOST_THREADS = 8192
_DISK_SHARE = 0.9
"""How much of what is free on the disk may be taken."""


def samples_in_run(captured: Capture) -> int:
    """Samples of one calibration run: a backward pass keeps all activations."""
    produced = sum(
        tensor.nbytes
        for node in captured.graph.nodes
        if info(node).alias_of is None and node.op not in ("placeholder", "get_attr", "output")
        for tensor in info(node).outputs
    )
    return int(min(_MOST, max(1, _RUN_BYTES * _samples_of_example(captured) // max(1, produced))))


class Room:
    """The memory and disk for the live activations of two models that run in lock-step on so many samples.

    Attributes:
        memory: Bytes of them that may be held in memory.
        spilled: Whether some are to be on disk.
    """

    def __init__(self, captured: Capture, samples: int) -> None:
        live = peak = 0
        for event in captured.memory:
            live += event.nbytes
            peak = max(peak, live)
        inputs = sum(spec.nbytes for _, spec in captured.inputs)
        self._sample = max(1, 2 * (peak + inputs) // _samples_of_example(captured))
        try:
            self._folder = tempfile.gettempdir()
            self._disk = int(shutil.disk_usage(self._folder).free * _DISK_SHARE)
        except OSError:
            self._folder, self._disk = "no temporary folder", 0
        self.memory = MEMORY
        self._all, over = samples, samples * self._sample > self.memory
        self.spilled = over and self._disk > 0
        self._fitting = (self.memory + (self._disk if over else 0)) // self._sample
        self._taken, self._cut, self._many = 0, False, False

    def first(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The first of some chunks, one at least, as many as there is room for."""
        for number, chunk in enumerate(chunks):
            size = samples_of(*chunk)
            self._many = number >= most_chunks()
            self._cut = self._many or (number > 0 and self._taken + size > self._fitting)
            if self._cut:
                return
            self._taken += size
            yield chunk

    def notes(self) -> list[str]:
        """That not all inputs were fitted to, and why; nothing where all were."""
        memory, disk, whole = (n / 1024**3 for n in (self.memory, self._disk, self._all * self._sample))
        why = (
            f"the activations of all may take {whole:.3g} GiB, and there are {memory:.3g} GiB of memory for them and "
            f"{disk:.3g} GiB of disk ({self._folder}; TMPDIR names another folder)"
        )
        why = "they come in more batches than run together" if self._many else why
        note = f"fitted on the first {self._taken} of {self._all} calibration inputs (held-out ones included): {why}"
        return [note] if self._cut else []


def most_chunks() -> int:
    """Chunks in lock-step, at most: each has two threads, and each of these its own workers in torch."""
    return min(_MOST_CHUNKS, max(32, _MOST_THREADS // (2 * torch.get_num_threads())))


def _samples_of_example(captured: Capture) -> int:
    """Samples in the example inputs: the first dim of the first of them."""
    shapes = (spec.shape for _, spec in captured.inputs)
    return max(1, next((shape[0] for shape in shapes if shape), 1))
