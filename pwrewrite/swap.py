"""Putting one module in another's place, by identity, under every name that it has.

Tracing reports only a module's first name; a model may hold it under several (tied blocks, a list beside an attribute).
`Swap` replaces it in every parent that registers it and can take the replacement back. References that are not
registrations (a plain list, an attribute set past ``nn.Module.__setattr__``, a bound method) would keep calling the old
module: `held_elsewhere` finds them by asking the garbage collector who refers to it.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from types import CellType, FrameType, MethodType, ModuleType
from typing import Any

from torch import nn


def names_of(model: nn.Module, module: nn.Module) -> tuple[str, ...]:
    """Every path under which ``model`` registers ``module``, first name first."""
    return tuple(name for name, found in model.named_modules(remove_duplicate=False) if found is module)


class Swap:
    """One replacement that is done at once and can be undone.

    Args:
        model: The model.
        old: A module registered in it, not ``model`` itself.
        new: What takes its place, in the same training mode.
    """

    def __init__(self, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
        self.old, self.new = old, new
        new.train(old.training)
        self._places = [
            (parent._modules, name)
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child is old
        ]
        self.redo()

    def redo(self) -> None:
        """Puts the new module in."""
        for registry, name in self._places:
            registry[name] = self.new

    def undo(self) -> None:
        """Puts the old module back."""
        for registry, name in self._places:
            registry[name] = self.old


def held_elsewhere(model: nn.Module, modules: Sequence[nn.Module]) -> dict[int, str]:
    """Which modules are referred to other than by registration.

    Args:
        model: The model, which nothing but the caller may refer to (a fresh copy).
        modules: Modules registered in it.

    Returns:
        Identity of a module to what holds it, such as ``a list`` or ``a bound method``.
    """
    wanted = {id(module) for module in modules}
    registries = {id(parent._modules) for parent in model.modules()}
    owners = {id(vars(module)): name or type(module).__name__ for name, module in model.named_modules()}
    found: dict[int, str] = {}
    asked = tuple(modules)
    ours = {id(asked), id(modules)}
    for holder in gc.get_referrers(*asked):
        if id(holder) in registries or id(holder) in ours or isinstance(holder, (FrameType, ModuleType)):
            continue
        what = _describe(holder, owners)
        if what is None:
            continue
        for held in gc.get_referents(holder):
            if id(held) in wanted:
                found.setdefault(id(held), what)
    return found


def _describe(holder: Any, owners: dict[int, str]) -> str | None:
    if isinstance(holder, dict):
        if id(holder) in owners:
            return f"a plain attribute of {owners[id(holder)]}"
        return "a dict"
    if isinstance(holder, MethodType):
        return f"a bound method ({holder.__name__})"
    if isinstance(holder, CellType):
        return "a closure"
    if isinstance(holder, (list, tuple, set, frozenset)):
        return f"a {type(holder).__name__}"
    if isinstance(holder, nn.Module):
        # Newer Pythons keep attributes inline: the object itself refers to what its dict holds.
        return f"a plain attribute of {owners.get(id(vars(holder)), type(holder).__name__)}"
    kind = type(holder)
    if kind.__module__ == "functools" or kind.__module__ == "builtins":
        return f"a {kind.__name__}"
    return f"an object of class {kind.__name__}"
