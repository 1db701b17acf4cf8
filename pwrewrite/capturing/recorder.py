"""Runs a model once on ``meta`` tensors and writes down what it does as a `torch.fx.Graph`.

``torch.fx.symbolic_trace`` hands proxies to the model's code, and fails where that code branches on a shape, iterates
over a tensor or asks ``isinstance(x, Tensor)``. The recorder hands out real tensors that have no data: Python control
flow runs as it always does, sizes are integers, and a `TorchFunctionMode` sees every torch function while a replaced
``nn.Module.__call__`` sees every module. Modules with a rule (convolutions, norms, activations, pooling …, see
`rules`) become ``call_module`` nodes without running; all else is looked into. So

- whatever runs can be captured, and nothing is computed where shapes suffice;
- sizes in the graph are those of the example inputs;
- code that needs a tensor's *values* (``if x.sum() > 0``, ``nonzero``) cannot run on meta: `NeedsValues` tells the
  caller, who records again with real, seeded values.

The recorder keeps no activation alive (see `origins`), so that the deaths it observes are those of an ordinary run:
``memory`` is what eager execution holds, references in callers' frames included.

C++ that torch functions do not show (TorchScript functions) is recorded in a second run, one aten operation at a time.

Limits: an in-place write through a view is an edge from the view, not from its base, and values that leave torch
(through NumPy or Python numbers) and come back are constants. A TorchScript *module* is one opaque node, and starts a
new island.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.convolution import ConvSpec
from ..core.cost import Cost, PricingMode
from ..core.nested import map_tensors, tensors_of
from ..core.operations import convolution_call
from . import functions
from .bookkeeping import Bookkeeper
from .evaluate import Evaluator, read, redirect, without_masks
from .inventory import Inventory
from .liveness import Liveness
from .module_rules import Leaf, leaf_rule, module_window
from .origins import Origins, spec_of
from .records import NodeInfo, Window, set_info
from .shapes import convolve, pool_call_window

_original_call: Any = nn.Module.__call__

_running = threading.RLock()
"""Held by the one recording that may run at a time, since it replaces ``nn.Module.__call__``."""


class Recorder(TorchFunctionMode):
    """Records one run of one model.

    Args:
        inventory: The parts of the model, which the caller protects with `state.untouched`.
        real: Whether values are computed; otherwise only shapes are.
        deep: Whether code that torch functions do not show (TorchScript functions) is recorded too, which takes longer.
        items: Whether each of several tensors that a node makes gets a node of its own.

    Attributes:
        origins: The graph and the origins of tensors.
        liveness: Births and deaths of activations.
        opaque: Paths of TorchScript modules, which are not looked into.
    """

    def __init__(self, inventory: Inventory, *, real: bool = False, deep: bool = False, items: bool = False) -> None:
        super().__init__()
        self.inventory = inventory
        self.model = inventory.model
        self.real = real
        first = next(iter(inventory.parameters), None)
        self.device = torch.device("cpu") if first is None or first.is_meta else first.device
        self.liveness = Liveness()
        self.origins = Origins(inventory, self.liveness, real=real, items=items, device=self.device)
        self.opaque: list[str] = []
        self.deep = deep
        self.busy = 0
        self._scope: list[str] = []
        self._thread = threading.get_ident()
        self._books = Bookkeeper(self.origins, self.liveness, self._scope)
        self._evaluator = Evaluator()
        self._specs: dict[int, ConvSpec] = {}
        self._paths = {key: names[0] for key, names in inventory.names.items()}

    # ------------------------------------------------------------------------------------------- running

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> None:
        """Calls the model on prepared inputs and records the graph.

        Args:
            args: Positional inputs; tensors are the recorder's own copies.
            kwargs: Keyword inputs.
            names: One name per input tensor, in order.
        """
        origins = self.origins
        for tensor, name in zip(tensors_of((args, kwargs)), names):
            node = origins.placeholder(name, tensor)
            self.liveness.watch(tensor, node.name, known=origins.known(tensor))
            origins.mark(tensor, node)
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if recorder.busy or threading.get_ident() != recorder._thread:
                return _original_call(module, *args, **kwargs)
            return recorder.call_module(module, args, kwargs)

        with _running:
            nn.Module.__call__ = call  # type: ignore[method-assign]
            try:
                with torch.no_grad(), _eager_dynamo(), _deep() if self.deep else _nothing(), self:
                    out = self.model(*args, **kwargs)
            finally:
                nn.Module.__call__ = _original_call  # type: ignore[method-assign]
        with DisableTorchFunction():
            found = tensors_of(out)
            node = origins.output(out)
            set_info(node, NodeInfo("output", "", tuple(map(spec_of, found)), (), Cost()))

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What replaces ``nn.Module.__call__``: a leaf becomes a node, the rest runs and is looked into."""
        path = self._paths.get(id(module))
        rule = leaf_rule(type(module)) if path is not None else None
        attributes = module.__dict__
        if rule is not None and "forward" not in attributes:
            if not _has_hooks(attributes):
                return self._leaf(module, path or "", rule, args, kwargs)
            if not ((rule.convolution or rule.op == "linear") and module._parameters.get("weight") is None):
                return self._hooked_leaf(module, path or "", rule, args, kwargs)
        if isinstance(module, torch.jit.ScriptModule):
            return self._script(module, path or "", args, kwargs)
        scope = self._scope
        scope.append(path if path is not None else self._here())
        try:
            return _original_call(module, *args, **kwargs)
        except Exception as error:
            _blame(error, path)
            raise
        finally:
            scope.pop()

    def _here(self) -> str:
        return self._scope[-1] if self._scope else ""

    # -------------------------------------------------------------------------------------------- leaves

    def _hooked_leaf(self, module: Any, path: str, rule: Leaf, args: Any, kwargs: Any) -> Any:
        """A leaf whose hooks run as ever, around the node."""
        attributes = module.__dict__
        attributes["forward"] = lambda *a, **k: self._leaf(module, path, rule, a, k)
        try:
            return _original_call(module, *args, **kwargs)
        finally:
            attributes.pop("forward", None)

    def _leaf(self, module: Any, path: str, rule: Leaf, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with DisableTorchFunction():
            origins, op = self.origins, rule.op
            spec = window = None
            macs = 0
            self.busy += 1
            try:
                if rule.convolution:
                    spec = self._specs.get(id(module))
                    if spec is None:
                        spec = self._specs[id(module)] = ConvSpec.of_module(module)
                out = NotImplemented
                if not self.real:
                    out = self._by_rule(module, rule, spec, args, kwargs)
                if out is NotImplemented:
                    out = self._run_leaf(module, args, kwargs)
            except Exception as error:
                _blame(error, path)
                raise
            finally:
                self.busy -= 1
            if spec is not None:
                op = spec.op
                window = Window(spec.kernel_size, spec.stride, spec.padding, spec.dilation, spec.transposed)
                x = args[0] if args else next(iter(kwargs.values()))
                macs = spec.macs(x.shape, out.shape)
            elif op == "linear":
                macs = out.numel() * module.in_features
            elif op in functions.WINDOWED:
                window = module_window(module)
            node = origins.create("call_module", path, args, kwargs, path or op)
            params = size = 0
            for t in module._parameters.values():
                if t is not None:
                    params += self._books.count(t)
                    size += t.nbytes
            for t in module._buffers.values():
                if t is not None:
                    size += t.nbytes
            writes = bool(module.__dict__.get("inplace", False))
            given = args if not kwargs else (args, kwargs)
            self._books.record(
                node, op, path, given, out,
                macs=macs, writes=writes, params=params, weight_bytes=size, window=window, spec=spec,
                temporary=functions.temporary_bytes(op, args, out) if op in functions.INDEXED else 0,
            )  # fmt: skip
            return out

    def _by_rule(self, module: Any, rule: Leaf, spec: ConvSpec | None, args: Any, kwargs: Any) -> Any:
        convert = self.origins.meta_value
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            x = convert(args[0])
            return rule.output(module, x) if spec is None else convolve(spec, x, module._parameters.get("weight"))
        values, named = map_tensors(args, convert), map_tensors(kwargs, convert)
        if values or len(named) != 1:
            return rule.output(module, *values, **named)
        return rule.output(module, *named.values())

    def _run_leaf(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Runs a leaf's own forward, its weights replaced by what they stand for here."""
        value = self.origins.value if self.real else self.origins.meta_value
        values, named = map_tensors(args, value), map_tensors(kwargs, value)
        attributes = module.__dict__
        own = {store: attributes[store] for store in ("_parameters", "_buffers")}
        for store, tensors in own.items():
            attributes[store] = {name: None if t is None else value(t) for name, t in tensors.items()}
        try:
            return type(module).forward(module, *values, **named)
        finally:
            attributes.update(own)

    def _script(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a TorchScript module as one node, priced from inside."""
        self.opaque.append(path)
        self.busy += 1
        try:
            with DisableTorchFunction(), PricingMode() as pricing:
                value = self.origins.value if self.real else self.origins.meta_value
                values, named = map_tensors(args, value), map_tensors(kwargs, value)
                module_: Any = module
                device = next((str(t.device) for t in tensors_of((values, named))), "cpu")
                weights = next(module.parameters(), None)
                if weights is not None and str(weights.device) != device:
                    import copy

                    module_ = copy.deepcopy(module).to(device)
                out = _original_call(module_, *values, **named)
        finally:
            self.busy -= 1
        with DisableTorchFunction():
            node = self.origins.create("call_module", path, args, kwargs, path or "script")
            weights_of = list(module.parameters())
            params = sum(self._books.count(p) for p in weights_of)
            size = sum(p.nbytes for p in weights_of)
            unpriced = tuple(pricing.unpriced)
            self._books.record(
                node, "script", path, (args, kwargs), out,
                macs=pricing.macs, params=params, weight_bytes=size, unpriced=unpriced,
            )  # fmt: skip
        return out

    # ----------------------------------------------------------------------------------------- functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sees every torch function and tensor method that runs outside a leaf."""
        kwargs = kwargs or {}
        if self.busy or threading.get_ident() != self._thread:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "function")
        if name == "__get__":
            attribute = func.__self__.__name__
            if attribute in functions.PLAIN_ATTRIBUTES:
                return func(*args)
            if attribute in functions.DEVICE_ATTRIBUTES:
                return self.device if attribute == "device" else attribute == f"is_{self.device.type}"
            func, name, args = getattr, "getattr", (args[0], attribute)
        elif name in functions.SILENT:
            return func(*args, **kwargs)
        try:
            return self._function(func, name, args, kwargs)
        except Exception as error:
            _blame(error, self._here())
            raise

    def _function(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        origins = self.origins
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        given = tensors_of(args)
        if kwargs:
            given += tensors_of(kwargs)
        on_meta = not self.real and any(origins.value(t).is_meta for t in given)
        if on_meta and name in functions.VALUE_READS:
            return read(func, name, args, kwargs, given, origins)
        convert = origins.meta_value if on_meta else origins.value
        values: tuple[Any, ...] = tuple(
            [convert(a) if isinstance(a, Tensor) else map_tensors(a, convert) for a in args]
        )
        named = map_tensors(kwargs, convert) if kwargs else kwargs
        if not self.real and (name in functions.CASTS or "device" in kwargs):
            values, named = redirect(name, values, named, "meta" if on_meta else "cpu")
        elif on_meta and name in ("__getitem__", "__setitem__"):
            values = (values[0], without_masks(args[1], values[1], origins), *values[2:])
        writes = functions.writes(name, args, kwargs)
        ours = isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        self.busy += 1
        try:
            out, macs, unpriced = self._evaluator.result(func, "" if ours else name, values, named, on_meta)
        finally:
            self.busy -= 1
        made = tensors_of(out)
        if not made and not writes:
            return out
        spec = window = None
        op = name.strip("_")
        weights: set[int] = set()
        if not ours and name in functions.CONVOLUTIONS:
            spec, weight, bias = convolution_call(name, args, kwargs)
            window = Window(spec.kernel_size, spec.stride, spec.padding, spec.dilation, spec.transposed)
            op = spec.op
            weights = {id(weight), id(bias)}
        elif name in functions.WINDOWED:
            window = pool_call_window(name, *args, **kwargs)
        op = _OPS.get(op, op).partition(".")[0]
        temporary = 0 if ours else functions.temporary_bytes(name, values, out)
        method = functions.is_method(func)
        node = origins.create("call_method" if method else "call_function", name if method else func, args, kwargs, op)
        inputs = args if not kwargs else (args, kwargs)
        self._books.record(
            node, op, self._here(), inputs, out,
            macs=macs, writes=writes, window=window, spec=spec, unpriced=unpriced, weights=weights, temporary=temporary,
        )  # fmt: skip
        if writes and given:
            value = origins.value(given[0])
            origins.written(given[0], node, on_meta=on_meta)
            if made and made[0] is value:
                return given[0]
        return out


class _Deep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls every dispatched operation again as a torch function, so that a recorder sees those that came from C++."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


_OPS = {"multi_head_attention_forward": "attention", "scaled_dot_product_attention": "attention"}


def _blame(error: Exception, path: str | None) -> None:
    """Notes the innermost module that an exception came from."""
    if path is not None and not hasattr(error, "_pw_where"):
        error._pw_where = path  # type: ignore[attr-defined]


def _has_hooks(attributes: dict[str, Any]) -> bool:
    return bool(attributes["_forward_hooks"] or attributes["_forward_pre_hooks"])


def _deep() -> AbstractContextManager[Any]:
    return _Deep()  # type: ignore[no-untyped-call]


def _nothing() -> AbstractContextManager[Any]:
    import contextlib

    return contextlib.nullcontext()


def _eager_dynamo() -> AbstractContextManager[Any]:
    """Runs what was wrapped with ``torch.compile`` as the code it was made from."""
    import sys

    if "torch._dynamo" not in sys.modules:
        return _nothing()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
