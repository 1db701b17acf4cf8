"""One batch of calibration inputs: which part of it the model takes, by the example inputs, and how it is cut.

A batch is an array, a tuple or list of positional inputs, or a dict: of keyword inputs (alone, or first in a tuple), or
the one input of a model that takes a dict. What comes beside the inputs are labels where it looks like them (an
integer, or a whole float, for each sample; ``0`` and ``1`` in a row for each sample), else a target, which is left out
with a note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from torch import Tensor, as_tensor

from ..core.errors import UsageError
from ..core.nested import Args, Kwargs
from ..targets.arrays import LABEL_NAMES
from .running import opened_dicts

Array = Tensor | np.ndarray

_OWN = "name a function that takes a batch and gives the inputs (--batch file.py:NAME, batch=)"


@dataclass(frozen=True)
class Batch:
    """A batch, or a part of one, as it came.

    Attributes:
        labels: The classes that came with the inputs, ``(N,)``, or 0 and 1 for each class, ``(N, classes)``.
        samples: How many samples it holds.
        number: The number of the batch it is from.
        first: The place in that batch of its first sample.
        whole: Whether it cannot be cut: its inputs share no batch dim.
    """

    args: Args
    kwargs: Kwargs
    labels: Tensor | None
    samples: int
    number: int
    first: int = 0
    whole: bool = False

    def part(self, start: int, stop: int) -> Batch:
        """Some of its samples; not for one that is ``whole``."""

        def cut(value: object) -> object:
            if isinstance(value, Mapping):
                return {name: cut(inner) for name, inner in value.items()}
            return value[start:stop] if is_array(value) and value.ndim else value

        args, kwargs = tuple(map(cut, self.args)), {name: cut(value) for name, value in self.kwargs.items()}
        labels = None if self.labels is None else self.labels[start:stop]
        return Batch(args, kwargs, labels, stop - start, self.number, self.first + start)


def is_array(value: object) -> TypeGuard[Array]:
    """Whether a value is a tensor or a numpy array."""
    return isinstance(value, (Tensor, np.ndarray))


def described(value: object) -> str:
    """A value in a few words: ``float32 8×3×32×32``, ``a list of 2``, ``str``."""
    if is_array(value):
        return f"{str(value.dtype).removeprefix('torch.')} {'×'.join(map(str, value.shape)) or 'scalar'}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(described(v) for v in value[:3]) + (", …" if len(value) > 3 else "")
        return f"a {type(value).__name__} of {len(value)}" + (f" ({inner})" if value else "")
    return type(value).__name__


def sort_out(batch: object, number: int, args: Args, kwargs: Kwargs) -> tuple[Batch, str | None]:
    """Tells the inputs in a batch from what comes beside them, by the example inputs.

    Returns:
        The batch, and a note on what of it was left out; one with fewer inputs or other names is refused.
    """
    named: Kwargs = {}
    values: Args = ()
    beside: Sequence[object]
    if isinstance(batch, (list, tuple)) and not batch:  # an empty last batch of lists
        return Batch((), {}, None, 0, number), None
    behind: Sequence[object] = ()
    if _named_first(batch, args or tuple(kwargs.values())):
        batch, *behind = batch
    if isinstance(batch, Mapping):
        one = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Mapping) else None
        taken = _by_name(batch, number, args, kwargs if one is None else one)
        beside = [*behind, *(batch[name] for name in batch if name not in taken)]
        values, named = ((), taken) if one is None else ((taken,), {})
    else:
        example = args or tuple(kwargs.values())
        values, beside = _by_place(batch, number, example)
        values = tuple(
            _by_name(value, number, (), wanted) if isinstance(value, Mapping) and isinstance(wanted, Mapping) else value
            for value, wanted in zip(values, example, strict=True)
        )
        if kwargs and not args:
            values, named = (), dict(zip(kwargs, values, strict=True))
    samples, whole = _count([*values, *named.values()])
    labels = next((labels for value in beside if (labels := _labels(value, samples)) is not None), None)
    left_out = beside and labels is None and samples
    note = f"{described(beside[0])} beside the inputs was taken for targets and left out" if left_out else None
    return Batch(values, named, labels, samples, number, 0, whole), note


def _named_first(batch: object, example: Args) -> TypeGuard[Sequence[object]]:
    """Whether a batch is a dict of keyword inputs with labels or targets behind it."""
    return isinstance(batch, (list, tuple)) and isinstance(batch[0], Mapping) and not isinstance(example[0], Mapping)


def _by_name(batch: Mapping[str, object], number: int, args: Args, wanted: Mapping[str, object]) -> Kwargs:
    """What is wanted of a dict; ``args`` are the example's positional inputs, for what is said where nothing is."""
    if not wanted:
        raise UsageError(
            f"batch {number} of the calibration inputs is a dict, and the example inputs are positional",
            expected=described(args[0] if len(args) == 1 else args),
            got=described(batch),
            hint=f"give both by name or both by position, or {_OWN}",
        )
    missing = [name for name in wanted if name not in batch]
    other = [name for name in batch if name not in wanted and name not in LABEL_NAMES]
    if missing or other:
        what = f"batch {number} of the calibration inputs "
        what += f"lacks {', '.join(missing)}" if missing else f"also has {', '.join(map(str, other))}"
        got = ", ".join(map(str, batch)) or "nothing"
        raise UsageError(what, expected=f"the inputs {', '.join(wanted)}", got=got, hint=_OWN)
    return {name: batch[name] for name in wanted}


