"""Calibration inputs that come in the same order every time they are gone through.

What can be iterated again is, so that memory holds one batch at a time. An iterator or a generator is stored as it goes
by the first time. A shuffling `torch.utils.data.DataLoader` would give other batches each time, and what was held out
for measuring would come back as calibration: its order is drawn from the same seed every time. The user's loader and
the global random state stay as they are. What a dataset changes at random by itself (augmentation) is not fixed: give
the transforms of evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..core.errors import UsageError, shortened

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def stable(source: object, chunk: int) -> Iterable[Any]:
    """An iterable of batches that gives the same ones in the same order every time.

    Args:
        source: The calibration inputs of the user.
        chunk: The batch size for a dataset without a loader.

    Returns:
        The source itself where it does so already.

    Raises:
        UsageError: If it is no iterable of inputs.
    """
    if isinstance(source, (Tensor, np.ndarray, Mapping)):
        return [source]
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        source = DataLoader(source, batch_size=chunk)
    if isinstance(source, (str, bytes, Path)) or not isinstance(source, Iterable):
        raise UsageError(
            "the calibration inputs are not an iterable of batches",
            expected="a list, a DataLoader or another iterable of tensors, tuples or dicts; or one tensor",
            got=shortened(repr(source), 80) if isinstance(source, (str, bytes, Path)) else type(source).__name__,
            hint="on the command line --calibration takes files" if isinstance(source, (str, Path)) else None,
        )
    if isinstance(source, DataLoader) and isinstance(_sampler(source), _RANDOM):
        return SameOrder(source)
    if isinstance(source, Iterator):
        return Stored(source)
    return source


class Stored:
    """The items of an iterator, stored as they go by.

    Args:
        iterator: The iterator; gone through once, and no further than anyone needs.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._batches: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for place in itertools.count():
            if place == len(self._batches):
                try:
                    self._batches.append(next(self._iterator))
                except StopIteration:
                    return
            yield self._batches[place]


class SameOrder:
    """A shuffling loader that draws the same order every time; its generator is as it was after each pass.

    Args:
        loader: The loader; stays as it is.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
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


def _sampler(loader: DataLoader[Any]) -> Any:
    """What orders a loader's samples: its own sampler, or that of a batch sampler the user made."""
    batches = loader.batch_sampler
    return getattr(batches, "sampler", None) if batches is not None else loader.sampler
