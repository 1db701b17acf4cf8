"""How many calibration inputs there is room for at once, in memory and on disk, from a capture's shapes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..capturing.records import Capture, info
from .running import Chunk, samples_of

_MOST = 32
_RUN_BYTES = 1024**3
"""About how many bytes of activations one calibration run, forward and backward, may hold."""
MEMORY = 2 * 1024**3
"""Bytes of live activations that two models that run in lock-step may hold in memory; the rest goes to disk."""
_MOST_CHUNKS = 512
_MOST_THREADS = 8192
_DISK_SHARE = 0.9
"""How much of what is free on the disk may be taken."""


@dataclass(frozen=True)
class Capacity:
    """The memory and disk for the live activations of two models in lock-step.

    Attributes:
        samples: For how many samples there is room, 1 or more.
        spilled: Whether some of it is on disk.
        sample_bytes: About how many bytes a sample takes.
        memory: Bytes that may be taken in memory.
        disk: Bytes that may be taken on the disk.
        folder: Where.
    """

    samples: int
    spilled: bool
    sample_bytes: int
    memory: int
    disk: int
    folder: str


def samples_in_run(captured: Capture) -> int:
    """Samples of one calibration run: a backward pass keeps all activations."""
    produced = sum(
        tensor.nbytes
        for node in captured.graph.nodes
        if info(node).alias_of is None and node.op not in ("placeholder", "get_attr", "output")
        for tensor in info(node).outputs
    )
    return int(min(_MOST, max(1, _RUN_BYTES * samples_of_example(captured) // max(1, produced))))


def capacity_in_lockstep(captured: Capture, samples: int | None) -> Capacity:
    """The memory and disk for the live activations of so many samples; None where their number is not known."""
    live = peak = 0
    for event in captured.memory:
        live += event.nbytes
        peak = max(peak, live)
    inputs = sum(spec.nbytes for _, spec in captured.inputs)
    each = max(1, 2 * (peak + inputs) // samples_of_example(captured))
    try:
        folder = tempfile.gettempdir()
        disk = int(shutil.disk_usage(folder).free * _DISK_SHARE)
    except OSError:
        folder, disk = "no temporary folder", 0
    spilled = samples is None or samples * each > MEMORY
    room = max(1, (MEMORY + (disk if spilled else 0)) // each)
    return Capacity(room, spilled and disk > 0, each, MEMORY, disk, folder)


def most_chunks() -> int:
    """Chunks in lock-step, at most: each has two threads, and each of these its own workers in torch."""
    return min(_MOST_CHUNKS, max(32, _MOST_THREADS // (2 * torch.get_num_threads())))


class Limited:
    """The first of some chunks, as many as there is room for.

    Args:
        chunks: The chunks.
        samples: Of how many samples, about.
        most: How many at most; `most_chunks` where None.

    Attributes:
        samples: Samples taken.
        cut: Whether there were more chunks.
        many: Whether that is for their number, and not for the samples in them.
    """

    def __init__(self, chunks: Iterable[Chunk], samples: int, most: int | None = None) -> None:
        self._chunks, self._room, self._most = chunks, samples, most or most_chunks()
        self.samples, self.cut, self.many = 0, False, False

    def __iter__(self) -> Iterator[Chunk]:
        for number, chunk in enumerate(self._chunks):
            size = samples_of(*chunk)
            if number and (number >= self._most or self.samples + size > self._room):
                self.cut, self.many = True, number >= self._most
                return
            self.samples += size
            yield chunk


def samples_of_example(captured: Capture) -> int:
    """Samples in the example inputs: the first dim of the first of them."""
    shapes = (spec.shape for _, spec in captured.inputs)
    return max(1, next((shape[0] for shape in shapes if shape), 1))
