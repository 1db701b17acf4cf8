"""A copy of a model on which is tried what its forward does to it: what it makes on first use, and at every run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.nested import deep_copy, map_tensors, tensors_of
from .held_tensors import Held, attributes, same_attributes, version_of


class TrialCopy:
    """A copy of a model, to try what its forward does to it.

    Parameters share the original's values; buffers are copies, so that what the model writes to its own reaches none of
    them; tensors made in inference mode become ordinary ones.

    Args:
        model: The model.
        held: The tensors that it holds.

    Attributes:
        found: Tensors that the copy has from containers of the original's.
        replaced: Keys of the original's tensors in whose place the first run put others.
    """

    def __init__(self, model: nn.Module, held: list[Held]) -> None:
        memo: dict[int, Any] = {id(t): nn.Parameter(t.detach(), requires_grad=False) for t in model.parameters()}
        memo |= {id(t): t.detach().clone() for t in model.buffers()}
        memo |= {id(each.tensor): each.tensor.clone() for each in held if each.tensor.is_inference()}
        self._model: nn.Module = deep_copy(model, memo)
        self.found = [Held.of({"": t}, "", t) for t in memo.get(id(memo), ()) if isinstance(t, Tensor)]
        self.replaced: set[tuple[int, str]] = set()
        owners: dict[int, dict[str, Any]] = {}
        for old, new in zip(model.modules(), self._model.modules()):
            owners |= {id(old._parameters): new._parameters, id(old._buffers): new._buffers, id(vars(old)): vars(new)}
        copies = [owners[id(each.owner)] for each in held]
        self._before = [(each.key, owner, owner.get(each.name)) for each, owner in zip(held, copies)]
        self._structure: Any = None  # of what the last run returned

    def run(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Runs the copy; returns its output tensors."""
        self._structure = self._model(*tensors)
        return self._structure if isinstance(self._structure, Tensor) else tuple(tensors_of(self._structure))

    def template(self) -> Any:
        """What the last run returned, with anything in place of each tensor; None for one tensor."""
        empty = torch.empty(0)
        return None if isinstance(self._structure, Tensor) else map_tensors(self._structure, lambda _: empty)

    def settle(self) -> None:
        """Takes the copy as it is now, after its first run, for what later runs must leave alone."""
        self.replaced = {key for key, owner, tensor in self._before if owner.get(key[1]) is not tensor}
        self._attributes = attributes(self._model)
        self._tensors = [*self._model.parameters(), *self._model.buffers()]
        self._versions = [version_of(t) for t in self._tensors]

    def as_settled(self) -> bool:
        """Whether later runs left the copy alone."""
        return not self._writes() and same_attributes(self._attributes, attributes(self._model))

    def _writes(self) -> bool:
        now = [*self._model.parameters(), *self._model.buffers()]
        same = len(now) == len(self._tensors) and all(a is b for a, b in zip(now, self._tensors))
        return not same or [version_of(t) for t in now] != self._versions

    def difference(self) -> str:
        """What a run changes."""
        if self._writes():
            return "it writes to its own buffers or its inputs"
        if not same_attributes(self._attributes, attributes(self._model)):
            return "it sets attributes of its own at every run"
        return "its first run gives other values than later ones, or it draws random numbers"

    def shares_memory(self, outputs: list[Tensor], inputs: tuple[Tensor, ...]) -> bool:
        """Whether an output is no plain tensor, or is in the memory of an input, a parameter or a buffer."""
        memory = {t.untyped_storage().data_ptr() for t in (*inputs, *self._tensors)}
        return any(type(t) is not Tensor or t.untyped_storage().data_ptr() in memory for t in outputs)
