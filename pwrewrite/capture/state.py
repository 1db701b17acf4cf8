"""Leaving a model as it was: a snapshot of everything that running its forward can change, and its restoration.

Capturing runs the model's own code, which may store tensors (``self.last = x``), count calls, grow lists or draw random
numbers. Restored are every module's ``__dict__`` (by identity, so training flags, hooks, replaced submodules and new
attributes are covered), the contents of plain containers in it, the buffers where real values ran, and the random states
of torch, Python and NumPy. Objects that the model only refers to (a config object's attributes) are not followed.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CONTAINERS = (dict, list, set, deque)
_DEPTH = 3


def _contents(value: Any, found: list[tuple[Any, Any]], depth: int) -> None:
    """Appends ``(container, shallow copy)`` for ``value`` and the containers in it."""
    found.append((value, value.copy()))
    if depth and value:
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, _CONTAINERS):
                _contents(item, found, depth - 1)


def _refill(container: Any, saved: Any) -> None:
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(saved)
    else:
        container.extend(saved)


def _changed(container: Any, saved: Any) -> bool:
    if len(container) != len(saved):
        return True
    if isinstance(container, dict):
        return any(k not in container or container[k] is not v for k, v in saved.items())
    if isinstance(container, set):
        return any(item not in container for item in saved)
    return any(a is not b for a, b in zip(container, saved))


@contextmanager
def untouched(model: nn.Module, *, values: bool) -> Iterator[None]:
    """Restores ``model`` and the random states on leaving, whatever happened in between.

    Args:
        model: The model whose state is kept.
        values: Whether real values will run through it, so that buffers may change too.
    """
    modules = list(model.modules())
    dicts = [(vars(module), vars(module).copy()) for module in modules]
    containers: list[tuple[Any, Any]] = []
    for attributes, _ in dicts:
        for value in attributes.values():
            if isinstance(value, _CONTAINERS):
                _contents(value, containers, _DEPTH)
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta] if values else []
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    python_state = random.getstate()
    numpy: Any = sys.modules.get("numpy.random")
    numpy_state = numpy.get_state() if numpy is not None else None
    try:
        yield
    finally:
        for attributes, saved in dicts:
            if _changed(attributes, saved):
                attributes.clear()
                attributes.update(saved)
        for container, saved in containers:
            if _changed(container, saved):
                _refill(container, saved)
        with torch.no_grad():
            for buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        random.setstate(python_state)
        if numpy_state is not None:
            numpy.set_state(numpy_state)
