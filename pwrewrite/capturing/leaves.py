"""Calls of modules that are not looked into: what they return, what they cost, and their nodes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..core.convolution import ConvSpec
from ..core.cost import PricingMode
from ..core.nested import Args, Kwargs, Tree, map_tensors, tensors_of
from . import functions
from .bookkeeping import Bookkeeper
from .module_rules import Leaf, module_window
from .origins import Origins
from .records import Window
from .shapes import convolve
from .tensors import byte_count


class Leaves:
    """Records the calls of leaves."""

    def __init__(self, origins: Origins, books: Bookkeeper, *, real: bool) -> None:
        self._origins, self._books, self._real = origins, books, real
        self._specs: dict[int, tuple[ConvSpec, Window]] = {}

    def call(self, module: Any, path: str, rule: Leaf, args: Args, kwargs: Kwargs) -> object:
        """Records a call of a leaf."""
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
            macs = out.numel() * module.in_features
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
