"""Runs a model once on ``meta`` tensors and writes down what it does as a `torch.fx.Graph`.

``torch.fx.symbolic_trace`` hands proxies to the model's code, and fails where that code branches on a shape, iterates over
a tensor or asks ``isinstance(x, Tensor)``. The recorder hands out real tensors that have no data: Python control flow runs as
it always does, sizes are integers, and a `TorchFunctionMode` sees every torch function while a replaced
``nn.Module.__call__`` sees every module. Modules with a rule (convolutions, norms, activations, pooling …, see `rules`)
become ``call_module`` nodes without running; all else is looked into. So

- whatever runs can be captured, and nothing is computed where shapes suffice;
- sizes in the graph are those of the example inputs;
- code that needs a tensor's *values* (``if x.sum() > 0``, ``nonzero``) cannot run on meta: `NeedsValues` tells the
  caller, who records again with real, seeded values.

A tensor's origin is the attribute ``_pw_node`` on the tensor object, so that the recorder keeps no tensor alive and the
deaths it observes are those of an ordinary run: ``memory`` is what eager execution holds, references in callers' frames
included.

Limits: an in-place write through a view is an edge from the view, not from its base, and values that leave torch (through
NumPy or Python numbers) and come back are constants. TorchScript code is opaque, and what it returns starts a new island.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import DisableTorchFunction
from torch.overrides import TorchFunctionMode

from ..convolution import ConvSpec
from ..cost import Cost, PricingMode
from . import rules
from .records import MemoryEvent, NodeInfo, TensorSpec, Window

_original_call: Any = nn.Module.__call__


class NeedsValues(RuntimeError):
    """The model's code asked a meta tensor for its values."""


_VALUE_READS = frozenset(
    "item tolist __bool__ __int__ __float__ __index__ __complex__ numpy __array__ nonzero masked_select unique "
    "unique_consecutive bincount __contains__ equal allclose data_ptr".split()
)
_PLAIN_ATTRIBUTES = frozenset(
    "shape dtype ndim layout requires_grad is_sparse is_quantized is_nested names grad_fn is_leaf itemsize nbytes grad "
    "is_mkldnn is_sparse_csr is_inference _backward_hooks _base _version output_nr retains_grad volatile".split()
)
_DEVICE_ATTRIBUTES = frozenset("device is_cuda is_cpu is_meta is_xpu is_mps is_xla is_mtia is_maia is_vulkan".split())
_SILENT = frozenset(
    "size numel nelement dim ndimension stride is_contiguous element_size is_floating_point is_complex __len__ "
    "storage_offset get_device is_same_size is_signed requires_grad_ __hash__ __repr__ __format__ is_tensor "
    "result_type promote_types can_cast is_grad_enabled register_hook untyped_storage is_inference is_conj is_neg".split()
)
_CASTS = frozenset("to cuda cpu type".split())
_PLURAL = (tuple, list)


class _Birth(weakref.ref):  # type: ignore[type-arg]
    """A weak reference that remembers which storage its tensor belongs to."""

    __slots__ = ("key",)
    key: int


class _Storage:
    """A live activation storage: who made it, how many tensor objects share it, how large it is."""

    __slots__ = ("nbytes", "node", "users")

    def __init__(self, node: str, nbytes: int) -> None:
        self.node, self.nbytes, self.users = node, nbytes, 0


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts, slices and dataclasses, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, _PLURAL):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)
    elif isinstance(value, slice):
        _collect((value.start, value.stop, value.step), found)
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            _collect(getattr(value, f.name), found)


def map_tensors(value: Any, convert: Callable[[Tensor], Any]) -> Any:
    """Rebuilds nested containers with every tensor converted."""
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, tuple):
        items = [map_tensors(item, convert) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items)
    if isinstance(value, list):
        return [map_tensors(item, convert) for item in value]
    if isinstance(value, dict):
        return {key: map_tensors(item, convert) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(map_tensors(item, convert) for item in (value.start, value.stop, value.step)))
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: map_tensors(getattr(value, f.name), convert) for f in fields(value)}
    return value


def to_meta(t: Tensor) -> Tensor:
    """A meta tensor of the same shape, strides and dtype; the tensor itself where it is one."""
    if t.is_meta:
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


