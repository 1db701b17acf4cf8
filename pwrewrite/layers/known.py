"""What a module or a call is, as far as fusing is concerned: an activation, an identity, something that drops."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from ..core.operations import BY_FUNCTION, OPERATIONS

_MODULES = {module: row for row in OPERATIONS if row.kernel is not None for module in row.modules}
_FUNCTIONS = {name: row for name, row in BY_FUNCTION.items() if row.kernel is not None}

Found = tuple[str, tuple[float, ...]]
"""An activation's name and numbers."""


def module_activation(module: nn.Module) -> Found | None:
    """The activation that a stock module is; None for anything else."""
    for kind in type(module).__mro__:
        row = _MODULES.get(kind)
        if row is None or row.kernel is None:
            continue
        if type(module).forward is not kind.__dict__.get("forward", type(module).forward) or "forward" in vars(module):
            return None
        name = row.kernel.name
        if name == "gelu":
            name = "gelu_tanh" if module.approximate == "tanh" else "gelu"
        numbers = tuple(float(getattr(module, attribute)) for attribute, _ in row.scalars)
        return (name, numbers) if _ordered(name, numbers) else None
    return None


def call_activation(node: fx.Node) -> Found | None:
    """The activation that a function or method call is; None for anything else."""
    if node.op not in ("call_function", "call_method"):
        return None
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    row = _FUNCTIONS.get(target.removesuffix("_"))
    if row is None or row.kernel is None:
        return None
    name = row.kernel.name
    numbers = []
    for i, (key, default) in enumerate(row.scalars, start=1):
        value = node.args[i] if len(node.args) > i else node.kwargs.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        numbers.append(float(value))
    if name == "gelu":
        name = "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    if node.kwargs.get("out") is not None or not _ordered(name, tuple(numbers)):
        return None
    return name, tuple(numbers)


def _ordered(name: str, numbers: tuple[float, ...]) -> bool:
    return name != "hardtanh" or numbers[0] < numbers[1]


def is_identity(module: nn.Module) -> bool:
    """Whether a module returns what it is given, in both modes."""
    if type(module) is nn.Identity:
        return not hooked(module)
    if type(module).forward is nn.Sequential.forward and isinstance(module, nn.Sequential):
        return not hooked(module) and all(is_identity(child) for child in module)
    return False


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks that see its calls."""
    return any(
        getattr(module, name, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


DROPOUTS = tuple(module for row in OPERATIONS if row.kind == "dropout" for module in row.modules)
_WORDS = ("drop", "stochasticdepth")


def drops(module: nn.Module) -> bool:
    """Whether a module does something in training only: it drops, and in evaluation returns what it is given."""
    if isinstance(module, DROPOUTS):
        stock = type(module).__module__ == nn.Dropout.__module__
        return stock and "forward" not in vars(module)
    kind = type(module).__name__.lower()
    if not any(word in kind for word in _WORDS) or any(True for _ in module.children()):
        return False
    if any(True for _ in (*module.parameters(), *module.buffers())):
        return False
    x = torch.zeros(2, 3, 4, 4)
    try:
        found: object = copy.deepcopy(module).eval()(x)
    except Exception:
        return False
    return found is x
