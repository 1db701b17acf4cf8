"""A module's own code as an `fx.Graph`: `trace`.

A trace holds what the code did once; code that branches on ``self.training``, sets attributes, switches gradients or
autocast, or that a graph cannot hold is refused. ``if shortcut is None: shortcut = x`` leaves no trace where the input
is given, so such code is traced with and without it: where the graphs differ only in what stands in its place, a call
of `value_or` stands there. Where code decides by a value or a size only whether to raise (``assert c % 2 == 0``), a
call of `required` does so in the graph.

``x[i] = y`` is a call of ``operator.setitem`` at its place; whoever changes such a graph has to keep the order.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import fx, nn

from ..core.errors import first_line, line_of_model
from ..core.files import same_directory
from ..core.fx_names import taken_by_graphs
from ..core.nested import Tree
from .guards import Guard, lengths_to_try, raised_by_code, required
from .state import CONTAINERS, contents, refill, same
from .threads import one_at_a_time


class NotTraceable(RuntimeError):
    """The module's own code cannot be turned into a graph."""


def value_or(value: object, default: object) -> object:
    """An input, or what the code takes in its place where it was left out."""
    return default if value is None else value


class Item(fx.Proxy):
    """A value in a trace that takes items, and has a length where code goes on with one only."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)

    def __len__(self) -> int:
        assert isinstance(self.tracer, ShallowTracer)
        return self.tracer.length(self)

    def __setitem__(self, key: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __contains__(self, value: object) -> bool:
        raise NotTraceable("it asks whether a value holds another, the answer to which a graph would hold")

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(torch.Tensor, name):  # what torch would set in the tensor, and a graph would not
            raise NotTraceable(f"it sets .{name} of a tensor, which a graph would not")
        super().__setattr__(name, value)


class _Attribute(fx.proxy.Attribute, Item):
    """An attribute of a value, such as its shape."""


_FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn)
"""Functions that take sizes one by one, ``torch.zeros(len(x), 8)``: torch gives those, unlike a tuple, to no proxy."""


class ShallowTracer(fx.Tracer):
    """Traces one module's own code; its children are leaves, and the inputs named in ``absent`` are None.

    ``modes`` are those of autograd and autocast that calls were made in. ``guards`` are arguments of `required` for the
    first times that code asks a value for its truth or length; ``asked`` counts these, and one more than there are is
    refused: ``lengths`` are what may be answered where it asks for a length.
    Where ``alone``, code gets nothing for its ``*args`` and ``**kwargs``, and a graph raises that gets anything.
    """

    proxy_buffer_attributes = True

    def __init__(self, absent: Sequence[str] = (), guards: Sequence[Guard] = (), *, alone: bool = False) -> None:
        super().__init__(autowrap_functions=_FACTORIES)
        self.alone = alone
        self._autowrap_search.append(torch)  # else only what the model's file imports by name is wrapped
        self.absent, self.guards, self.asked = absent, guards, 0
        self.lengths: list[int] = []
        self._sizes: dict[str, Guard] = {}
        self.modes: set[tuple[object, ...]] = set()

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The answer with which the code goes on."""
        self.asked += 1
        if self.asked > len(self.guards):
            return super().to_bool(obj)
        guard = self.guards[self.asked - 1]
        self.create_proxy("call_function", required, (obj, *guard), {})
        return bool(guard[0])

    def length(self, obj: fx.Proxy) -> int:
        """The length with which the code goes on."""
        self.asked += 1
        if self.asked > len(self.guards):
            self.lengths = lengths_to_try(sys._getframe(2), self.root)
            raise NotTraceable("it takes a length, which a graph would hold")
        guard = self.guards[self.asked - 1]
        self._require_length(obj, guard)
        if type(obj) is Item:
            self._sizes[obj.node.name] = guard
        return guard[0]

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """The items of what has a known length."""
        guard = self._sizes.get(obj.node.name) if type(obj) is Item else None
        if guard is None:
            return super().iter(obj)
        self._require_length(obj, guard)  # which code may have changed
        return iter([self.create_proxy("call_function", operator.getitem, (obj, i), {}) for i in range(guard[0])])

    def _require_length(self, obj: fx.Proxy, guard: Guard) -> None:
        length, *refusal = guard
        size = self.create_proxy("call_function", len, (obj,), {})
        same = self.create_proxy("call_function", operator.eq, (size, length), {})
        self.create_proxy("call_function", required, (same, True, *refusal), {})

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """As ever, and notes the modes."""
        grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.modes.add((*grad, *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))))
        return super().create_node(*args, **kwargs)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """As ever, without marks that would have code which is made from the graph wrap the functions again."""
        with one_at_a_time:
            graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            if node.target in _FACTORIES:
                node.meta.pop("is_wrapped", None)
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child is a leaf."""
        return True

    def call_module(
        self, m: nn.Module, forward: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> object:
        """As ever; a part of a ``Sequential``, ``self.layers[1:3]``, which is no submodule, calls its own ones."""
        if type(m) is nn.Sequential and all(m is not other for other in self.root.modules()):
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A value that takes items."""
        return Item(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., object], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[object]]:
        """As ever, with None for what is absent."""
        if self.alone:
            function, args = self._named_args(root_fn)
        elif _hides_more(root_fn):  # torch would write into the code of the wrapper
            raise NotTraceable("its forward is wrapped, and takes *args, **kwargs or keywords only")
        else:
            function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        left_out = [isinstance(arg, fx.Proxy) and str(arg.node.target) in self.absent for arg in args]
        return function, [None if out else arg for arg, out in zip(args, left_out)]

    def _named_args(self, root_fn: Callable[..., object]) -> tuple[Callable[..., object], list[object]]:
        """A function that calls code with the inputs that it names, and those."""
        parameters = [*inspect.signature(inspect.unwrap(root_fn)).parameters.values()][1:]
        named = [p for p in parameters if p.kind not in _MORE]
        keywords = [p.name for p in named if p.kind is p.KEYWORD_ONLY]
        args = [self.root, *(self._input(p.name, p.default) for p in named)]
        more = ["*" * (1 + (p.kind is p.VAR_KEYWORD)) + p.name for p in parameters if p.kind in _MORE]
        for name, given in [(name, self._input(name)) for name in more]:
            refusal = f"this code was made a graph for calls without {name}, and is given some"
            self.create_proxy("call_function", required, (given, False, "TypeError", refusal), {})

        def function(*given: object) -> object:
            first = len(given) - len(keywords)
            return root_fn(*given[:first], **dict(zip(keywords, given[first:])))

        return function, args

    def _input(self, name: str, default: object = inspect.Parameter.empty) -> fx.Proxy:
        return self.create_proxy("placeholder", name, () if default is inspect.Parameter.empty else (default,), {})


