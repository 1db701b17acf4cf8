"""What a model holds, and whether that is as it was: the tensors behind a function, and other attributes.

On a `TrialCopy` is tried what a model's forward does to it: what it makes on first use, and at every run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.nested import deep_copy, map_tensors, tensors_of
from ..layers import PointwiseActivation
from ..layers.known import hooked

_PLAINEST = (int, float, bool, str, torch.Size)

_OLD_NORMS = ("WeightNorm", "SpectralNorm")
"""Hooks of torch that compute a weight before each call."""


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor where it is held."""

    owner: dict[str, Any]  # the dict that holds it
    name: str  # its name there
    tensor: Tensor
    version: int  # counts writes; see `version_of`
    pointer: int  # the address of its values

    @classmethod
    def of(cls, owner: dict[str, Any], name: str, tensor: Tensor) -> Held:
        """A tensor as it is now."""
        return cls(owner, name, tensor, version_of(tensor), tensor.data_ptr())

    @property
    def key(self) -> tuple[int, str]:
        """Where it is held."""
        return id(self.owner), self.name

    def unchanged(self) -> bool:
        """Whether it is the same tensor with the same values."""
        tensor = self.tensor
        return (
            self.owner.get(self.name) is tensor
            and (self.version < 0 or tensor._version == self.version)
            and tensor.data_ptr() == self.pointer
        )


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written; -1 for one made in inference mode, whose writes torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def held_tensors(model: nn.Module) -> list[Held] | str:
    """The tensors that a model's modules hold, as they are now; or why one of them cannot be watched."""
    held: list[Held] = []
    for path, module in model.named_modules():
        for owner in (module._parameters, module._buffers, vars(module)):
            for name, tensor in owner.items():
                if not isinstance(tensor, Tensor):
                    continue
                where = f"{path}.{name}" if path else name
                if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu:
                    return f"{where} is no plain tensor on the CPU"
                if tensor.is_inference() and owner is module._parameters:
                    return f"{where} was made in inference mode, where torch counts no changes: replace it by its clone"
                held.append(Held.of(owner, name, tensor))
    return held


def obstacle(model: nn.Module) -> str | None:
    """What a model's modules have that no function could; None where there is nothing."""
    for path, module in model.named_modules():
        where = path or "the model"
        activation = module.activation if isinstance(module, PointwiseActivation) else None
        if module.training:
            return f"{where} is in training mode"
        if hooked(module):
            old = (type(h).__name__ for h in module._forward_pre_hooks.values())
            kind = next((name for name in old if name in _OLD_NORMS), None)
            remedy = f"{kind} of the older kind; remove it, or rewrite with bake" if kind else "remove them first"
            return f"{where} has hooks ({remedy})"
        own = vars(module).get("forward")
        if own is not None and getattr(own, "__self__", None) is not module:  # a copy of it may run this very module
            return f"{where} has a forward() of its own"
        if activation == "gelu_tanh" or (isinstance(module, nn.GELU) and module.approximate != "none"):
            return f"{where}: the fuser takes the tanh approximation of GELU for GELU itself"
        if isinstance(module, (nn.RNNBase, torch.jit.ScriptModule)):
            return f"{where} is a {type(module).__name__}"
    return None


def attributes(model: nn.Module) -> list[Any]:
    """What a model's modules hold, directly or in a container; but not the caches of layers of this package."""
    values: list[Any] = []
    for module in model.modules():
        if isinstance(module, PointwiseActivation) or hasattr(module, "compiled"):
            continue
        for value in vars(module).values():
            values.append(value)
            if isinstance(value, dict):
                values += value.values()
            elif isinstance(value, (list, tuple, set)):
                values += value
    return values


def same_attributes(before: Iterable[Any], now: Iterable[Any]) -> bool:
    """Whether two lists hold the same objects, or equal ones of the plainest types."""
    before, now = list(before), list(now)
    return len(before) == len(now) and all(
        a is b or (type(a) is type(b) and type(a) in _PLAINEST and a == b) for a, b in zip(before, now)
    )


class TrialCopy:
    """A copy of a model that holds some tensors, to try what its forward does to it.

    Parameters share the original's values; buffers are copies, so that what the model writes to its own reaches none of
    them; tensors made in inference mode become ordinary ones.

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
        empty = torch.empty(0, device="cpu")
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

    def shares_memory(self, outputs: Iterable[Tensor], inputs: tuple[Tensor, ...]) -> bool:
        """Whether an output is no plain tensor, or is in the memory of an input, a parameter or a buffer."""
        memory = {t.untyped_storage().data_ptr() for t in (*inputs, *self._tensors)}
        return any(type(t) is not Tensor or t.untyped_storage().data_ptr() in memory for t in outputs)
