"""Calibration inputs that come in the same order every time they are gone through.

What can be iterated again is, so that memory holds one batch at a time; an iterator is stored as it goes by the first
time. A shuffling loader would give other batches each time, and what was held out for measuring would come back as
calibration: its order is drawn from the same seed every time, and the user's loader and the global random state stay as
they are. What a dataset changes at random by itself (augmentation) is not fixed: give the transforms of evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from ..core.errors import UsageError, shortened

_RANDOM = (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)


def stable(source: object, chunk: int) -> Iterable[object]:
    """An iterable that gives the batches of the user's in the same order every time; ``chunk`` cuts a bare dataset.

    Raises:
        UsageError: If it is no iterable of inputs.
    """
    if isinstance(source, (Tensor, np.ndarray, Mapping)):
        return [source]
    if isinstance(source, data.Dataset) and not isinstance(source, data.IterableDataset):
        source = data.DataLoader(source, batch_size=chunk)
    if isinstance(source, (str, bytes, Path)) or not isinstance(source, Iterable):
        raise UsageError(
            "the calibration inputs are not an iterable of batches",
            expected="a list, a DataLoader or another iterable of tensors, tuples or dicts; or one tensor",
            got=shortened(repr(source), 80) if isinstance(source, (str, bytes, Path)) else type(source).__name__,
            hint="on the command line --calibration takes files" if isinstance(source, (str, Path)) else None,
        )
    if isinstance(source, data.DataLoader) and isinstance(_sampler(source), _RANDOM):
        return SameOrder(source)
    return Stored(source) if isinstance(source, Iterator) else source


class Stored:
    """The items of an iterator, which is gone through once, and no further than anyone needs."""

    def __init__(self, iterator: Iterator[object]) -> None:
        self._iterator, self._batches = iterator, list[object]()

    def __iter__(self) -> Iterator[object]:
        for place in itertools.count():
            if place == len(self._batches):
                self._batches.extend(itertools.islice(self._iterator, 1))
            if place == len(self._batches):
                return
            yield self._batches[place]


class SameOrder:
    """A shuffling loader that draws the same order every time; its generator is as it was after each pass."""

    def __init__(self, loader: data.DataLoader[object]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[object]:
        own: torch.Generator | None = getattr(_sampler(self.loader), "generator", None)
        before = own.get_state() if own is not None else None
        try:
            with torch.random.fork_rng(devices=[]):  # the order is drawn for the first batch
                torch.manual_seed(0)
                batches = iter(self.loader)
                first = list(itertools.islice(batches, 1))
            yield from first
            yield from batches
        finally:
            if own is not None and before is not None:
                own.set_state(before)


def _sampler(loader: data.DataLoader[object]) -> object:
    """What orders a loader's samples: its own sampler, or that of a batch sampler the user made."""
    batches = loader.batch_sampler
    return getattr(batches, "sampler", None) if batches is not None else loader.sampler