_MORE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _hides_more(function: Callable[..., object]) -> bool:
    """Whether a function wraps one that takes more than positional inputs, and takes others itself."""
    inner = inspect.unwrap(function)
    takes, hidden = ([*inspect.signature(f, follow_wrapped=False).parameters.values()] for f in (function, inner))
    more = any(p.kind in (*_MORE, p.KEYWORD_ONLY) for p in hidden)
    return more and [(p.name, p.kind) for p in takes] != [(p.name, p.kind) for p in hidden]


_OPTIONAL = 3
"""Inputs that may be left out, above which code is refused: each one doubles the ways in which it may be called."""


def trace(module: nn.Module) -> fx.Graph:
    """A module's own code as a graph, in which its children are calls.

    Raises:
        NotTraceable: If a child has a name that graphs take, or the code depends on values, shapes or the training
            mode, does something else where an input is left out, sets attributes, or switches gradients or autocast.
    """
    kind = type(module).__name__
    if taken := taken_by_graphs(module):
        raise NotTraceable(f"{kind} calls something of its own {taken}, which is a name that graphs of torch take")
    alone = False
    try:
        graph = _same_in_both_modes(module)
    except NotTraceable:
        alone = any(
            p.kind in _MORE for p in inspect.signature(inspect.unwrap(type(module).forward)).parameters.values()
        )
        if not alone:
            raise
        graph = _same_in_both_modes(module, alone=True)
    inputs = {str(node.target): node.args[0] for node in graph.nodes if node.op == "placeholder" and node.args}
    flags = [name for name, default in inputs.items() if isinstance(default, bool)]
    if flags:  # ``if flag is True`` leaves no trace, either
        raise NotTraceable(f"{kind}.forward takes {', '.join(flags)} optionally, and may do something else with it")
    optional = [name for name, default in inputs.items() if default is None]
    if len(optional) > _OPTIONAL:
        raise NotTraceable(f"{kind}.forward takes {len(optional)} inputs optionally, at most {_OPTIONAL} are tried out")
    try:
        without = {
            absent: _same_in_both_modes(module, absent, alone=alone)
            for n in range(1, len(optional) + 1)
            for absent in combinations(optional, n)
        }
        for absent, other in without.items():
            if len(absent) == 1:
                _merge(graph, other, absent[0])
        if all(_text(graph, absent) == _text(other, absent) for absent, other in without.items()):
            return graph
    except NotTraceable:
        pass
    raise NotTraceable(f"{kind}.forward takes {', '.join(optional)} optionally, and does something else without")


