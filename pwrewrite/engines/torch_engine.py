"""Eager torch: in channels_last, or with the model just as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..capturing.inventory import Inventory
from ..capturing.state import untouched
from ..core.nested import Args, Kwargs, deep_copy, map_tensors
from .engine import Engine, Session, precision_of


class Eager(Engine):
    """Torch without a compiler.

    Args:
        channels_last: Whether a copy in channels_last runs, where there are maps to arrange so; else the model itself.
    """

    name, cpu = "torch", False

    def __init__(self, *, channels_last: bool) -> None:
        self.channels_last = channels_last

    def _session(self, model: nn.Module, args: Args, kwargs: Kwargs) -> Session:
        provider = next((str(p.device) for p in model.parameters()), "cpu")
        precision = precision_of(model)
        if not self.channels_last:
            return Session(model, self._ran(provider, precision), partial(_evaluating, model))
        model = deep_copy(model).eval()
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = _arranged(tensor.data)

        def run(*args: object, **kwargs: object) -> object:
            return model(*map_tensors(args, _arranged), **map_tensors(kwargs, _arranged))

        return Session(run, self._ran(provider, f"{precision}, channels_last"))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    with untouched(Inventory(model), values=True):
        model.eval()
        yield


def _arranged(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


PLAIN = Eager(channels_last=False)
"""What runs where no engine is named: the model in its own memory format."""
ENGINE = Eager(channels_last=True)
