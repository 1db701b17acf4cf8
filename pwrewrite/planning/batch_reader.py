"""Whether a batch of calibration inputs is what the model takes, and the tensors made of it.

The example inputs say what a model takes: dims, channels and kind of dtype must be theirs; the batch size and the sizes
after the channels may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.nested import Args, Kwargs, Tree
from .batch_inputs import Batch, described, is_array
from .running import Chunk

_SCALE = "scale and normalise the images as in training, with a function as preprocess (--preprocess file.py:NAME)"


class _Place(NamedTuple):
    """An input of a batch, and which image of it where it is a list of them."""

    batch: Batch
    name: str
    image: int | None = None

    def __str__(self) -> str:
        inner = f"image {self.image} of " if self.image is not None else ""
        return f"{inner}{self.name + ' of ' if self.name else ''}batch {self.batch.number} of the calibration inputs"


class Reader:
    """Makes the tensors that a model takes, as the example inputs are, of the arrays in a batch."""

    def __init__(self, args: Args, kwargs: Kwargs) -> None:
        self.args, self.kwargs, self.notes = args, kwargs, list[str]()

    def check(self, batch: Batch) -> None:
        """Refuses an input of other dims, channels or another kind of dtype than the example's; reads no values."""
        self._each(batch, _check)

    def read(self, batch: Batch, device: str | None = None) -> Chunk:
        """What the model takes, of a batch that `check` let through, on its own device if None; refuses NaN and Inf."""
        return self._each(batch, partial(self._cast, device=device))

    def _each(self, batch: Batch, take: Callable[[Tree, Tensor, _Place], Tensor | None]) -> Chunk:
        """A batch with something done to each of its arrays."""

        def visit(value: Tree, example: Tree, place: _Place) -> Tree:
            if isinstance(example, (list, tuple)) and isinstance(value, (list, tuple)):
                image = example[0] if example else None
                return [visit(v, image, place._replace(image=i)) for i, v in enumerate(value)]
            if isinstance(example, Mapping) and isinstance(value, Mapping) and example.keys() == value.keys():
                names = {key: f"{place.name}.{key}".lstrip(".") for key in value}
                return {key: visit(v, example[key], place._replace(name=names[key])) for key, v in value.items()}
            return take(value, example, place) if isinstance(example, Tensor) else value

        names = [f"input {i}" for i in range(len(self.args))] if len(self.args) > 1 else [""]
        args = zip(batch.args, self.args, names, strict=True) if batch.args else ()
        kwargs = {name: visit(v, self.kwargs[name], _Place(batch, f"input {name}")) for name, v in batch.kwargs.items()}
        return tuple(visit(value, example, _Place(batch, name)) for value, example, name in args), kwargs

    def _cast(self, value: Tree, example: Tensor, place: _Place, device: str | None) -> Tensor:
        """An array as the tensor that the model takes."""
        tensor = value.detach() if isinstance(value, Tensor) else _tensor(value, place)
        _check_finite(tensor, place)
        cast = tensor.to(example.dtype)
        if cast.dtype.itemsize < tensor.dtype.itemsize:
            _check_finite(cast, place, f" as {str(cast.dtype).removeprefix('torch.')}")
        self._look_at_range(tensor, example)
        return cast.to(device or ("cpu" if example.is_meta else example.device))

    def _look_at_range(self, tensor: Tensor, example: Tensor) -> None:
        """Notes images that look like bytes, where the example does not."""
        if self.notes or tensor.dim() < 3 or not tensor.is_floating_point() or float(tensor.max()) < 64:
            return
        whole = float(tensor.min()) >= 0 and bool((tensor == tensor.round()).all())
        if whole and (example.is_meta or float(example.abs().max()) < 32):
            self.notes.append(
                f"the calibration inputs are whole numbers up to {float(tensor.max()):g}: if the model takes images "
                "that are scaled and normalised, do that first (--preprocess)"
            )


def _tensor(array: np.ndarray, place: _Place, shown: object = None) -> Tensor:
    """A tensor, in memory of its own, with the values of an array, which may be mapped from a file."""
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        got = described(array if shown is None else shown)
        raise UsageError(f"{place} is of a dtype that torch does not know", got=got) from error


def _check(value: Tree, example: Tensor, place: _Place) -> None:
    """Refuses an array of another shape or kind of dtype than the example's."""
    if not is_array(value):
        raise UsageError(f"{place} is not a tensor", expected=described(example), got=described(value))
    if isinstance(value, np.ndarray):
        value = _tensor(np.empty(0, value.dtype), place, value).new_empty(value.shape, device="meta")
    listed, got, hint = place.image is not None, described(value), None
    channels = 0 if listed else 1
    if value.dim() != example.dim() or value.shape[channels : channels + 1] != example.shape[channels : channels + 1]:
        if value.dim() == example.dim() >= 3 and value.shape[-1] == example.shape[channels]:
            order = (*range(channels), value.dim() - 1, *range(channels, value.dim() - 1))
            hint = f"the channels come last: x.permute{order}"
            if value.dtype is torch.uint8 and example.is_floating_point():
                hint += f"; and {_SCALE}"
        elif not listed and value.dim() == example.dim() - 1 and example.dim() > 1:
            batched = value.shape[0] == example.shape[1] or example.dim() == 2
            hint = "a batch dim is missing: x[None]" if batched else None
            if not batched and example.shape[1] == 1:
                hint = "the dim of the channel is missing: x[:, None]"
        expected = f"{str(example.dtype).removeprefix('torch.')} {_pattern(example, listed)}"
        raise UsageError(f"{place} has another shape than the model takes", expected=expected, got=got, hint=hint)
    if _kind(value) != _kind(example):
        hint = _SCALE if example.is_floating_point() and value.dtype is torch.uint8 else None
        raise UsageError(
            f"{place} has another dtype than the model takes", expected=described(example), got=got, hint=hint
        )


def _kind(t: Tensor) -> tuple[bool, ...]:
    return t.is_floating_point(), t.is_complex(), t.dtype is torch.bool


def _pattern(example: Tensor, listed: bool) -> str:
    """The shapes like an example's: ``N×3×H×W``."""
    sizes = [str(n) for n in example.shape]
    first = 0 if listed else 1
    sizes[first + 1 :] = {1: "L", 2: "HW", 3: "DHW"}.get(len(sizes) - first - 1, sizes[first + 1 :])
    if not listed and sizes:
        sizes[0] = "N"
    return "×".join(sizes) or "scalar"


def _check_finite(tensor: Tensor, place: _Place, how: str = "") -> None:
    """Refuses NaN and Inf, and names the sample."""
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    sample = place.image
    if sample is None:
        rows = ~finite.reshape(len(finite) if finite.dim() else 1, -1).all(1)
        sample = place.batch.first + int(rows.nonzero()[0])
    what = "NaN" if bool(torch.isnan(tensor).any()) else "Inf"
    raise UsageError(
        f"the calibration inputs hold {what}{how} in {'image' if tensor.dim() >= 3 else 'sample'} {sample} of batch "
        f"{place.batch.number}, counted from 0",
        where=place.name or None,
        got=None if how else f"{int((~finite).sum())} such values among the {finite.numel()} read with it",
        hint="the model's dtype does not reach that far" if how else "leave it out, or find what makes it",
    )