def _same_in_both_modes(module: nn.Module, absent: Sequence[str] = (), *, alone: bool = False) -> fx.Graph:
    """The graph of a module's own code, inputs in ``absent`` being None; refused if it is another one in training."""
    kind = type(module).__name__
    flags = {child: child.training for child in module.modules()}
    graphs, switches = [], False
    try:
        with untouched(module) as changed, torch.enable_grad(), _without_functions():
            for training in (not module.training, module.training):
                for child in flags:
                    child.training = training
                tracer, graph = _traced(module, absent, alone)
                graphs.append(graph)
                switches |= len(tracer.modes) > 1
    except Exception as error:
        line = line_of_model(error)
        at = f" ({line})" if line else ""
        raise NotTraceable(f"{kind}.forward does not trace: {_reason(error)}{at}") from error
    changed = [name for name in changed if name != "training"]
    if changed:
        raise NotTraceable(f"{kind}.forward sets {', '.join(changed[:3])}, which a graph would not")
    if switches:
        raise NotTraceable(f"{kind}.forward switches gradients or autocast, which a graph would not")
    if _text(graphs[0]) != _text(graphs[1]):
        raise NotTraceable(f"{kind}.forward does something else in training, which a graph cannot hold")
    return graphs[1]


_MOST_GUARDS = 16
"""Conditions that code may raise by, above which it is refused: the code runs once or twice more for each."""


def _traced(module: nn.Module, absent: Sequence[str], alone: bool) -> tuple[ShallowTracer, fx.Graph]:
    """A graph of a module's own code, with what made it."""
    guards: list[Guard] = []
    while True:
        tracer, failure = ShallowTracer(absent, guards, alone=alone), None
        try:
            graph = tracer.trace(module)
        except Exception as error:
            failure = error
        if tracer.asked <= len(guards):
            if failure is not None:
                raise failure
            return tracer, graph
        guard = _next(tracer, module) if len(guards) < _MOST_GUARDS else None
        if guard is None:
            raise failure or NotTraceable("it catches an error that depends on a value or a size")
        guards.append(guard)


def _next(tracer: ShallowTracer, module: nn.Module) -> Guard | None:
    """What code that asks once more for a truth value or a length goes on with; None where not with one only."""
    goes_on: list[int] = []
    refusal = None
    for answer in tracer.lengths or (True, False):
        other = ShallowTracer(tracer.absent, [*tracer.guards, (answer, "", "")], alone=tracer.alone)
        try:
            other.trace(module)
        except Exception as error:
            kind = type(error).__name__
            if other.asked == tracer.asked and raised_by_code(error) and getattr(builtins, kind, 0) is type(error):
                place = line_of_model(error) or ""
                refusal = kind, place if "Proxy(" in str(error) or not str(error) else str(error)
                continue
        goes_on.append(answer)
        if len(goes_on) > 1:
            return None
    return None if refusal is None or not goes_on else (goes_on[0], *refusal)


@contextmanager
def _without_functions() -> Iterator[None]:
    """Refuses what calls a `torch.autograd.Function` meanwhile, of which a graph would hold the forward only."""
    kept: Any = None

    def apply(kind: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(arg, fx.Proxy) for arg in args):
            raise NotTraceable(f"it calls {kind.__name__}, whose own gradients a graph would not have")
        return kept.__func__(kind, *args, **kwargs)

    with one_at_a_time:
        kept = vars(torch.autograd.Function)["apply"]
        torch.autograd.Function.apply = classmethod(apply)
        try:
            yield
        finally:
            torch.autograd.Function.apply = kept


