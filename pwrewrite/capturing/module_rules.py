"""Output shapes of common modules by rule, without running them: which modules are leaves of a captured graph.

Rules are found by the *forward function* of a module's class, so a subclass that inherits ``forward`` is covered and
one that overrides it is not. A rule may return `NotImplemented` where the call is unusual; the module then runs on
``meta``, which is right for everything but ten to a hundred times slower (batch norm on meta runs a Python
decomposition, 0.3 ms each).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.convolution import CONV_MODULES, ConvSpec
from .records import Window
from .shapes import ShapeError, adaptive, convolve, new, pool_window, pooled, project, same


class Leaf(NamedTuple):
    """How a module that is not looked into is handled.

    Attributes:
        op: Canonical name; None for a convolution, whose spec names it.
        output: ``output(module, x, *args, **kwargs) -> Tensor``.
    """

    op: str | None
    output: Callable[..., Any]


def _convolution(module: Any, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
    return convolve(ConvSpec.of_module(module), x, module._parameters.get("weight"), output_size)


def _linear(module: Any, x: Tensor) -> Tensor:
    return project(x, module.in_features, module.out_features)


def _batch_norm(module: Any, x: Tensor) -> Tensor:
    try:
        module._check_input_dim(x)
    except ValueError as error:
        raise ShapeError(f"{type(module).__name__}: {error}") from None
    if x.shape[1] != module.num_features:
        raise ShapeError(f"{type(module).__name__} takes {module.num_features} channels, got shape {tuple(x.shape)}")
    return new(x.shape, x)


def _group_norm(module: Any, x: Tensor) -> Tensor:
    if x.dim() < 2 or x.shape[1] != module.num_channels:
        raise ShapeError(f"GroupNorm takes {module.num_channels} channels, got shape {tuple(x.shape)}")
    return new(x.shape, x)


def _plain(module: Any, x: Tensor) -> Tensor:
    """The same shape in the default format."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    wanted = tuple(module.normalized_shape)
    if tuple(x.shape[-len(wanted) :]) != wanted:
        raise ShapeError(f"LayerNorm takes {wanted} in the last dims, got shape {tuple(x.shape)}")
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _activation(module: Any, x: Tensor) -> Tensor:
    return x if getattr(module, "inplace", False) else same(x)


def _identity(module: Any, x: Tensor) -> Tensor:
    return x


def _dropout(module: Any, x: Tensor) -> Tensor:
    return x if not module.training or module.inplace else same(x)


def _pool(module: Any, x: Tensor) -> Any:
    if getattr(module, "return_indices", False):
        return NotImplemented
    return pooled(x, module_window(module), module.ceil_mode, average=not hasattr(module, "return_indices"))


def _adaptive_pool(module: Any, x: Tensor) -> Any:
    if getattr(module, "return_indices", False):
        return NotImplemented
    return adaptive(x, module.output_size, _POOL_DIMS[type(module).forward])


def _flatten(module: Any, x: Tensor) -> Tensor:
    return x.flatten(module.start_dim, module.end_dim)


def module_window(module: Any) -> Window:
    """The window of a pooling module."""
    dims = _POOL_DIMS[type(module).forward]
    return pool_window(dims, module.kernel_size, module.stride, module.padding, getattr(module, "dilation", 1))


_POOL_DIMS: dict[Any, int] = {
    kind.forward: dims  # type: ignore[attr-defined]
    for dims, kinds in enumerate(
        (
            (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
            (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
            (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
        ),
        start=1,
    )
    for kind in kinds
}

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardtanh: "hardtanh",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.CELU: "celu",
    nn.LeakyReLU: "leaky_relu",
    nn.Mish: "mish",
    nn.Softplus: "softplus",
    nn.PReLU: "prelu",
}

_NORMS: dict[type[nn.Module], Leaf] = {
    nn.BatchNorm1d: Leaf("batch_norm", _batch_norm),
    nn.BatchNorm2d: Leaf("batch_norm", _batch_norm),
    nn.BatchNorm3d: Leaf("batch_norm", _batch_norm),
    nn.InstanceNorm1d: Leaf("instance_norm", _plain),
    nn.InstanceNorm2d: Leaf("instance_norm", _plain),
    nn.InstanceNorm3d: Leaf("instance_norm", _plain),
    nn.GroupNorm: Leaf("group_norm", _group_norm),
}

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _module_rules() -> dict[Any, Leaf]:
    rules: dict[Any, Leaf] = {kind.forward: Leaf(None, _convolution) for kind in CONV_MODULES}
    rules[nn.Linear.forward] = Leaf("linear", _linear)
    rules[nn.Identity.forward] = Leaf("identity", _identity)
    rules[nn.LayerNorm.forward] = Leaf("layer_norm", _layer_norm)
    rules[nn.Flatten.forward] = Leaf("flatten", _flatten)
    rules |= {kind.forward: Leaf(op, _activation) for kind, op in _ACTIVATIONS.items()}
    rules |= {nn.Softmax.forward: Leaf("softmax", _plain), nn.LogSoftmax.forward: Leaf("log_softmax", _plain)}
    rules |= {kind.forward: leaf for kind, leaf in _NORMS.items()}
    rules |= {kind.forward: Leaf("dropout", _dropout) for kind in _DROPOUTS}
    for d in (1, 2, 3):
        for kind, op, rule in (
            (f"MaxPool{d}d", "max_pool", _pool),
            (f"AvgPool{d}d", "avg_pool", _pool),
            (f"AdaptiveAvgPool{d}d", "adaptive_avg_pool", _adaptive_pool),
            (f"AdaptiveMaxPool{d}d", "adaptive_max_pool", _adaptive_pool),
        ):
            rules[getattr(nn, kind).forward] = Leaf(f"{op}{d}d", rule)
    return rules


MODULE_RULES = _module_rules()
"""Forward function to how its module is handled."""

_leaf_of_type: dict[type, Leaf | None] = {}


def leaf_rule(kind: type[Any]) -> Leaf | None:
    """The rule for modules of class ``kind``; None where they are looked into."""
    try:
        return _leaf_of_type[kind]
    except KeyError:
        leaf = MODULE_RULES.get(getattr(kind, "forward", None))
        if leaf is not None and leaf.op is None:
            base: Any = next(base for base in CONV_MODULES if issubclass(kind, base))
            if getattr(kind, "_conv_forward", None) is not getattr(base, "_conv_forward", None):
                leaf = None
        if isinstance(getattr(kind, "weight", None), property):  # parametrized: the weight is computed
            leaf = None
        _leaf_of_type[kind] = leaf
        return leaf
