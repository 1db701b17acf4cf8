"""What a rewritten model is trained on: inputs in an order of a seed, augmented, and shared out among processes.

Inputs that are alike (the same shapes but for the number of samples) are drawn one by one; others, such as lists of
images, come in the batches that they came in. What does not fit in `MEMORY` is read anew in every epoch, and mixed
within as much of it as fits. A step's inputs, and what is drawn to augment them, depend on the seed, the epoch and the
step alone, so that any number of processes shares the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.nested import map_tensors, tensors_of
from ..core.random_state import seed_all
from .augment import Augment, augmented
from .batches import Batches
from .running import Chunk, samples_of

MEMORY = 2 * 1024**3
"""Bytes of inputs that are held at once."""


@dataclass(frozen=True)
class Part:
    """Inputs that one process takes in a step, their labels, and their share of the step's mean."""

    chunk: Chunk
    labels: Tensor | None
    weight: float


@dataclass(frozen=True)
class _Window:
    """Inputs that are mixed: the samples of a single chunk (``cut``), or whole chunks."""

    chunks: list[tuple[Chunk, Tensor | None]]
    cut: bool

    @classmethod
    def of(cls, given: list[tuple[Chunk, Tensor | None]]) -> _Window:
        """Chunks put together, where their tensors are alike and all have the samples as their first dim.

        They are taken out of the list, so that memory does not hold them twice.
        """
        chunks = given.copy()
        given.clear()
        tensors = [tensors_of(chunk) for chunk, _ in chunks]
        counts = [samples_of(*chunk) for chunk, _ in chunks]
        alike = len({tuple((t.shape[1:], t.dtype) for t in each) for each in tensors}) == 1
        if not alike or any(t.shape[:1] != (n,) for each, n in zip(tensors, counts) for t in each):
            return cls(chunks, False)
        columns = iter([torch.cat(column) for column in zip(*tensors)])
        labels = [of_chunk for _, of_chunk in chunks if of_chunk is not None]
        same = len(labels) == len(chunks) and len({t.shape[1:] for t in labels}) == 1
        joined = map_tensors(chunks[0][0], lambda _: next(columns))
        return cls([(joined, torch.cat(labels) if same else None)], True)

    @property
    def samples(self) -> int:
        return sum(samples_of(*chunk) for chunk, _ in self.chunks)

    @property
    def items(self) -> int:
        return self.samples if self.cut else len(self.chunks)

    def groups(self, order: Tensor, size: int) -> tuple[Tensor, ...]:
        """Items in this order, in groups of at most so many samples; of about as many where they are chunks."""
        each = size if self.cut else max(1, size * self.items // self.samples)
        return order.tensor_split(-(-self.items // each))


class TrainingSet:
    """The inputs to train on, in steps.

    Args:
        batches: Where they come from: all but those held out.
        size: Inputs in a step, at most; at least one batch of those that cannot be cut.
        seed: Of the order, and of what is drawn to augment them.
        augment: Changes the inputs of a step.
        share: Which process this is, of how many.

    Attributes:
        samples: How many there are.
        steps: Steps in an epoch.
    """

    def __init__(
        self, batches: Batches, size: int, seed: int, augment: Augment | None, share: tuple[int, int] = (0, 1)
    ) -> None:
        self._batches, self._size, self._seed, self._augment = batches, size, seed, augment
        self._rank, self._world = share
        self.samples = self.steps = 0
        self._kept: list[_Window] = []
        for window in self._read():
            self.samples += window.samples
            self.steps += len(window.groups(torch.arange(window.items, device="cpu"), size))
            del window  # before the next is read

    def epoch(self, number: int, start: int = 0) -> Iterator[list[Part]]:
        """The steps of an epoch, from one of them on: what this process takes in each."""
        order, step = torch.Generator().manual_seed(_seed(self._seed, number)), -1
        for window in self._kept or self._read():
            for group in window.groups(torch.randperm(window.items, generator=order, device="cpu"), self._size):
                if (step := step + 1) >= start:
                    yield self._parts(window, group, (self._seed, number, step))
            del window

    def _read(self) -> Iterator[_Window]:
        """One pass: as many chunks at a time as fit; all of them are kept where they do."""
        chunks, held, several = list[tuple[Chunk, Tensor | None]](), 0, False
        for each in self._batches.labelled():
            size = sum(tensor.nbytes for tensor in tensors_of(each))
            if chunks and held + size > MEMORY:
                yield _Window.of(chunks)
                held, several = 0, True
            chunks.append(each)
            held += size
            del each
        if several:
            yield _Window.of(chunks)
        else:
            self._kept = [_Window.of(chunks)]
            yield from self._kept

    def _parts(self, window: _Window, group: Tensor, seed: tuple[int, ...]) -> list[Part]:
        """What this process takes of a group; one that is left without takes the first, with no weight."""
        if not window.cut:
            mine = [int(i) for i in group[self._rank :: self._world]]
            total = sum(samples_of(*window.chunks[i][0]) for i in group)
            parts = []
            for i in mine or [int(group[0])]:
                chunk, labels = window.chunks[i]
                weight = samples_of(*chunk) * self._world / total if mine else 0.0
                parts.append(Part(self._changed(chunk, (*seed, i)), labels, weight))
            return parts
        chunk, labels = _taken(*window.chunks[0], group)
        chunk = self._changed(chunk, seed)
        share = torch.arange(len(group), device="cpu").tensor_split(self._world)[self._rank]
        weight = len(share) * self._world / len(group)
        return [
            Part(
                *_taken(chunk, labels, share if len(share) else torch.zeros(1, dtype=torch.long, device="cpu")), weight
            )
        ]

    def _changed(self, chunk: Chunk, seed: tuple[int, ...]) -> Chunk:
        """Inputs as they are augmented."""
        if self._augment is None:
            return chunk
        seed_all(_seed(*seed))
        return augmented(self._augment, chunk)


def _seed(*numbers: int) -> int:
    """A seed from several numbers, the same in every process."""
    return hash(numbers) % 2**63


def _taken(chunk: Chunk, labels: Tensor | None, which: Tensor) -> tuple[Chunk, Tensor | None]:
    """Samples of a chunk whose tensors all have them as their first dim."""
    taken: Chunk = map_tensors(chunk, lambda tensor: tensor[which.to(tensor.device)])
    return taken, None if labels is None else labels[which]
