"""What a model holds, and whether that is as it was: the tensors behind a function, and other attributes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import PointwiseActivation
from ..layers.known import hooked

_PLAINEST = (int, float, bool, str, torch.Size)

_OLD_NORMS = ("WeightNorm", "SpectralNorm")
"""Hooks of torch that compute a weight before each call."""


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor where it is held.

    Attributes:
        owner: The dict that holds it.
        name: Its name there.
        tensor: The tensor.
        version: Counts writes; -1 for tensors made in inference mode, whose writes torch does not count.
        pointer: The address of its values.
    """

    owner: dict[str, Any]
    name: str
    tensor: Tensor
    version: int
    pointer: int

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
    """How often a tensor was written; -1 where torch does not count."""
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
            old = next((h for h in module._forward_pre_hooks.values() if type(h).__name__ in _OLD_NORMS), None)
            remedy = (
                "" if old is None else f" ({type(old).__name__} of the older kind; remove it, or rewrite with bake)"
            )
            return f"{where} has hooks{remedy}"
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
