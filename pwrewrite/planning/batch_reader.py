"""Whether a batch of calibration inputs is what the model takes, and the tensors made of it.

The example inputs say what a model takes. Dims, channels and kind of dtype must be theirs; the batch size and the sizes
after the channels may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UsageError
from .batch_inputs import Batch, described, is_array

_SCALE = "scale and normalise the images as in training, with a function as preprocess (--preprocess file.py:NAME)"


class Reader:
    """Makes the tensors that a model takes of the arrays in a batch.

    Args:
        args: The example inputs, positional.
        kwargs: The example inputs by name.
        device: Where they go; where the example inputs are, if None.
        dtype: Of floating inputs; that of the example inputs, if None.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self.device, self.dtype = device, dtype
        self.notes: list[str] = []

    def check(self, batch: Batch) -> None:
        """Checks the shapes and dtypes of a batch, and reads none of it.

        Args:
            batch: The batch.

        Raises:
            UsageError: An input has other dims, channels or another kind of dtype than the example.
        """
        self._each(batch, self._fits)

    def read(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Casts a batch, and checks its values.

        Args:
            batch: The batch, which `check` let through.

        Returns:
            Positional and keyword inputs.

        Raises:
            UsageError: An input holds NaN or Inf.
        """
        return self._each(batch, self._cast)

    def _each(self, batch: Batch, take: Callable[..., Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A batch with something done to each of its arrays."""
        many = len(self.args) > 1

        def visit(value: Any, example: Any, name: str, listed: int | None = None) -> Any:
            if isinstance(example, (list, tuple)) and isinstance(value, (list, tuple)):
                image = example[0] if example else None
                return [visit(v, image, name, place) for place, v in enumerate(value)]
            if isinstance(example, Mapping) and isinstance(value, Mapping) and example.keys() == value.keys():
                return {key: visit(v, example[key], f"{name}.{key}".lstrip("."), listed) for key, v in value.items()}
            return take(value, example, name, batch, listed) if isinstance(example, Tensor) else value

        return (
            tuple(
                visit(value, example, f"input {place}" if many else "")
                for place, (value, example) in enumerate(zip(batch.args, self.args, strict=bool(batch.args)))
            ),
            {name: visit(value, self.kwargs[name], f"input {name}") for name, value in batch.kwargs.items()},
        )

    def _fits(self, value: Any, example: Tensor, name: str, batch: Batch, listed: int | None) -> None:
        """Refuses an array of another shape or kind of dtype."""
        place = self._place(name, batch, listed)
        if not is_array(value):
            raise UsageError(f"{place} is not a tensor", expected=described(example), got=described(value))
        if isinstance(value, np.ndarray):
            value = _tensor(np.empty(0, value.dtype), place, value).new_empty(value.shape, device="meta")
        _check_shape(value, example, place, listed is not None)
        _check_kind(value, example, place)

    def _cast(self, value: Any, example: Tensor, name: str, batch: Batch, listed: int | None) -> Tensor:
        """An array as the tensor that the model takes."""
        place = self._place(name, batch, listed)
        tensor = value.detach() if isinstance(value, Tensor) else _tensor(value, place)
        _check_finite(tensor, batch, name, listed)
        dtype = (self.dtype or example.dtype) if example.is_floating_point() else example.dtype
        cast = tensor.to(dtype)
        if dtype.itemsize < tensor.dtype.itemsize:
            _check_finite(cast, batch, name, listed, f" as {str(dtype).removeprefix('torch.')}")
        self._look_at_range(tensor, example)
        return cast.to(self.device or ("cpu" if example.is_meta else example.device))

    @staticmethod
    def _place(name: str, batch: Batch, listed: int | None) -> str:
        """Where an input is, for a message."""
        inner = f"image {listed} of " if listed is not None else ""
        return f"{inner}{name + ' of ' if name else ''}batch {batch.number} of the calibration inputs"

    def _look_at_range(self, tensor: Tensor, example: Tensor) -> None:
        """Notes images that look like bytes, where the example does not."""
        if self.notes or tensor.dim() < 3 or not tensor.is_floating_point():
            return
        if float(tensor.max()) < 64 or float(tensor.min()) < 0 or not bool((tensor == tensor.round()).all()):
            return
        if example.is_meta or float(example.abs().max()) < 32:
            self.notes.append(
                f"the calibration inputs are whole numbers up to {float(tensor.max()):g}: if the model takes images "
                "that are scaled and normalised, do that first (--preprocess)"
            )


def _tensor(array: np.ndarray[Any, Any], place: str, shown: object = None) -> Tensor:
    """A tensor, in memory of its own, with the values of an array, which may be mapped from a file.

    Raises:
        UsageError: torch has no such dtype.
    """
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise UsageError(
            f"{place} is of a dtype that torch does not know", got=described(array if shown is None else shown)
        ) from error


def _pattern(example: Tensor, listed: bool) -> str:
    """The shapes like an example's: ``N×3×H×W``."""
    sizes = [str(n) for n in example.shape]
    first = 0 if listed else 1
    letters = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}.get(len(sizes) - first - 1)
    if letters and len(sizes) >= 2:
        sizes[first + 1 :] = letters
    if not listed and sizes:
        sizes[0] = "N"
    return "×".join(sizes) or "scalar"


