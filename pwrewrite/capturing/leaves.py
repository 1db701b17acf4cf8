"""Calls of modules that are not looked into: which those are, what they return and cost, and their nodes.

Rules are found by the *forward function* of a module's class, so a subclass that inherits ``forward`` is covered and
one that overrides it is not. A leaf without a rule, or one whose rule returns `NotImplemented`, runs on ``meta``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.convolution import CONV_MODULES, ConvSpec
from ..core.cost import PricingMode
from ..core.nested import Args, Kwargs, Tree, map_tensors, tensors_of
from ..core.operations import OPERATIONS
from . import functions
from .bookkeeping import Bookkeeper
from .origins import Origins
from .records import Window
from .shapes import ON_META, ShapeError, adaptive, convolve, default, new, pool_window, project, same
from .tensors import byte_count


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


_RULES: dict[str, Callable[..., Tensor]] = {
    "": lambda *args, **kwargs: ON_META,
    "same": lambda module, x: x if getattr(module, "inplace", False) else same(x),
    "input": lambda module, x: x,
    "default": lambda module, x: default(x),
    "format": _channel_norm,
    "layer": _layer_norm,
    "pool": _pool,
    "adaptive": _adaptive,
    "linear": lambda module, x: project(x, int(module.in_features), int(module.out_features)),
    "convolution": _convolution,
}
"""Name of a shape rule in `pwrewrite.core.operations` to what it is for modules."""

MODULE_RULES: dict[object, Leaf] = {
    kind.forward: Leaf(row.name, _RULES[row.shape], row.kind == "product", row.shape == "convolution")
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


class Leaves:
    """Records the calls of leaves."""

    def __init__(self, origins: Origins, books: Bookkeeper, *, real: bool) -> None:
        self._origins, self._books, self._real = origins, books, real
        self._specs: dict[int, tuple[ConvSpec, Window]] = {}

    def call(self, module: Any, path: str, rule: Leaf, args: Args, kwargs: Kwargs) -> object:
        """Records a call of a leaf."""
        if kwargs:
            signature(module.forward).bind(*args, **kwargs)  # raises as the module would
        op, spec, window, macs = rule.op, None, None, 0
        if rule.convolution:
            facts = self._specs.get(id(module))
            if facts is None:
                spec = ConvSpec.of_module(module)
                facts = self._specs[id(module)] = spec, Window.of(spec)
            spec, window = facts
        out: Tree = NotImplemented if self._real else self._by_rule(module, rule, spec, args, kwargs)
        if out is NotImplemented:
            out = self._run(module, args, kwargs)
        if spec is not None:
            op = spec.op
            x = args[0] if args else next(iter(kwargs.values()))
            macs = spec.macs(x.shape, out.shape)
        elif op == "linear":
            macs = out.numel() * int(module.in_features)
        elif op in functions.WINDOWED:
            window = module_window(module)
        params, size, strided = 0, 0, torch.strided
        for p in module._parameters.values():
            if p is not None:
                params += self._books.count(p)
                size += p.nbytes if p.layout is strided else byte_count(p)
        for b in module._buffers.values():
            if b is not None:
                size += b.nbytes if b.layout is strided else byte_count(b)
        self._books.record(
            self._origins.create("call_module", path, args, kwargs, path or op),
            op, path, args if not kwargs else (args, kwargs), out,
            macs=macs, writes=bool(module.__dict__.get("inplace", False)), params=params, weight_bytes=size,
            window=window, spec=spec,
            temporary=functions.temporary_bytes(op, args, out) if op in functions.INDEXED else 0,
        )  # fmt: skip
        return out

    def _by_rule(self, module: nn.Module, rule: Leaf, spec: ConvSpec | None, args: Args, kwargs: Kwargs) -> object:
        convert = self._origins.meta_value
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            x = self._origins.value(args[0])
            if not x.is_meta:
                x = convert(x)
            return rule.output(module, x) if spec is None else convolve(spec, x, module._parameters.get("weight"))
        own_args, own_kwargs = map_tensors(args, convert), map_tensors(kwargs, convert)
        if own_args or len(own_kwargs) != 1:
            return rule.output(module, *own_args, **own_kwargs)
        return rule.output(module, *own_kwargs.values())

    def _run(self, module: nn.Module, args: Args, kwargs: Kwargs) -> object:
        """Runs a leaf's own forward, its weights replaced by what they stand for here."""
        value = self._origins.value if self._real else self._origins.meta_value
        own_args, own_kwargs = map_tensors(args, value), map_tensors(kwargs, value)
        attributes = module.__dict__
        stores = {name: attributes[name] for name in ("_parameters", "_buffers")}
        for store, tensors in stores.items():
            attributes[store] = {name: None if t is None else value(t) for name, t in tensors.items()}
        try:
            return type(module).forward(module, *own_args, **own_kwargs)
        finally:
            attributes.update(stores)

    def script(self, module: nn.Module, path: str, args: Args, kwargs: Kwargs) -> object:
        """Runs a TorchScript module as one node, priced from inside."""
        value = self._origins.value if self._real else self._origins.meta_value
        own_args, own_kwargs = map_tensors(args, value), map_tensors(kwargs, value)
        device = next((str(t.device) for t in tensors_of((own_args, own_kwargs))), "cpu")
        weights = list(module.parameters())
        if weights and str(weights[0].device) != device:
            module = copy.deepcopy(module).to(device)
        with PricingMode() as pricing:
            out = module(*own_args, **own_kwargs)
        self._books.record(
            self._origins.create("call_module", path, args, kwargs, path or "script"),
            "script", path, (args, kwargs), out,
            macs=pricing.macs, params=sum(map(self._books.count, weights)), weight_bytes=sum(map(byte_count, weights)),
            unpriced=tuple(pricing.unpriced),
        )  # fmt: skip
        return out