def _reason(error: Exception) -> str:
    """Why code does not trace, without torch's advice on tracing."""
    reason = str(error) if isinstance(error, NotTraceable) else first_line(error)
    if "cannot be iterated" in reason:
        return "it loops over an input, of which a graph would hold the length"
    if "'len' is not supported" in reason:
        return "it takes a length, which a graph would hold"
    if "used as inputs to control flow" in reason or "must be a bool, but got" in reason:  # the latter of torch._check
        return "it decides by a value or a size, which a graph would hold"
    if re.search(r"must be .*number.* not '(Item|Attribute|Proxy)'|cannot be interpreted as an integer", reason):
        return "it makes a Python number of a value or a size, which a graph would hold"
    return reason


@contextmanager
def untouched(module: nn.Module) -> Iterator[list[str]]:
    """Puts back what code changes while it is traced: attributes, parameters, submodules, what containers hold, the
    directory. Yields a list that holds the names of what was put back, once the block has ended.
    """
    before = [(name, container, saved) for child in module.modules() for name, container, saved in _stores(child)]
    changed: list[str] = []
    try:
        with same_directory():
            yield changed
    finally:
        for name, container, saved in before:
            if not same(container, saved):
                names = [name] if name else {*container, *saved}
                changed += [n for n in names if name or container.get(n, names) is not saved.get(n, names)]
                refill(container, saved)


def _stores(module: nn.Module) -> Iterator[tuple[str, Tree, Tree]]:
    """Where a module's attributes lie, and a copy of it; with a name where that is a container in one of them."""
    own = vars(module)
    yield "", own, dict(own)
    for name, value in own.items():
        if name in _REGISTERED:
            yield "", value, dict(value)
        elif name not in _STOCK and isinstance(value, CONTAINERS):
            copies: list[tuple[Tree, Tree]] = []
            contents(value, copies, 3)
            yield from ((name, container, copy) for container, copy in copies)


_REGISTERED = ("_parameters", "_buffers", "_modules")
_STOCK = frozenset(vars(nn.Module()))
"""What every module has, hooks among it."""


def _merge(graph: fx.Graph, without: fx.Graph, name: str) -> None:
    """Puts a call of `value_or` wherever ``graph`` reads the input ``name`` and ``without`` another node instead."""
    mine = [node for node in graph.nodes if node.target is not value_or]
    same = dict(zip(without.nodes, mine))
    choices: dict[fx.Node, fx.Node] = {}
    for other, node in same.items():
        theirs = leaves_of(other)
        if len(theirs) != len(leaves_of(node)):
            return
        leaves = iter(theirs)

        def choose(leaf: object, node: fx.Node = node, leaves: Iterator[object] = leaves) -> Tree:
            read = next(leaves)
            instead = same.get(read) if isinstance(read, fx.Node) else None
            if not isinstance(leaf, fx.Node) or leaf.op != "placeholder" or leaf.target != name or instead is None:
                return leaf
            if instead not in choices:
                with graph.inserting_before(node):
                    choices[instead] = graph.call_function(value_or, (leaf, instead))
            return choices[instead]

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), choose)
        node.args, node.kwargs = args, kwargs


def leaves_of(node: fx.Node) -> list[fx.node.Argument]:
    """What a node is given, out of its containers."""
    leaves: list[fx.node.Argument] = []
    fx.node.map_aggregate((node.args, node.kwargs), leaves.append)
    return leaves


def _text(graph: fx.Graph, absent: Sequence[str] = ()) -> list[str]:
    """A graph's calls in order, whatever its nodes are called."""
    nodes = [node for node in graph.nodes if node.target is not value_or]
    names = {node: f"%{i}" for i, node in enumerate(nodes)}

    def value(node: Tree) -> str | None:
        if node.target is value_or:
            first, second = node.args
            return value(second if first.target in absent else first)
        left_out = node.op == "placeholder" and node.target in absent
        return None if left_out else names[node]

    return [f"{node.op} {node.target} {fx.node.map_arg((node.args, node.kwargs), value)}" for node in nodes]