class Recorder(TorchFunctionMode):
    """Records one run of one model.

    Args:
        model: The model, which the caller protects with `state.untouched`.
        real: Whether values are computed; otherwise only shapes are.
    """

    def __init__(self, model: nn.Module, *, real: bool = False) -> None:
        super().__init__()
        self.model = model
        self.real = real
        self.graph = fx.Graph()
        self.memory: list[MemoryEvent] = []
        self.constants: dict[str, Tensor] = {}
        self.opaque: list[str] = []
        self.lost = 0
        self.scope: list[str] = []
        self.paths: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        first = next(model.parameters(), None)
        self.device = torch.device("cpu") if first is None or first.is_meta else first.device
        self._thread = threading.get_ident()
        self._owned: dict[int, tuple[str, Tensor]] | None = None
        self._aliases: dict[int, Tensor] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._counted: set[int] = set()
        self._storages: dict[int, _Storage] = {}
        self._births: set[_Birth] = set()
        self._names: dict[str, int] = {}
        self._free: set[Any] = set()
        self._specs: dict[nn.Module, ConvSpec] = {}
        self._nested = 0

    # ------------------------------------------------------------------------------------------- running

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> Any:
        """Calls the model on prepared inputs and records the graph.

        Args:
            args: Positional inputs; tensors are the recorder's own copies.
            kwargs: Keyword inputs.
            names: One name per input tensor, in order.

        Returns:
            What the model returned.
        """
        for tensor, name in zip(tensors_of((args, kwargs)), names):
            node = self.graph.placeholder(self._name(name))
            node.meta["info"] = NodeInfo("input", "", (), (_spec(tensor),), Cost())
            self._made(tensor, node)
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != recorder._thread or recorder._nested:
                return _original_call(module, *args, **kwargs)
            return recorder.call_module(module, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with torch.no_grad(), _eager_dynamo(), self:
                out = self.model(*args, **kwargs)
        finally:
            nn.Module.__call__ = _original_call  # type: ignore[method-assign]
        with DisableTorchFunction():
            node = self.graph.output(self._lower(out))
            outs = tuple(map(_spec, tensors_of(out)))
            node.meta["info"] = NodeInfo("output", "", outs, (), Cost())
        return out

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What replaces ``nn.Module.__call__``: a leaf becomes a node, the rest runs and is looked into."""
        path = self.paths.get(module)
        rule = rules.leaf_rule(type(module)) if path is not None else None
        attributes = module.__dict__
        if rule is not None and "forward" not in attributes:
            if not _has_hooks(attributes):
                return self._leaf(module, path or "", rule, args, kwargs)
            leaf, name = rule, path or ""
            attributes["forward"] = lambda *a, **k: self._leaf(module, name, leaf, a, k)
            try:
                return _original_call(module, *args, **kwargs)
            finally:
                attributes.pop("forward", None)
        if isinstance(module, torch.jit.ScriptModule):
            return self._opaque(module, path or "", args, kwargs)
        self.scope.append(path if path is not None else self._here())
        try:
            return _original_call(module, *args, **kwargs)
        except Exception as error:
            self._blame(error, path)
            raise
        finally:
            self.scope.pop()

    def _blame(self, error: Exception, path: str | None) -> None:
        """Notes the innermost module that an exception came from."""
        if path is not None and not hasattr(error, "_pw_where"):
            error._pw_where = path  # type: ignore[attr-defined]

    def _here(self) -> str:
        return self.scope[-1] if self.scope else ""

    # -------------------------------------------------------------------------------------------- leaves

    def _leaf(
        self, module: Any, path: str, rule: rules.Leaf, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with DisableTorchFunction():
            x = args[0] if args else next(iter(kwargs.values()), None)
            pricing = None
            try:
                if self.real:
                    out = self._run_leaf(module, args, kwargs)
                else:
                    values = map_tensors(args, self._value)
                    named = map_tensors(kwargs, self._value)
                    out = self._by_rule(module, rule, values, named)
                    if out is NotImplemented:
                        pricing = PricingMode()
                        with pricing:
                            out = self._run_leaf(module, values, named)
            except Exception as error:
                self._blame(error, path)
                raise
            spec = window = None
            op = rule.op
            macs = pricing.macs if pricing else 0
            if op is None:
                spec = self._specs.get(module)
                if spec is None:
                    spec = self._specs[module] = ConvSpec.of_module(module)
                op = spec.op
                window = Window(spec.kernel_size, spec.stride, spec.padding, spec.dilation, spec.transposed)
                macs = spec.macs(x.shape, out.shape)
            elif op == "linear":
                macs = out.numel() * module.in_features
            elif op.startswith(("max_pool", "avg_pool")):
                window = rules.module_window(module)
            node = self.graph.create_node(
                "call_module", path, self._lower(args), self._lower(kwargs), self._name(path or op)
            )
            owned = [*module._parameters.values(), *module._buffers.values()]
            writes = bool(getattr(module, "inplace", False))
            params = sum(self._count(t) for t in module._parameters.values() if t is not None)
            weights = sum(t.numel() * t.dtype.itemsize for t in owned if t is not None)
            unpriced = tuple(pricing.unpriced) if pricing else ()
            self._record(node, op, path, (args, kwargs), out, macs, writes, params, weights, window, spec, unpriced)
            return out

    def _by_rule(self, module: Any, rule: rules.Leaf, args: Any, kwargs: Any) -> Any:
        if args or len(kwargs) != 1:
            return rule.output(module, *args, **kwargs)
        return rule.output(module, *kwargs.values())

    def _run_leaf(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Runs a leaf's own forward, its weights replaced by what they stand for here."""
        swaps = {n: self._value(t) for n, t in (*module.named_parameters(), *module.named_buffers())}
        values, named = map_tensors(args, self._value), map_tensors(kwargs, self._value)
        self._nested += 1
        try:
            return torch.func.functional_call(module, swaps, values, named, tie_weights=False)
        finally:
            self._nested -= 1

    def _opaque(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a TorchScript module as one node, priced from inside."""
        self.opaque.append(path)
        with DisableTorchFunction(), PricingMode() as pricing:
            values, named = map_tensors(args, self._value), map_tensors(kwargs, self._value)
            module_: Any = module
            device = next((str(t.device) for t in tensors_of((values, named))), "cpu")
            weights = next(module.parameters(), None)
            if weights is not None and str(weights.device) != device:
                import copy

                module_ = copy.deepcopy(module).to(device)
            out = _original_call(module_, *values, **named)
        with DisableTorchFunction():
            node = self.graph.create_node(
                "call_module", path, self._lower(args), self._lower(kwargs), self._name(path or "script")
            )
            params = sum(self._count(p) for p in module.parameters())
            size = sum(p.numel() * p.dtype.itemsize for p in module.parameters())
            info = (pricing.macs, False, params, size, None, None, tuple(pricing.unpriced))
            self._record(node, "script", path, (args, kwargs), out, *info)
        return out

    # ----------------------------------------------------------------------------------------- functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sees every torch function and tensor method that runs outside a leaf."""
        kwargs = kwargs or {}
        if self._nested or threading.get_ident() != self._thread:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "function")
        if name == "__get__":
            return self._attribute(func, args)
        if name in _SILENT:
            return func(*args, **kwargs)
        try:
            return self._function(func, name, args, kwargs)
        except Exception as error:
            self._blame(error, self._here())
            raise

    def _attribute(self, func: Any, args: tuple[Any, ...]) -> Any:
        attribute = func.__self__.__name__
        if attribute in _PLAIN_ATTRIBUTES:
            return func(*args)
        if attribute in _DEVICE_ATTRIBUTES:
            if attribute == "device":
                return self.device
            return attribute == f"is_{self.device.type}"
        return self._function(getattr, "getattr", (args[0], attribute), {})

    def _function(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = tensors_of((args, kwargs)) if kwargs else tensors_of(args)
        values, named = args, kwargs
        on_meta = False
        if not self.real:
            for t in given:
                if self._value(t).is_meta:
                    on_meta = True
                    break
            convert = self._meta_value if on_meta else self._value
            values = tuple(
                (a if a.is_meta else convert(a)) if isinstance(a, Tensor) else map_tensors(a, convert) for a in args
            )
            if kwargs:
                named = map_tensors(kwargs, convert)
            if on_meta and name in _VALUE_READS:
                raise NeedsValues(f"{name} reads the values of a tensor of shape {tuple(given[0].shape)}")
        else:
            values, named = map_tensors(args, self._value), map_tensors(kwargs, self._value)
        if name in _CASTS or "device" in kwargs:
            values, named = self._redirect(name, values, named, on_meta)

        writes = _writes(name, args, kwargs)
        spec = window = pricing = None
        op = name.strip("_")
        torch_made = not isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        out: Any = NotImplemented
        if on_meta and torch_made:
            rule = rules.FUNCTION_RULES.get(name)
            if rule is not None:
                out = rule(*values, **named)
            elif name[-1] == "_" and name[0] != "_" and values and isinstance(values[0], Tensor):
                if name[:-1] in rules.FUNCTION_RULES or name in ("fill_", "zero_", "copy_", "masked_fill_"):
                    out = values[0]
        macs_of = rules.FUNCTION_MACS.get(name) if torch_made else None
        if out is NotImplemented:
            known = macs_of is not None or name in rules.FREE_FUNCTIONS or func is getattr or name in rules.CONV_FUNCTIONS
            if (known and torch_made) or func in self._free:
                out = func(*values, **named)
            else:
                pricing = PricingMode()
                with pricing:
                    out = func(*values, **named)
                if not pricing.macs and not pricing.unpriced and not isinstance(func, type(lambda: 0)):
                    self._free.add(func)
        made = tensors_of(out)
        if not made and not (name == "__setitem__" or writes):
            return out
        macs = pricing.macs if pricing else 0
        weights: set[int] = set()
        if torch_made and name in rules.CONV_FUNCTIONS:
            spec, weight, bias = rules.conv_call(name, *args, **kwargs)
            window = Window(spec.kernel_size, spec.stride, spec.padding, spec.dilation, spec.transposed)
            macs = spec.macs(given[0].shape, out.shape)
            op = spec.op
            weights = {id(weight), id(bias)}
        elif macs_of is not None:
            macs = macs_of(values, named, out)
        elif name in rules.POOL_FUNCTIONS:
            window = rules.pool_call_window(name, *args, **kwargs)
        if op == "multi_head_attention_forward" or op == "scaled_dot_product_attention":
            op = "attention"
        target, kind = (op, "call_method") if _is_method(func) else (func, "call_function")
        if kind == "call_method":
            target = name
        node = self.graph.create_node(kind, target, self._lower(args), self._lower(kwargs), self._name(op))
        unpriced = tuple(pricing.unpriced) if pricing else ()
        mutated = given[0] if writes and given else None
        self._record(node, op, self._here(), (args, kwargs), out, macs, writes, 0, 0, window, spec, unpriced, weights)
        if mutated is not None:
            if not self.real and on_meta and not mutated.is_meta:
                self._aliases[id(mutated)] = to_meta(mutated)
                self._keep(mutated)
            mutated._pw_node = node  # type: ignore[attr-defined]
            if made and made[0] is not mutated and self._value(mutated) is made[0]:
                return mutated
        return out

    def _redirect(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], on_meta: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Sends tensors that the model's code moves to a device to where values live here."""
        device = "meta" if on_meta else None if self.real else "cpu"
        if device is None:
            return args, kwargs
        if name in ("cuda", "cpu"):
            return args[:1], {}
        rest = tuple(torch.device(device) if _is_device(a) else a for a in args[1:])
        return (*args[:1], *rest), {**kwargs, "device": device} if "device" in kwargs else kwargs

    # ------------------------------------------------------------------------------------------- records

    def _record(
        self,
        node: fx.Node,
        op: str,
        path: str,
        given: Any,
        out: Any,
        macs: int,
        writes: bool,
        params: int,
        weight_bytes: int,
        window: Window | None,
        spec: ConvSpec | None,
        unpriced: tuple[str, ...],
        weights: set[int] | frozenset[int] = frozenset(),
    ) -> None:
        inputs: dict[int, TensorSpec] = {}
        for t in tensors_of(given):
            if id(t) in self._param_ids or id(t) in weights:
                params += self._count(t)
                weight_bytes += t.numel() * t.dtype.itemsize
            elif id(t) not in inputs:
                inputs[id(t)] = _spec(t)
        outputs, written, alias = [], 0, None
        for t in (out,) if isinstance(out, Tensor) else tensors_of(out):
            spec_out = _spec(t)
            outputs.append(spec_out)
            shared = self._made(t, node)
            if shared is None or writes:
                written += spec_out.nbytes
            alias = alias or shared
        moved = written or (macs > 0)
        read = weight_bytes + sum(i.nbytes for i in inputs.values()) if moved or unpriced else 0
        cost = Cost(params, macs, read, written)
        node.meta["info"] = NodeInfo(
            op, path, tuple(inputs.values()), tuple(outputs), cost, alias, window, spec, unpriced
        )

    def _made(self, t: Tensor, node: fx.Node) -> str | None:
        """Gives a tensor its origin and counts its storage; returns who made the storage, if not this node."""
        known = getattr(t, "_pw_node", None)
        t._pw_node = node  # type: ignore[attr-defined]
        key = t.untyped_storage()._cdata
        storage = self._storages.get(key)
        maker = storage.node if storage is not None else None
        if known is not None and known.graph is self.graph and storage is not None:
            return maker
        if storage is None:
            nbytes = t.untyped_storage().nbytes()
            storage = self._storages[key] = _Storage(node.name, nbytes)
            if nbytes:
                self.memory.append(MemoryEvent(node.name, nbytes))
        storage.users += 1
        birth = _Birth(t, self._died)
        birth.key = key
        self._births.add(birth)
        return maker

    def _died(self, birth: Any) -> None:
        self._births.discard(birth)
        storage = self._storages.get(birth.key)
        if storage is not None:
            storage.users -= 1
            if not storage.users:
                del self._storages[birth.key]
                if storage.nbytes:
                    self.memory.append(MemoryEvent(storage.node, -storage.nbytes))

    def _count(self, t: Tensor) -> int:
        """Elements of a parameter the first time it is met, then 0."""
        if id(t) in self._counted or not isinstance(t, nn.Parameter):
            return 0
        self._counted.add(id(t))
        return t.numel()

    def _name(self, base: str) -> str:
        """A node name that is new: the path or operation, numbered from the second use on."""
        base = base.replace(".", "_").lstrip("_") or "node"
        if not base.isidentifier():
            base = "".join(c if c.isalnum() else "_" for c in base)
            if base[0].isdigit():
                base = f"_{base}"
        count = self._names.get(base, -1) + 1
        self._names[base] = count
        if not count:
            return base
        name = f"{base}_{count}"
        return name if name not in self._names else self._name(name)

    # ------------------------------------------------------------------------------------------- origins

    def _lower(self, value: Any) -> Any:
        """Arguments as the graph holds them: nodes for tensors."""
        if type(value) is tuple and len(value) == 1 and isinstance(value[0], Tensor):
            return (self._node(value[0]),)
        return map_tensors(value, self._node)

    def _node(self, t: Tensor) -> fx.Node:
        """The node a tensor comes from; a ``get_attr`` for parameters, buffers and constants."""
        node = getattr(t, "_pw_node", None)
        if node is not None and node.graph is self.graph:
            return node  # type: ignore[no-any-return]
        owned = self._own().get(id(t))
        if owned is not None:
            return self._get_attribute(owned[0], t, "get_attr")
        if t.is_meta and not self.real:
            self.lost += 1
            node = self._get_attribute(f"_lost{self.lost}", t, "unknown")
        else:
            name = f"_constant{len(self.constants)}"
            self.constants[name] = t
            node = self._get_attribute(name, t, "get_attr")
        t._pw_node = node  # type: ignore[attr-defined]
        return node

    def _get_attribute(self, name: str, t: Tensor, op: str) -> fx.Node:
        node = self._attributes.get(name)
        if node is None:
            node = self.graph.create_node("get_attr", name, (), {}, self._name(name))
            node.meta["info"] = NodeInfo(op, name.rpartition(".")[0], (), (_spec(t),), Cost())
            self._attributes[name] = node
        return node

    def _own(self) -> dict[int, tuple[str, Tensor]]:
        """Parameters, buffers and tensor attributes of the model, by identity."""
        if self._owned is None:
            owned: dict[int, tuple[str, Tensor]] = {}
            for path, module in self.model.named_modules():
                prefix = f"{path}." if path else ""
                for store in (module._parameters, module._buffers, module.__dict__):
                    for name, value in store.items():
                        if isinstance(value, Tensor):
                            owned.setdefault(id(value), (prefix + name, value))
            self._owned = owned
            self._param_ids = {k for k, (_, t) in owned.items() if isinstance(t, nn.Parameter)}
        return self._owned

    _param_ids: set[int] | frozenset[int] = frozenset()

    def _keep(self, t: Tensor) -> None:
        """Keeps a tensor alive while its identity stands for something."""
        self._held.append(t)

    @property
    def _held(self) -> list[Tensor]:
        held: list[Tensor] = self.__dict__.setdefault("_held_tensors", [])
        return held

    def _meta_value(self, t: Tensor) -> Tensor:
        return to_meta(self._value(t))

    def _value(self, t: Tensor) -> Tensor:
        """What stands for a tensor here: itself, or an alias for what belongs to the model."""
        if getattr(t, "_pw_node", None) is not None and id(t) not in self._aliases:
            return t
        alias = self._aliases.get(id(t))
        if alias is not None:
            return alias
        owned = self._own().get(id(t))
        if owned is None:
            return t
        if self.real:
            alias = _materialized(owned[0], t) if t.is_meta else t.detach()
        elif t.is_meta or isinstance(t, nn.Parameter) or t.numel() > 1_000_000:
            alias = to_meta(t.detach())
        else:
            alias = t.detach().clone()
        self._aliases[id(t)] = alias
        self._keep(t)
        alias._pw_node = self._get_attribute(owned[0], t, "get_attr")  # type: ignore[attr-defined]
        return alias


def _materialized(name: str, t: Tensor) -> Tensor:
    """Seeded values for a weight that has none: small normal weights, unit variances, zeros elsewhere."""
    if not t.is_floating_point():
        return torch.zeros(t.shape, dtype=t.dtype)
    if name.endswith("running_var") or t.dim() <= 1 and name.endswith("weight"):
        return torch.ones(t.shape, dtype=t.dtype)
    if isinstance(t, nn.Parameter) and t.dim() > 1:
        fan_in = prod(t.shape[1:])
        generator = torch.Generator().manual_seed(0)
        return torch.randn(t.shape, dtype=torch.float32, generator=generator).mul_(fan_in**-0.5).to(t.dtype)
    return torch.zeros(t.shape, dtype=t.dtype)


def _spec(t: Tensor) -> TensorSpec:
    return TensorSpec(tuple(t.shape), t.dtype)


def _writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function writes into its first argument."""
    if name == "__setitem__" or (name[-1] == "_" and name[-2:] != "__") or name.startswith("__i") and name[3:4] != "n":
        return name not in ("__index__", "__int__", "__invert__", "__instancecheck__")
    return bool(kwargs.get("inplace")) or (
        name in _INPLACE_FLAG and any(a is True for a in args[1:]) and name != "dropout"
    )


_INPLACE_FLAG = frozenset("relu relu6 silu hardswish hardsigmoid hardtanh elu selu celu leaky_relu mish".split())


def _is_method(func: Any) -> bool:
    return type(func).__name__ in ("method_descriptor", "wrapper_descriptor", "getset_descriptor") or (
        getattr(func, "__module__", None) == "torch._tensor"
    )


def _is_device(value: Any) -> bool:
    if isinstance(value, torch.device):
        return True
    return isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda", "meta", "mps", "xpu")


def _has_hooks(attributes: dict[str, Any]) -> bool:
    return bool(attributes.get("_forward_hooks") or attributes.get("_forward_pre_hooks"))


def _eager_dynamo() -> AbstractContextManager[Any]:
    """Runs what was wrapped with ``torch.compile`` as the code it was made from."""
    import contextlib
    import sys

    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
