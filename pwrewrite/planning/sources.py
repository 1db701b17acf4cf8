"""Calibration inputs that come in the same order every time they are gone through.

What can be iterated again is, so that memory holds one batch at a time. An iterator or a generator is stored as it goes
by the first time. A shuffling `torch.utils.data.DataLoader` would give other batches each time, and what was held out
for measuring would come back as calibration: its order is drawn once, and a loader over the same data in that order is
used in its place. The user's loader and the global random state stay as they are. What a dataset changes at random by
itself (augmentation) is not fixed: give the transforms of evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from ..core.errors import UsageError

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def stable(source: object, size: int | None, chunk: int) -> Iterable[Any]:
    """An iterable of batches that gives the same ones in the same order every time.

    Args:
        source: The calibration inputs of the user.
        size: How many samples will be used at most.
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
            got=repr(source)[:80] if isinstance(source, (str, bytes, Path)) else type(source).__name__,
            hint="on the command line --calibration takes files" if isinstance(source, (str, Path)) else None,
        )
    if isinstance(source, DataLoader) and _shuffles(source):
        return _fixed(source, size) if type(source).__iter__ is DataLoader.__iter__ else Stored(iter(source))
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


def _sampler(loader: DataLoader[Any]) -> Any:
    """What orders a loader's samples: its own sampler, or that of a batch sampler the user made."""
    batches = loader.batch_sampler
    return getattr(batches, "sampler", None) if batches is not None else loader.sampler


def _shuffles(loader: DataLoader[Any]) -> bool:
    """Whether a loader draws its order anew every time."""
    return isinstance(_sampler(loader), _RANDOM)


def _fixed(loader: DataLoader[Any], size: int | None) -> DataLoader[Any]:
    """A loader of the same batches in one order."""
    indices = _drawn(loader, size)
    order: dict[str, Any] = (
        {"batch_size": None, "sampler": indices} if loader.batch_sampler is None else {"batch_sampler": indices}
    )
    if loader.num_workers:
        order["prefetch_factor"] = loader.prefetch_factor
        order["multiprocessing_context"] = loader.multiprocessing_context
    return DataLoader(
        loader.dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        **order,
    )


def _drawn(loader: DataLoader[Any], size: int | None) -> Sequence[Any]:
    """The indices of a shuffling loader, drawn once: as many batches as hold ``size`` samples."""
    sampler = _sampler(loader)
    own: torch.Generator | None = getattr(sampler, "generator", None)
    state = own.get_state() if own is not None else None
    drawn: list[Any] = []
    samples = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for item in sampler if loader.batch_sampler is None else loader.batch_sampler:
            drawn.append(item)
            samples += len(item) if isinstance(item, (list, tuple)) else 1
            if size is not None and samples >= size:
                break
    if own is not None and state is not None:
        own.set_state(state)
    return drawn
