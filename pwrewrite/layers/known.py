"""What a module or a call is, as far as fusing is concerned: an activation, an identity, something that drops."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.ReLU6: ("relu6", ()),
    nn.SiLU: ("silu", ()),
    nn.GELU: ("gelu", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
}
_FUNCTIONS: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    "relu": ("relu", ()),
    "relu6": ("relu6", ()),
    "silu": ("silu", ()),
    "gelu": ("gelu", ()),
    "hardswish": ("hardswish", ()),
    "hardsigmoid": ("hardsigmoid", ()),
    "hardtanh": ("hardtanh", (("min_val", -1.0), ("max_val", 1.0))),
    "clamp": ("hardtanh", (("min", None), ("max", None))),
    "clip": ("hardtanh", (("min", None), ("max", None))),
    "leaky_relu": ("leaky_relu", (("negative_slope", 0.01),)),
    "sigmoid": ("sigmoid", ()),
    "tanh": ("tanh", ()),
}

Found = tuple[str, tuple[float, ...]]
"""An activation's name and numbers."""


def module_activation(module: nn.Module) -> Found | None:
    """The activation that a stock module is; None for anything else."""
    for kind in type(module).__mro__:
        known = _MODULES.get(kind)
        if known is None:
            continue
        if type(module).forward is not kind.__dict__.get("forward", type(module).forward) or "forward" in vars(module):
            return None
        name, attributes = known
        if name == "gelu":
            name = "gelu_tanh" if module.approximate == "tanh" else "gelu"
        numbers = tuple(float(getattr(module, attribute)) for attribute in attributes)
        return (name, numbers) if _ordered(name, numbers) else None
    return None


def call_activation(node: fx.Node) -> Found | None:
    """The activation that a function or method call is; None for anything else."""
    if node.op not in ("call_function", "call_method"):
        return None
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    known = _FUNCTIONS.get(target.removesuffix("_"))
    if known is None:
        return None
    name, parameters = known
    numbers = []
    for i, (key, default) in enumerate(parameters, start=1):
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


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
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
