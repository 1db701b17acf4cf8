"""A model run again and again on the same inputs with a change here or there: what runs before a change runs once.

`Replay` notes what every call of a module gives, within an allowance of memory, and gives that out again for calls
that end before the first one of a changed module begins. On average half of each run is saved.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..capturing.state import contents, replaced, same
from ..core.nested import Tree, tensors_of
from ..core.random_state import random_states, seed_all
from .running import Chunk, run_seeded

_BYTES = 2**29
"""The most that is kept. Calls that are deepest in others go first, as few of them save what one above them does."""
_DEPTH = 2
"""How far into containers that modules hold it is seen whether a run changes them."""
_SEED = 0
"""Each run draws the random numbers that go with it."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a module that was noted: the number of the next call after it, and what it gave."""

    module: nn.Module
    end: int
    output: Tensor


class Replay:
    """A model, in evaluation and without gradients, on fixed inputs.

    ``outputs`` are what the model, as it was at first, makes of them.
    """

    def __init__(self, model: nn.Module, chunk: Chunk) -> None:
        self._chunk, self._model = chunk, model
        self._calls = list[nn.Module]()
        self._noted = dict[int, _Call]()
        held = list[tuple[Tree, Tree]]()
        for module in model.modules():
            contents(vars(module), held, _DEPTH)
        buffers = list(model.buffers())
        versions = _versions(buffers)
        seed_all(_SEED)
        state = random_states()
        self.outputs = self._run(self._noting())
        if versions != _versions(buffers) or random_states() != state or not all(same(*each) for each in held):
            self._noted.clear()  # calls leave something behind for later ones

    def changed(self, paths: Collection[str]) -> object:
        """What the model makes of the inputs now that some modules, or their weights or hooks, have changed."""
        changed = _sharing(self._model, [self._model.get_submodule(path) for path in paths])
        first = next((i for i, module in enumerate(self._calls) if module in changed), 0)
        number = 0

        def call(inner: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal number
            noted = self._noted.get(number)
            if noted is not None and noted.end <= first and noted.module is module:
                number = noted.end
                return noted.output.clone()
            number += 1
            return inner(module, *args, **kwargs)

        return self._run(call)

    def _run(self, call: Any) -> object:
        inner, thread = nn.Module.__call__, threading.get_ident()

        def patched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:  # in whatever order
                return inner(module, *args, **kwargs)
            return call(inner, module, *args, **kwargs)

        with replaced(nn.Module, "__call__", patched):
            return run_seeded(self._model, self._chunk, _SEED)

    def _noting(self) -> Any:
        """Calls a module and notes it, unless it writes into what it reads, or gives that or anything but a tensor."""
        kept, depth, size = list[tuple[int, int]](), 0, 0

        def call(inner: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth, size
            number, read = len(self._calls), tensors_of((args, kwargs))
            versions = _versions(read)
            self._calls.append(module)
            depth += 1
            try:
                output = inner(module, *args, **kwargs)
            finally:
                depth -= 1
            if depth and type(output) is Tensor and versions == _versions(read) and _apart(output, read):
                self._noted[number] = _Call(module, len(self._calls), output.clone())
                heapq.heappush(kept, (-depth, number))
                size += output.nbytes
            while size > _BYTES:
                size -= self._noted.pop(heapq.heappop(kept)[1]).output.nbytes
            return output

        return call


def _versions(tensors: Collection[Tensor]) -> list[object]:
    """Numbers that change where a tensor is written into; what is never equal of a tensor that has none."""
    return [object() if t.is_inference() else t._version for t in tensors]


def _apart(output: Tensor, read: Collection[Tensor]) -> bool:
    """Whether a tensor has memory of its own; False for tensors of kinds that cannot tell."""
    try:
        return output.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in read}
    except (RuntimeError, NotImplementedError):
        return False


def _sharing(model: nn.Module, modules: Collection[nn.Module]) -> set[nn.Module]:
    """Modules, and all those of a model that hold one of their own parameters or buffers."""
    owned = {id(t) for module in modules for t in _own(module)}
    return {*modules, *(module for module in model.modules() if any(id(t) in owned for t in _own(module)))}


def _own(module: nn.Module) -> Iterator[Tensor]:
    held = chain(module._parameters.values(), module._buffers.values())
    return (t for t in held if t is not None)