def _by_place(batch: object, number: int, example: Args) -> tuple[Args, Sequence[object]]:
    """The positional inputs in an array, a tuple or a list, and what comes behind them."""
    count = len(example)
    takes_list = count == 1 and isinstance(example[0], (list, tuple))
    if is_array(batch) and count == 1 and not takes_list:
        return (batch,), ()
    if isinstance(batch, (tuple, list)) and batch:
        first = batch[0]
        if takes_list and all(map(is_array, batch)):
            return (list(batch),), ()
        listed = isinstance(first, (tuple, list)) and all(map(is_array, first))
        if takes_list and listed:
            return (list(first),), batch[1:]
        if isinstance(first, (tuple, list)) and len(first) == count and all(map(_alike, first, example)):
            return tuple(first), batch[1:]
        if not takes_list and len(batch) >= count:
            return tuple(batch[:count]), batch[count:]
    many = f"a tuple of {count} ({', '.join(described(value) for value in example)})"
    raise UsageError(
        f"batch {number} of the calibration inputs is not what the model takes",
        expected="a list of images, each a tensor" if takes_list else many if count > 1 else described(example[0]),
        got=described(batch),
        hint=_OWN,
    )


def _alike(value: object, example: object) -> bool:
    """Whether a value can be an input like the example's: an array, a list or a dict as it is."""
    kind = next((kind for kind in (Mapping, (list, tuple)) if isinstance(example, kind)), None)
    return is_array(value) if kind is None else isinstance(value, kind)


def _labels(value: object, samples: int) -> Tensor | None:
    """What comes beside the inputs as classes ``(N,)``, or as 0 and 1 ``(N, classes)``; None where it is neither."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (int, float)) for item in value):
        value = as_tensor(value)
    if not is_array(value) or value.ndim not in (1, 2) or len(value) != samples or not value.shape[-1]:
        return None
    labels = value.detach().cpu() if isinstance(value, Tensor) else as_tensor(np.array(value))
    if labels.is_complex() or (labels.is_floating_point() and not bool((labels == labels.round()).all())):
        return None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and not bool(((labels == 0) | (labels == 1)).all()):
        return None
    return labels.long()


def _count(values: Sequence[object]) -> tuple[int, bool]:
    """How many samples some inputs hold, and whether they have no batch dim in common."""
    values = [*opened_dicts(values)]
    sizes = [int(value.shape[0]) for value in values if is_array(value) and value.ndim]
    if any(isinstance(value, (list, tuple)) for value in values):
        lists = [len(value) for value in values if isinstance(value, (list, tuple))]
        return (*sizes, *lists, 1)[0], True
    return (0, False) if 0 in sizes else ((*sizes, 1)[0], len(set(sizes)) != 1)
