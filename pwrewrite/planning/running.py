"""Running a model for what it gives, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..capturing.inventory import Inventory
from ..capturing.state import untouched
from ..core.files import same_directory
from ..core.nested import Args, Kwargs
from ..core.random_state import seed_all

Chunk = tuple[Args, Kwargs]
"""Positional and keyword inputs of one run of the model."""

Say = Callable[[str, float | None], None]
"""Called at each step of some work with what it is, and with the part that is done; None where that is not known."""


def samples_of(args: Args, kwargs: Kwargs) -> int:
    """How many samples a chunk holds: the first dim of its first tensor, or the length of its first list."""
    for value in opened_dicts((*args, *kwargs.values())):
        if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim()):
            return len(value)
    return 1


def first_samples(chunk: Chunk, count: int) -> Chunk:
    """So many samples of a chunk at most: of what is as long as its batch, at the top level or in a dict."""
    there = samples_of(*chunk)

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: cut(inner) for name, inner in value.items()}
        sized = value.dim() > 0 if isinstance(value, Tensor) else isinstance(value, (list, tuple))
        return value[:count] if sized and len(value) == there else value

    args, kwargs = chunk
    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


def opened_dicts(values: Iterable[Any]) -> Iterator[Any]:
    """Inputs, and of a dict what it holds."""
    for value in values:
        yield from opened_dicts(value.values()) if isinstance(value, Mapping) else (value,)


@contextmanager
def evaluating(model: nn.Module, *, buffers: bool = True) -> Iterator[None]:
    """The model in eval mode; afterwards it and the random states are as they were, what its code cached included.

    With ``buffers=False`` its buffers and parameters are not: they are being fitted.
    """
    with untouched(Inventory(model), values=buffers):
        model.eval()
        yield


@contextmanager
def holding(tensor: Tensor, values: Tensor) -> Iterator[None]:
    """A parameter or buffer that holds other values."""
    before = tensor.data
    tensor.data = values.to(before)
    try:
        yield
    finally:
        tensor.data = before


def run_seeded(model: nn.Module, chunk: Chunk, seed: int) -> object:
    """A forward that draws the random numbers that go with a seed; inside `evaluating`, which puts the states back."""
    seed_all(seed)
    args, kwargs = chunk
    with same_directory():
        return model(*args, **kwargs)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest dtype to sum in on a device."""
    return torch.float32 if device.type == "mps" else torch.float64
