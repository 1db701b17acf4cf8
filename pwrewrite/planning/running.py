"""Running a model for what it gives, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..capturing.inventory import Inventory
from ..capturing.state import untouched


def is_classifier(outputs: Any) -> bool:
    """Whether a model's outputs are one tensor of class scores ``(N, classes)``."""
    return isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.shape[1] > 1 and outputs.is_floating_point()


def tensors_in(outputs: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists, dicts and dataclasses, in order."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from tensors_in(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from tensors_in(value)
    elif hasattr(outputs, "__dataclass_fields__"):
        for name in outputs.__dataclass_fields__:
            yield from tensors_in(getattr(outputs, name))


@contextmanager
def evaluating(model: nn.Module, *, buffers: bool = True) -> Iterator[None]:
    """The model in eval mode; afterwards it and the random states are as they were, what its code cached included.

    Args:
        model: The model.
        buffers: Whether its buffers are as they were, too; not where they are being fitted.
    """
    with untouched(Inventory(model), values=buffers):
        model.eval()
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model with parameters that need no gradient, and as they were afterwards."""
    needing = [p for p in model.parameters() if p.requires_grad]
    for parameter in needing:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needing:
            parameter.requires_grad_(True)
