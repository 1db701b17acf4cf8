"""Which modules are leaves of a captured graph, and what they return by rule, without running.

Rules are found by the *forward function* of a module's class, so a subclass that inherits ``forward`` is covered and
one that overrides it is not. A leaf without a rule, or one whose rule returns `NotImplemented`, runs on ``meta``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..core.convolution import CONV_MODULES, ConvSpec
from ..core.operations import OPERATIONS
from .records import Window
from .shapes import ON_META, ShapeError, adaptive, convolve, default, new, pool_window, project, same


class Leaf(NamedTuple):
    """How a module that is not looked into is handled.

    Attributes:
        op: Canonical name; that of a convolution comes from its spec.
        output: ``output(module, x, *args, **kwargs) -> Tensor``.
        product: Whether it has a weight that it multiplies with.
    """

    op: str
    output: Callable[..., Tensor]
    product: bool = False
    convolution: bool = False


def _convolution(module: nn.Module, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
    return convolve(ConvSpec.of_module(module), x, module._parameters.get("weight"), output_size)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return project(x, module.in_features, module.out_features)


def _channel_norm(module: Any, x: Tensor) -> Tensor:
    channels = getattr(module, "num_features", None)
    if channels is None:
        channels = module.num_channels
    else:
        try:
            module._check_input_dim(x)
        except ValueError as error:
            raise ShapeError(f"{type(module).__name__}: {error}") from None
    if x.dim() < 2 or x.shape[1] != channels:
        raise ShapeError(f"{type(module).__name__} takes {channels} channels, got shape {tuple(x.shape)}")
    return new(x.shape, x)


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    expected = tuple(module.normalized_shape)
    if tuple(x.shape[-len(expected) :]) != expected:
        raise ShapeError(f"LayerNorm takes {expected} in the last dims, got shape {tuple(x.shape)}")
    return default(x)


def _adaptive(module: Any, x: Tensor) -> Tensor:
    return adaptive(_POOL_DIMS[type(module).forward], x, module.output_size, getattr(module, "return_indices", False))


def _pool(module: Any, x: Tensor) -> Tensor:
    window = module_window(module)
    dims = len(window.kernel)
    usual = dims == 2 and x.dim() in (3, 4) and not (module.ceil_mode or getattr(module, "return_indices", False))
    parts = zip(x.shape[-dims:], window.kernel, window.stride, window.padding, window.dilation)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, (p, _), d in parts]
    return new((*x.shape[:-dims], *size), x) if usual and min(size) > 0 else ON_META


def _on_meta(*args: object, **kwargs: object) -> Tensor:
    return ON_META


_RULES: dict[str, Callable[..., Tensor]] = {
    "same": lambda module, x: x if getattr(module, "inplace", False) else same(x),
    "input": lambda module, x: x,
    "default": lambda module, x: default(x),
    "format": _channel_norm,
    "layer": _layer_norm,
    "pool": _pool,
    "adaptive": _adaptive,
    "linear": _linear,
    "convolution": _convolution,
}
"""Name of a shape rule in `pwrewrite.core.operations` to what it is for modules."""

MODULE_RULES: dict[object, Leaf] = {
    kind.forward: Leaf(row.name, _RULES.get(row.shape, _on_meta), row.kind == "product", row.shape == "convolution")
    for row in OPERATIONS
    for kind in row.modules
}
"""Forward function to how its module is handled."""

_POOL_DIMS: dict[object, int] = {
    kind.forward: int(row.name[-2]) for row in OPERATIONS if row.kind == "pool" for kind in row.modules
}


def module_window(module: Any) -> Window:
    """The window of a pooling module."""
    dims = _POOL_DIMS[type(module).forward]
    return pool_window(dims, module.kernel_size, module.stride, module.padding, getattr(module, "dilation", 1))


@cache
def leaf_rule(kind: type) -> Leaf | None:
    """The rule for modules of class ``kind``; None where they are looked into."""
    leaf = MODULE_RULES.get(getattr(kind, "forward", None))
    if leaf is None or isinstance(getattr(kind, "weight", None), property):  # parametrized: the weight is computed
        return None
    base: type = next((base for base in CONV_MODULES if leaf.convolution and issubclass(kind, base)), kind)
    return leaf if getattr(kind, "_conv_forward", None) is getattr(base, "_conv_forward", None) else None