def _check_shape(tensor: Tensor, example: Tensor, place: str, listed: bool) -> None:
    """Refuses other dims and channels than the example's."""
    channels = 0 if listed else 1
    same = tensor.dim() == example.dim()
    if same and (tensor.dim() <= channels or tensor.shape[channels] == example.shape[channels]):
        return
    hint = None
    if tensor.dim() == example.dim() >= 3 and tensor.shape[-1] == example.shape[channels]:
        order = (*range(channels), tensor.dim() - 1, *range(channels, tensor.dim() - 1))
        hint = f"the channels come last: x.permute{order}"
        if tensor.dtype is torch.uint8 and example.is_floating_point():
            hint += f"; and {_SCALE}"
    elif not listed and tensor.dim() == example.dim() - 1 and example.dim() > 1:
        hint = "a batch dim is missing: x[None]"
    raise UsageError(
        f"{place} has another shape than the model takes",
        expected=f"{str(example.dtype).removeprefix('torch.')} {_pattern(example, listed)}",
        got=described(tensor),
        hint=hint,
    )


def _check_kind(tensor: Tensor, example: Tensor, place: str) -> None:
    """Refuses another kind of dtype than the example's."""

    def kind(t: Tensor) -> str:
        whole = "bool" if t.dtype is torch.bool else "integer"
        return "floating" if t.is_floating_point() else "complex" if t.is_complex() else whole

    if kind(tensor) == kind(example):
        return
    hint = None
    if example.is_floating_point() and tensor.dtype is torch.uint8:
        hint = _SCALE
    raise UsageError(
        f"{place} has another dtype than the model takes", expected=described(example), got=described(tensor), hint=hint
    )


def _check_finite(tensor: Tensor, batch: Batch, name: str, listed: int | None, how: str = "") -> None:
    """Refuses NaN and Inf, and names the sample."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all()):
        return
    bad = ~torch.isfinite(tensor)
    if listed is None:
        rows = bad.reshape(bad.shape[0] if bad.dim() else 1, -1).any(1)
        listed = batch.first + int(rows.nonzero()[0])
    what = "NaN" if bool(torch.isnan(tensor[bad]).any()) else "Inf"
    noun = "image" if tensor.dim() >= 3 else "sample"
    raise UsageError(
        f"the calibration inputs hold {what}{how} in {noun} {listed} of batch {batch.number}, counted from 0",
        where=name or None,
        got=None if how else f"{int(bad.sum())} such values among the {bad.numel()} read with it",
        hint="the model's dtype does not reach that far" if how else "leave it out, or find what makes it",
    )
