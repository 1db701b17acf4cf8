"""Runs a model once on ``meta`` tensors and writes down what it does as a `torch.fx.Graph`.

The recorder hands out real tensors without data, not proxies: Python control flow runs as ever, sizes are integers. A
`TorchFunctionMode` sees every torch function, a replaced ``nn.Module.__call__`` every module. Modules with a rule
(see `leaves`) become ``call_module`` nodes without running; all else is looked into. Code that needs a tensor's
*values* raises `NeedsValues`, and the caller records again with real, seeded ones.

The recorder keeps no activation alive (see `origins`), so that the deaths it observes are those of an ordinary run.
C++ that torch functions do not show (TorchScript functions) is recorded in a second run, one aten operation at a time.

Limits: an in-place write through a view is an edge from the view, not from its base, and values that leave torch
(through NumPy or Python numbers) and come back are constants. A TorchScript *module* is one opaque node, and starts a
new island.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.cost import Cost
from ..core.nested import Args, Kwargs, Tree, map_tensors, tensors_of
from ..core.operations import convolution_call
from . import functions
from .bookkeeping import Bookkeeper
from .evaluate import Evaluator, Function, read, redirect, without_masks
from .inventory import Inventory
from .leaves import Leaves, leaf_rule
from .liveness import Liveness
from .origins import Origins, spec_of
from .records import NodeInfo, Window, info, set_info
from .shapes import pool_call_window
from .state import replaced
from .threads import APART, BUSY, RECORDED, Here, recorded_threads
from .transforms import in_python, is_wrapped, transforming, uncompiled

_original_call = nn.Module.__call__


_WHOLE = (torch.int64, torch.int32)
_DISPATCHED = (HigherOrderOperator, OpOverload, OpOverloadPacket)


class Recorder(TorchFunctionMode):
    """Records one run of one model, which the caller protects with `state.untouched`.

    Values are computed where ``real``; code that torch functions do not show (TorchScript functions) is recorded too
    where ``deep``, which takes longer.

    Attributes:
        opaque: Paths of TorchScript modules, which are not looked into.
        notes: What a reader should be told of how operations were recorded.
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
        self.notes: dict[str, None] = {}
        self._depth: Callable[[], AbstractContextManager[object]] = _Deep if deep else nullcontext
        self.here = Here()
        self._lock = threading.RLock()
        self._books = Bookkeeper(self.origins, self.liveness, inventory, self.here)
        self._leaves = Leaves(self.origins, self._books, real=real)
        self._evaluator = Evaluator()
        self._paths = {key: names[0] for key, names in inventory.names.items()}

    # ------------------------------------------------------------------------------------------- running

    def run(self, args: Args, kwargs: Kwargs, names: list[str]) -> None:
        """Calls the model on prepared inputs, the recorder's own copies, one name for each; records the graph."""
        origins = self.origins
        for tensor, name in zip(tensors_of((args, kwargs)), names):
            node = origins.placeholder(name, tensor)
            self.liveness.watch(tensor, node.name, known=origins.known(tensor))
            origins.mark(tensor, node)
        recorder, here = self, self.here

        def call(module: nn.Module, *args: object, **kwargs: object) -> object:
            state = here.state
            if state == RECORDED:
                return recorder.call_module(module, args, kwargs)
            apart = state == APART and id(module) in recorder._paths
            if apart and any(map(origins.known, tensors_of((args, kwargs)))):
                return recorder.within(recorder.call_module, [])(module, args, kwargs)
            return _original_call(module, *args, **kwargs)

        with replaced(nn.Module, "__call__", call), recorded_threads(here, self.within), uncompiled():
            out = self.within(self.model, [])(*args, **kwargs)
        with DisableTorchFunction():
            results = tensors_of(out)
            node = origins.output(out)
            set_info(node, NodeInfo("output", "", tuple(map(spec_of, results)), (), Cost()))

    def within(self, function: Function, scope: list[str]) -> Function:
        """A function that is recorded in whatever thread it is called, as the code of the modules in ``scope``."""
        here = self.here

        def recorded(*args: object, **kwargs: object) -> object:
            if here.state != APART:
                return function(*args, **kwargs)
            here.state, here.scope = RECORDED, list(scope)
            try:
                with torch.no_grad(), self._depth(), self:
                    return function(*args, **kwargs)
            finally:
                here.state = APART

        return recorded

    def call_module(self, module: nn.Module, args: Args, kwargs: Kwargs) -> object:
        """What replaces ``nn.Module.__call__``: a leaf becomes a node, the rest runs and is looked into."""
        path = self._paths.get(id(module))
        rule = None
        if path is None:
            name = self.inventory.stray_name(module)
            if not name and type(module) is nn.Sequential:  # made as the code runs, ``self.layers[1:3]``: part of it
                return _original_call(module, *args, **kwargs)
            path = name or self._scope()
        elif transforming() is None:
            kind: type = type(module)
            rule = leaf_rule(kind)
        attributes = module.__dict__
        if rule is not None and "forward" not in attributes:
            if not (attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]):
                return self._as_node(self._leaves.call, module, path, rule, args, kwargs)
            if not (rule.product and module._parameters.get("weight") is None):
                attributes["forward"] = lambda *a, **k: self._as_node(self._leaves.call, module, path, rule, a, k)
                try:  # the hooks run as ever, around the node
                    return _original_call(module, *args, **kwargs)
                finally:
                    attributes.pop("forward", None)
        scope = self.here.scope
        scope.append(path)
        try:
            if isinstance(module, torch.jit.ScriptModule):
                self.opaque.append(path)
                return self._as_node(self._leaves.script, module, path, args, kwargs)
            out = _original_call(module, *args, **kwargs)
            self._as_node(self._returned, path, out)
            return out
        finally:
            scope.pop()

    def _returned(self, path: str, out: object) -> None:
        """Notes that the code of a module returns what some nodes made."""
        for node in dict.fromkeys(map(self.origins.made_by, tensors_of(out))):
            if node is not None:
                info(node).returned = (*info(node).returned, path)

    def _scope(self) -> str:
        return self.here.scope[-1] if self.here.scope else ""

    def _as_node(self, call: Function, *args: object) -> object:
        here = self.here
        with DisableTorchFunction(), self._lock:
            here.state = BUSY
            try:
                return call(*args)
            finally:
                here.state = RECORDED

    # ----------------------------------------------------------------------------------------- functions

    def __torch_function__(self, func: Any, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        """Sees every torch function and tensor method that runs outside a leaf."""
        kwargs = kwargs or {}
        if self.here.state != RECORDED:
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
        if isinstance(func, _DISPATCHED):
            if isinstance(func, HigherOrderOperator):
                return self._higher_order(func, args, kwargs)
            packet = func.overloadpacket if isinstance(func, OpOverload) else func
            name = packet.__name__ if packet._qualified_op_name.startswith("aten::") else ""
        with self._lock:
            return self._function(func, name, args, kwargs)

    def _function(self, func: Function, name: str, args: Args, kwargs: Kwargs) -> object:
        origins = self.origins
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        tensors = tensors_of(args)
        if kwargs:
            tensors += tensors_of(kwargs)
        wrapped = transforming() is not None and any(map(is_wrapped, tensors))
        origins.transformed |= wrapped
        on_meta = not self.real and any(origins.value(t).is_meta for t in tensors)
        if on_meta and name in functions.VALUE_READS:
            return read(func, name, args, kwargs, tensors, origins)
        writes = functions.writes(name, args, kwargs) if name else False
        convert = origins.meta_value if on_meta else origins.value
        own_args: Args = tuple([convert(a) if isinstance(a, Tensor) else map_tensors(a, convert) for a in args])
        own_kwargs = map_tensors(kwargs, convert) if kwargs else kwargs
        call = func
        if name in functions.CASTS or "device" in kwargs:
            call, own_args, own_kwargs = redirect(func, name, own_args, own_kwargs, "meta" if on_meta else self.device)
        elif on_meta and name in ("__getitem__", "__setitem__"):
            own_args = (own_args[0], without_masks(args[1], own_args[1], origins), *own_args[2:])
        self.here.state = BUSY
        priced = "" if wrapped else name
        try:
            result = self._evaluator.result(call, priced, own_args, own_kwargs, on_meta)
        except RuntimeError:
            numbers = self._with_numbers(args, kwargs) if on_meta and call is func and not wrapped else None
            if numbers is None:
                raise
            result = self._evaluator.result(call, priced, *numbers, on_meta)
        finally:
            self.here.state = RECORDED
        out = result.out
        outputs = tensors_of(out)
        if name == "__set__" and func.__self__.__name__ == "data":  # type: ignore[attr-defined]
            self._set_data(args)
        if not outputs and not writes:
            return out
        spec = window = None
        op = name.strip("_") or getattr(func, "__name__", "function").partition(".")[0]
        weights: set[int] = set()
        if name in functions.CONVOLUTIONS:
            spec, weight, bias = convolution_call(name, args, kwargs)
            window = Window.of(spec)
            op = spec.op
            weights = {id(weight), id(bias)}
        elif name in functions.WINDOWED:
            window = pool_call_window(name, *args, **kwargs)
        op = _OPS.get(op, op)
        temporary = functions.temporary_bytes(name, own_args, out)
        method = functions.is_method(func)
        node = origins.create("call_method" if method else "call_function", name if method else func, args, kwargs, op)
        self._books.record(
            node, op, self._scope(), args if not kwargs else (args, kwargs), out,
            macs=result.macs, writes=writes, window=window, spec=spec, unpriced=result.unpriced, weights=weights,
            temporary=temporary,
        )  # fmt: skip
        if writes and tensors:
            value = origins.value(tensors[0])
            origins.written(tensors[0], node, on_meta=on_meta)
            if outputs and outputs[0] is value:
                return tensors[0]
        return out

    def _set_data(self, args: Args) -> None:
        """A node for ``weight.data = value``, which moves no bytes and returns nothing."""
        tensor, value = args
        node = self.origins.create("call_function", setattr, (tensor, "data", value), {}, "set_data")
        specs = tuple(map(spec_of, tensors_of(args)))
        set_info(node, NodeInfo("set_data", self._scope(), specs, (), Cost(), callers=tuple(self.here.scope)))

    def _with_numbers(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Arguments on ``meta`` with numbers in place of whole numbers of the model's own, as sizes that code works out
        from buffers are (``F.pad(x, (0, self.stride - 1))``); None without any.
        """
        numbers: list[int] = []

        def convert(t: Tensor) -> Tree:
            value = self.origins.value(t)
            if t.dim() or t.dtype not in _WHOLE or value.is_meta or self.origins.overwritten(t):
                return self.origins.meta_value(t)
            numbers.append(int(value))
            return numbers[-1]

        own: tuple[Args, Kwargs] = map_tensors((args, kwargs), convert)
        return own if numbers else None

    # ----------------------------------------------------------------------------- higher-order operators

    def _higher_order(self, operator: HigherOrderOperator, args: Args, kwargs: Kwargs) -> object:
        """Records what an operator calls; on ``meta`` both branches of a ``cond`` and one round of a ``while_loop``."""
        name, values = operator.__name__, [*args, *kwargs.values()]
        with self:
            if not self.real and name == "cond" and isinstance(values[0], Tensor):
                self.notes["torch.cond: both branches are in the graph and in the totals; a run takes one"] = None
                branches = [branch(*values[3]) for branch in values[1:3]]
                return self._join(operator, (values[0], branches), branches[0], ())
            if not self.real and name == "while_loop":
                self.notes["torch.while_loop: how often it runs is not known; one round is in the totals"] = None
                carried = (*values[2], *values[3])
                values[0](*carried)
                return self._join(operator, (carried,), values[1](*carried), (f"higher_order::{name}",))
            implementation = in_python(operator)
            if implementation is not None:
                return implementation(*args, **kwargs)
        return self._function(operator, "", args, kwargs)

    def _join(self, operator: HigherOrderOperator, args: Args, results: object, unpriced: tuple[str, ...]) -> object:
        """One node behind what an operator called."""
        with DisableTorchFunction(), self._lock:
            out = map_tensors(results, torch.empty_like)
            node = self.origins.create("call_function", operator, args, {}, operator.__name__)
            self._books.record(node, operator.__name__, self._scope(), args, out, unpriced=unpriced)
            return out


class _Deep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls every dispatched operation again as a torch function, so that a recorder sees those that came from C++."""

    def __torch_dispatch__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        return func(*args, **(kwargs or {}))


_OPS = {"multi_head_attention_forward": "attention", "scaled_dot_product_attention": "attention"}


def path_of_failure(error: Exception) -> str | None:
    """Path of the innermost module whose call an exception came through, read off its traceback; None where none."""
    code = Recorder.call_module.__code__
    paths = [frame.f_locals["path"] for frame, _ in walk_tb(error.__traceback__) if frame.f_code is code]
    return paths[-1] if paths else None
