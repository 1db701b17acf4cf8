"""Calibration inputs: any iterable of batches, checked, cast and cut into chunks, some of them held out for measuring.

What in a batch are inputs, and what comes beside them, `pwrewrite.planning.batch_inputs` tells by the example inputs. A
batch of another kind goes through a function of the user's first.

The source is gone through anew for every pass, and memory holds a few chunks of it at a time; an iterator is stored as
it goes by the first time. A shuffling loader would give other batches each time, and what was held out for measuring
would come back as calibration: its order is drawn from the same seed every time, and the user's loader and the global
random state stay as they are. What a dataset changes at random by itself (augmentation) is not fixed: give the
transforms of evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from functools import cached_property
from itertools import chain, islice, tee
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from ..capturing import Inputs, split_inputs
from ..core.errors import PwrewriteError, UsageError, first_line, shortened
from ..core.nested import Tree, hash_tensors
from .batch_inputs import Batch, sort_out
from .batch_reader import Reader
from .running import Chunk

Part = Literal["all", "calibration", "held_out"]
"""Which chunks: every one, those to gather statistics from, those kept for measuring."""

_BOTH = frozenset({"all", "calibration", "held_out"})
_GATHERED = frozenset({"all", "calibration"})
_HELD = frozenset({"all", "held_out"})
_RANDOM = (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)


class Batches:
    """Calibration inputs in chunks, the same in every pass; iterating gives all of them.

    Every ``holdout``-th chunk is held out. Where there are fewer chunks than that, the last ``1/holdout`` of the
    samples is; a single sample is used for both.

    Args:
        source: An iterable of batches, a ``Dataset``, or one batch.
        example_inputs: What the model takes: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        size: Use at most so many samples, the first ones.
        chunk: Samples in a chunk, at most. Inputs without a batch dim in common, such as lists of images, stay whole.
        holdout: Every how many chunks one is held out, 2 or more.
        batch: Called with each batch of the source as it came; returns the inputs, or the inputs and labels.

    Raises:
        UsageError: If a setting makes no sense, the source is no iterable, or a pass comes to what is no batch of
            finite inputs for the model, or to none at all.
    """

    def __init__(
        self,
        source: Iterable[Tree],
        example_inputs: Inputs,
        *,
        size: int | None = None,
        chunk: int = 32,
        holdout: int = 5,
        batch: Callable[[Tree], Tree] | None = None,
    ) -> None:
        for name, value, least in (("size", size, 1), ("chunk", chunk, 1), ("holdout", holdout, 2)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise UsageError(f"{name} of the calibration inputs must be {least} or more", got=str(value))
        self.size, self.chunk, self.holdout = size, chunk, holdout
        self._reader = Reader(*split_inputs(example_inputs))
        self._batch, self._original, self._source = batch, source, stable(source, chunk)
        self._notes: list[str] = []
        self._first: Batch | None = None
        self._known: list[tuple[frozenset[str], int, Tensor | None]] = []

    def __iter__(self) -> Iterator[Chunk]:
        return self._read("all")

    def calibration(self) -> Iterator[Chunk]:
        """The chunks to gather statistics from."""
        return self._read("calibration")

    def held_out(self) -> Iterator[Chunk]:
        """The chunks kept for measuring."""
        return self._read("held_out")

    def labelled(self) -> Iterator[tuple[Chunk, Tensor | None]]:
        """The same as `calibration`, each chunk with its labels, where it has any."""
        return ((self._reader.read(batch), batch.labels) for batch, parts in self._parts() if "calibration" in parts)

    def first(self) -> tuple[Chunk, Tensor | None]:
        """The first chunk and its labels, where it has any."""
        batch = self._first or next(self._chunks())
        return self._reader.read(batch), batch.labels

    @property
    def samples(self) -> int:
        """How many samples there are, by a pass over all of them where there was none yet."""
        return sum(samples for _, samples, _ in self._all())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know about the inputs, as far as a pass has come yet."""
        notes = getattr(self._original, "notes", ())
        of_source = [note for note in notes if isinstance(note, str)] if isinstance(notes, (list, tuple)) else []
        return tuple(dict.fromkeys([*of_source, *self._notes, *self._reader.notes]))

    def labels(self, part: Part = "all") -> Tensor | None:
        """The labels that came with the inputs, in the order of the chunks, on the CPU: an integer or a row of 0 and 1.

        None where any chunk came without, or they are not alike.
        """
        labels = [of_chunk for parts, _, of_chunk in self._all() if part in parts]
        known = [of_chunk for of_chunk in labels if of_chunk is not None]
        alike = len({of_chunk.shape[1:] for of_chunk in known}) == 1
        return torch.cat(known) if alike and len(known) == len(labels) else None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all chunks, 64 hex digits: values, shapes, dtypes, names, how they are cut, what is held out."""
        digest = hashlib.sha256()
        for batch, parts in self._parts():
            args, kwargs = self._reader.read(batch, "cpu")
            digest.update(repr((sorted(parts), len(args), sorted(kwargs))).encode())
            digest.update(hash_tensors((args, [kwargs[name] for name in sorted(kwargs)])).encode())
        return digest.hexdigest()

    def _read(self, part: Part) -> Iterator[Chunk]:
        return (self._reader.read(batch) for batch, parts in self._parts() if part in parts)

    def _parts(self) -> Iterator[tuple[Batch, frozenset[str]]]:
        """One pass: every chunk, and which parts it belongs to."""
        chunks: list[tuple[frozenset[str], int, Tensor | None]] = []
        for batch, parts in self._dealt():
            self._first = self._first or batch
            chunks.append((parts, batch.samples, batch.labels))
            yield batch, parts
        self._known = chunks

    def _all(self) -> list[tuple[frozenset[str], int, Tensor | None]]:
        """The parts, samples and labels of every chunk."""
        if not self._known:
            for _ in self._parts():
                pass
        return self._known

    def _dealt(self) -> Iterator[tuple[Batch, frozenset[str]]]:
        """Chunks and the parts they belong to; the first ``holdout`` of them wait, in case there are no more."""
        chunks = self._chunks()
        waiting = list(islice(chunks, self.holdout))
        if len(waiting) < self.holdout:
            yield from self._few(waiting)
            return
        chunks = chain(iter(waiting), chunks)
        del waiting  # the iterator lets go of it once it is through
        for place, batch in enumerate(chunks, 1):
            yield batch, _GATHERED if place % self.holdout else _HELD

    def _few(self, batches: list[Batch]) -> Iterator[tuple[Batch, frozenset[str]]]:
        """Deals fewer chunks than ``holdout``: the last samples are held out."""
        total = sum(batch.samples for batch in batches)
        if len(batches) == 1 and (total == 1 or batches[0].whole):
            what = "one calibration sample" if total == 1 else "one calibration batch, which cannot be cut"
            self._note(f"there is only {what}: what the plan loses is measured on it too, and may read too low")
            yield batches[0], _BOTH
            return
        wanted = left = max(1, round(total / self.holdout))
        held = [0] * len(batches)
        for place, batch in reversed(list(enumerate(batches))):
            if not batch.whole:
                held[place] = min(left, batch.samples - (place == 0))
            elif place and (batch.samples <= left or left == wanted):
                held[place] = batch.samples
            left = max(0, left - held[place])
        for batch, count in zip(batches, held, strict=True):
            if 0 < count < batch.samples:
                yield batch.part(0, batch.samples - count), _GATHERED
                yield batch.part(batch.samples - count, batch.samples), _HELD
            else:
                yield batch, _HELD if count else _GATHERED

    def _chunks(self) -> Iterator[Batch]:
        """Batches cut into chunks, up to ``size`` samples."""
        seen = 0
        for batch in self._batches():
            end = batch.samples if self.size is None else min(batch.samples, self.size - seen)
            ranges = ((start, min(start + self.chunk, end)) for start in range(0, end, self.chunk))
            for part in [batch] if batch.whole else (batch.part(*each) for each in ranges):
                seen += part.samples
                yield part
            if self.size is not None and seen >= self.size:
                return
        if not seen:
            hint = "an iterator that was gone through already gives nothing more: give a list or a loader"
            raise UsageError(
                "the calibration inputs are empty",
                got=f"a {type(self._original).__name__} that gives no batch",
                hint=hint if isinstance(self._source, _Stored) else None,
            )
        if self.size is not None:
            self._note(f"{self.size} calibration samples were asked for, and there are {seen}")

    def _batches(self) -> Iterator[Batch]:
        """What the source gives, sorted into inputs and labels; batches without a sample are passed over."""
        number = 0
        try:
            for value in self._source:
                value = value if self._batch is None else self._batch(value)
                batch, note = sort_out(value, number, self._reader.args, self._reader.kwargs)
                if note and not any("left out" in earlier for earlier in self._notes):
                    self._notes.append(note)
                if batch.samples:
                    self._reader.check(batch)
                    yield batch
                number += 1
        except PwrewriteError:
            raise
        except Exception as error:
            what = f"batch {number} of the calibration inputs cannot be read"
            raise UsageError(what, got=first_line(error)) from error

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)


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
        return _SameOrder(source)
    return _Stored(source) if isinstance(source, Iterator) else source


class _Stored:
    """The items of an iterator, which is gone through once, and no further than anyone needs."""

    def __init__(self, iterator: Iterator[object]) -> None:
        (self._items,) = tee(iterator, 1)

    def __iter__(self) -> Iterator[object]:
        return copy(self._items)


class _SameOrder:
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
                first = list(islice(batches, 1))
            yield from first
            yield from batches
        finally:
            if own is not None and before is not None:
                own.set_state(before)


def _sampler(loader: data.DataLoader[object]) -> object:
    """What orders a loader's samples: its own sampler, or that of a batch sampler the user made."""
    batches = loader.batch_sampler
    return getattr(batches, "sampler", None) if batches is not None else loader.sampler
