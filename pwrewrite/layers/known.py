"""What a module or a call is, as far as fusing is concerned: an activation, an identity, something that drops.

An activation is a name and a few numbers (``hardtanh`` has two, ``leaky_relu`` one), so that it can stand in a plan.
oneDNN knows others by other names: ``swish`` is ``silu``, ``relu6`` a ``hardtanh`` from 0 to 6. Not among its fused
ones, and so not here: ``elu``, ``selu``, ``celu``, ``mish``, ``softplus``, ``prelu``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from ..core.errors import UsageError
from ..core.operations import BY_FUNCTION, OPERATIONS, FusedActivation

Found = tuple[str, tuple[float, ...]]
"""An activation's name and numbers."""

_MODULES = {module: row for row in OPERATIONS if row.kernel is not None for module in row.modules}
_DROPOUTS = tuple(module for row in OPERATIONS if row.kind == "dropout" for module in row.modules)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _same(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, FusedActivation] = {
    "none": FusedActivation("none", _same, "none"),
    **{row.kernel.name: row.kernel for row in OPERATIONS if row.kernel is not None},
}
"""Name to activation that a kernel applies while it still holds a convolution's output; ``none`` is that alone."""


def checked(name: str, scalars: Sequence[float]) -> tuple[float, ...]:
    """The numbers of an activation; raises `UsageError` if there is none of that name or it takes other numbers."""
    if name not in ACTIVATIONS:
        raise UsageError(f"unknown activation {name!r}", expected=f"one of {', '.join(ACTIVATIONS)}")
    if len(scalars) != ACTIVATIONS[name].count:
        raise UsageError(f"{name} takes {ACTIVATIONS[name].count} number(s)", got=repr(list(scalars)))
    return tuple(map(float, scalars))


def activation_module(name: str, numbers: Sequence[float]) -> nn.Module:
    """The module of an activation, which is not ``none``."""
    if name == "gelu_tanh":
        return nn.GELU("tanh")
    row = next(row for row in _MODULES.values() if row.kernel is ACTIVATIONS[name])
    return row.modules[0](**{attribute: number for (attribute, _), number in zip(row.scalars, numbers)})


def module_activation(module: nn.Module) -> Found | None:
    """The activation that a stock module is; None for anything else."""
    kind = next((kind for kind in type(module).__mro__ if kind in _MODULES), None)
    stock = kind is not None and type(module).forward is kind.__dict__.get("forward", type(module).forward)
    if kind is None or not stock or "forward" in vars(module):
        return None
    values = [float(getattr(module, attribute)) for attribute, _ in _MODULES[kind].scalars]
    return _found(_MODULES[kind].kernel, values, getattr(module, "approximate", "none"))


def call_activation(node: fx.Node) -> Found | None:
    """The activation that a function or method call is; None for anything else."""
    if node.op not in ("call_function", "call_method") or node.kwargs.get("out") is not None:
        return None
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    row = BY_FUNCTION.get(target.removesuffix("_"))
    if row is None:
        return None
    values = [
        node.args[i] if len(node.args) > i else node.kwargs.get(key, default)
        for i, (key, default) in enumerate(row.scalars, start=1)
    ]
    return _found(row.kernel, values, node.kwargs.get("approximate", "none"))


def _found(kernel: FusedActivation | None, values: Sequence[object], approximate: object) -> Found | None:
    """An activation with its numbers, where it has a kernel and they are numbers that the kernel takes."""
    numbers = tuple(float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool))
    if kernel is None or len(numbers) < len(values) or (kernel.name == "hardtanh" and numbers[0] >= numbers[1]):
        return None
    return "gelu_tanh" if kernel.name == "gelu" and approximate == "tanh" else kernel.name, numbers


def is_identity(module: nn.Module) -> bool:
    """Whether a module returns what it is given, in both modes."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return not hooked(module) and all(map(is_identity, module))
    return type(module) is nn.Identity and not hooked(module)


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks that see its calls."""
    return any(getattr(module, name, None) for name in _HOOKS)


def bare(module: nn.Module) -> bool:
    """Whether a module has no children and no tensors."""
    return not [*module.children(), *module.parameters(), *module.buffers()]


def stock_dropout(module: nn.Module) -> bool:
    """Whether a module is a dropout of torch's own."""
    own = type(module).__module__ == nn.Dropout.__module__
    return isinstance(module, _DROPOUTS) and own and "forward" not in vars(module)


def drops(module: nn.Module) -> bool:
    """Whether a module does something in training only: it drops, and in evaluation returns what it is given."""
    if isinstance(module, _DROPOUTS):
        return stock_dropout(module)
    kind = type(module).__name__.lower()
    if "drop" not in kind and "stochasticdepth" not in kind:
        return False
    if not bare(module):
        return False
    x = torch.zeros(2, 3, 4, 4, device="cpu")
    try:
        output: object = copy.deepcopy(module).eval()(x)
    except Exception:
        return False
    return output is x
