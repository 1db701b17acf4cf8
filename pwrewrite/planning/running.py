"""Running a model for what it gives, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..capturing.inventory import Inventory
from ..capturing.state import untouched


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
