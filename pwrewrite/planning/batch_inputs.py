"""One batch of calibration inputs: what of it the model takes, by what the example inputs say, and how it is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..core.errors import UsageError
from ..targets.arrays import LABEL_NAMES


@dataclass(frozen=True)
class Batch:
    """A batch, or a part of one, as it came.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        labels: The classes that came with them.
        samples: How many samples it holds.
        number: The number of the batch it is from.
        first: The place in that batch of its first sample.
        whole: Whether it cannot be cut: its inputs share no batch dim.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Any
    samples: int
    number: int
    first: int = 0
    whole: bool = False

    def part(self, start: int, stop: int) -> Batch:
        """Some of its samples; not for one that is ``whole``."""

        def cut(value: Any) -> Any:
            return value[start:stop] if is_array(value) and value.ndim else value

        return Batch(
            tuple(cut(value) for value in self.args),
            {name: cut(value) for name, value in self.kwargs.items()},
            None if self.labels is None else self.labels[start:stop],
            stop - start,
            self.number,
            self.first + start,
        )


def is_array(value: object) -> bool:
    """Whether a value is a tensor or a numpy array."""
    return isinstance(value, (Tensor, np.ndarray))


def is_classes(value: object) -> bool:
    """Whether a value is an array of integers."""
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return isinstance(value, np.ndarray) and value.dtype.kind in "iub"


def described(value: object) -> str:
    """A value in a few words: ``float32 8×3×32×32``, ``a list of 2``, ``str``."""
    if is_array(value):
        name = str(value.dtype).removeprefix("torch.")  # type: ignore[attr-defined]
        return f"{name} {'×'.join(str(n) for n in value.shape) or 'scalar'}"  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(described(v) for v in value[:3]) + (", …" if len(value) > 3 else "")
        return f"a {type(value).__name__} of {len(value)}" + (f" ({inner})" if value else "")
    return type(value).__name__


def sort_out(batch: object, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Batch, str | None]:
    """Tells the inputs in a batch from the labels beside them.

    Args:
        batch: What came: an array, a tuple or list of positional inputs, a dict of keyword ones.
        number: Its number.
        args: The example inputs, positional.
        kwargs: The example inputs by name.

    Returns:
        The batch, and what should be told about it.

    Raises:
        UsageError: It has another number of inputs, or other names, than the example, or holds no sample.
    """
    if isinstance(batch, Mapping):
        given, labels, note = _by_name(batch, number, args, kwargs), None, None
        names = [n for n in batch if n not in given]
        if names and is_classes(batch[names[0]]):
            labels, note = _flat(batch[names[0]])
        sorted_out: tuple[tuple[Any, ...], dict[str, Any]] = ((), given)
    else:
        values, labels, note = _by_place(batch, number, args or tuple(kwargs.values()))
        if kwargs and not args:
            sorted_out = ((), dict(zip(kwargs, values, strict=True)))
        else:
            sorted_out = (values, {})
    samples, whole = _count(*sorted_out)
    if not samples:
        raise UsageError(f"batch {number} of the calibration inputs is empty", got=described(batch))
    return Batch(*sorted_out, labels, samples, number, 0, whole), note


def _by_name(batch: Mapping[Any, Any], number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword inputs in a dict."""
    if args or not kwargs:
        raise UsageError(
            f"batch {number} of the calibration inputs is a dict, and the example inputs are positional",
            expected=described(args[0]) if len(args) == 1 else described(args),
            got=described(batch),
            hint="give both by name or both by position",
        )
    missing = [name for name in kwargs if name not in batch]
    other = [name for name in batch if name not in kwargs and name not in LABEL_NAMES]
    if missing or other:
        lacks = f"lacks {', '.join(missing)}" if missing else f"also has {', '.join(map(str, other))}"
        raise UsageError(
            f"batch {number} of the calibration inputs {lacks}",
            expected=f"the inputs {', '.join(kwargs)}",
            got=", ".join(map(str, batch)) or "nothing",
        )
    return {name: batch[name] for name in kwargs}


def _by_place(batch: object, number: int, example: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any, str | None]:
    """The positional inputs in an array, a tuple or a list; the labels; and what should be told."""
    count = len(example)
    takes_list = count == 1 and isinstance(example[0], (list, tuple))
    if is_array(batch) and count == 1 and not takes_list:
        return (batch,), None, None
    if isinstance(batch, (tuple, list)) and batch:
        if takes_list:
            return _listed(batch, number)
        inner = batch[0]
        paired = len(batch) == 2 and count > 1 and isinstance(inner, (tuple, list)) and len(inner) == count
        if paired and _are_labels(batch[1], inner[0]):
            return tuple(inner), *_flat(batch[1])
        if len(batch) == count:
            return tuple(batch), None, None
        if len(batch) == count + 1 and _are_labels(batch[-1], inner):
            return tuple(batch[:-1]), *_flat(batch[-1])
    many = f"a tuple of {count} ({', '.join(described(v) for v in example)})"
    hint = None
    if isinstance(batch, (tuple, list)) and len(batch) == count + 1:
        hint = "beside the inputs only an integer tensor of as many labels is left out: give the inputs alone"
    raise UsageError(
        f"batch {number} of the calibration inputs is not what the model takes",
        expected=many if count > 1 or takes_list else described(example[0]),
        got=described(batch),
        hint=hint,
    )


def _listed(batch: Sequence[Any], number: int) -> tuple[tuple[Any, ...], None, str | None]:
    """The one list of images of a detector: the batch itself, or its first entry with targets beside it."""
    if all(is_array(value) for value in batch):
        return (list(batch),), None, None
    first = batch[0]
    if isinstance(first, (tuple, list)) and first and all(is_array(value) for value in first) and len(batch) <= 2:
        note = "the second entry of each batch was taken for targets and left out" if len(batch) == 2 else None
        return (list(first),), None, note
    raise UsageError(
        f"batch {number} of the calibration inputs is not what the model takes",
        expected="a list of images, each a tensor",
        got=described(batch),
    )


def _are_labels(value: object, images: object) -> bool:
    """Whether a value holds an integer for each sample, or a map of integers."""
    if not is_classes(value) or not is_array(images):
        return False
    return bool(value.ndim and images.ndim and value.shape[0] == images.shape[0])  # type: ignore[attr-defined]


def _flat(labels: Any) -> tuple[Any, str | None]:
    """Labels, one per sample; and what should be told where they are something else."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 1:
        return labels, None
    return None, f"{described(labels)} beside the inputs was taken for targets and left out"


def _count(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, bool]:
    """How many samples some inputs hold, and whether they have no batch dim in common."""
    values = [value for value in (*args, *kwargs.values()) if not is_array(value) or value.ndim]
    arrays = [value for value in values if is_array(value)]
    if any(isinstance(value, (list, tuple, Mapping)) for value in values):
        lists = [len(value) for value in values if isinstance(value, (list, tuple))]
        return (arrays[0].shape[0] if arrays else lists[0] if lists else 1), True
    sizes = {int(value.shape[0]) for value in arrays}
    if 0 in sizes:
        return 0, False
    return (int(arrays[0].shape[0]) if arrays else 1), len(sizes) != 1
