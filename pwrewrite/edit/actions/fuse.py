"""``fuse``: a layer takes over the activation behind it, and the residual addition between.

An activation module that is called once becomes an identity. Otherwise the code that calls it becomes a graph without
the call: that of the smallest module around the layer, looked for outwards.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ...capturing.code_trace import NotTraceable
from ...core.convolution import ConvSpec
from ...core.errors import PlanError, UsageError
from ...core.plan import Edit, Op, Skip, SkipReason
from ...layers import PointwiseActivation
from ...layers.activations import ACTIVATIONS, checked
from ...layers.known import call_activation, hooked, is_identity, module_activation
from ..graph_edit import Regraphed, argument, to_graph
from .bench import Bench, Refused, not_traced, param_count
from .evaluation import code_graph
from .fold_weight import random_inputs

_ADDS = frozenset({operator.add, operator.iadd, torch.add})

Activation = tuple[str, tuple[float, ...]]
"""An activation by name, and its numbers."""


@dataclass(frozen=True)
class FuseSettings:
    """Settings of ``fuse``.

    Attributes:
        layer: Shape facts of the layer.
        activation: Name of the activation (see `pwrewrite.layers.activations`).
        scalars: Its numbers.
        remove: Path of an activation module that is called once and becomes an identity.
        scope: Otherwise, or with ``residual``: path of the module whose code makes the call, or of one inside it.
        called: Path of the activation module that this code calls; empty for a function.
        residual: Whether an addition lies between, which this code makes.
        same: Whether the layer's own code pads as TensorFlow does, so that the output is as large as the input over the
            stride.
        alias: Whether only that name of the module becomes an identity, and its others stay.
        head: Whether the code of ``scope`` lies behind the layer and applies the activation to its input before all
            else.
        keep_nan: Whether NaN stays NaN behind an activation whose fused kernel returns a number for it.
    """

    layer: ConvSpec
    activation: str
    scalars: tuple[float, ...] = ()
    remove: str | None = None
    scope: str | None = None
    called: str = ""
    residual: bool = False
    same: bool = False
    head: bool = False
    alias: bool = False
    keep_nan: bool = False

    @property
    def method(self) -> str:
        """What an edit calls it."""
        added = ["add"] if self.residual else []
        return "+".join(added if added and self.activation == "none" else [*added, self.activation])


def fuse_layer(bench: Bench, op: Op, settings: FuseSettings) -> Edit:
    """Carries out a ``fuse`` op.

    Raises:
        PlanError: If the op makes no sense or was made for another model.
        Refused: If the layer must stay as it is, or the code around it cannot become a graph.
    """
    name, spec = settings.activation, settings.layer
    try:
        activation = name, checked(name, settings.scalars)
    except UsageError as error:
        raise PlanError(error.message, where=op.where("activation"), expected=error.expected, got=error.got) from None
    layer = _padding_layer(bench, op, spec) if settings.same else bench.layer(op, op.path, spec)
    removed = None if settings.remove is None else bench.find(op, settings.remove, "remove")
    if removed is not None:
        bench.check_held(str(settings.remove), removed)
        if hooked(removed):
            detail = f"{settings.remove} has a hook, which would no longer see it"
            raise Refused(Skip(op.path, SkipReason.HOOKS, detail))
        _check_removed(op, removed, activation)
    scope = None
    if settings.residual or removed is None:
        if settings.scope is None:
            raise PlanError("fuse needs a scope or what to remove", where=op.where("scope"), expected="a path")
        if settings.head:
            scope = _edit_head(bench, op, settings.scope, activation)
        else:
            called = bench.find(op, settings.called, "called") if settings.called else None
            change = _Change(layer, activation, settings.residual, called, removed)
            scope = _edit_code(bench, op, settings.scope, change)
    new = PointwiseActivation.of_layer(layer, spec, *activation, same=settings.same, keep_nan=settings.keep_nan)
    aliases = bench.replace(layer, new, op.path)
    if removed is not None and settings.alias:
        bench.replace_item(str(settings.remove), nn.Identity().train(removed.training))
    elif removed is not None:
        bench.remove(removed)
    return Edit(
        op,
        "module" if scope is None else "graph",
        settings.method,
        params_before=param_count(new),
        params_after=param_count(new),
        exact="both",
        aliases=aliases,
        graph_module=scope,
    )


def _check_removed(op: Op, module: nn.Module, activation: Activation) -> None:
    """Checks that a module is the activation that the layer takes over.

    Raises:
        PlanError: If it is something else.
    """
    same = module_activation(module) == activation
    if not same and not any(True for _ in (*module.children(), *module.parameters(), *module.buffers())):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        name, numbers = activation
        try:
            with torch.no_grad():
                output = module(x.clone())
            same = torch.allclose(output, ACTIVATIONS[name].plain(x, *numbers), rtol=1e-4, atol=1e-5)
        except Exception:  # its code calls the activation on inputs of some other shape
            same = True
    if not same:
        raise PlanError(
            "the plan removes an activation that is another one here",
            where=op.where("remove"),
            expected=activation[0],
            got=str(module)[:80],
        )


def _padding_layer(bench: Bench, op: Op, spec: ConvSpec) -> Any:
    """A convolution with code of its own that pads its input; tried out, where it has values, at two sizes.

    Raises:
        PlanError: If it is another layer.
        Refused: If its code does something else.
    """
    layer = bench.same_layer(op, op.path, spec)
    detail = f"{type(layer).__qualname__} has a forward of its own that does more than pad"
    refused = Refused(Skip(op.path, SkipReason.OVERRIDDEN_FORWARD, detail))
    if not isinstance(layer, nn.Conv2d) or hooked(layer) or layer._parameters.get("weight") is None:
        raise refused
    if bench.fill and not layer.weight.is_meta:
        trial = PointwiseActivation.of_layer(layer, spec, "none", same=True)
        try:
            with torch.no_grad():
                pairs = [(layer(x), trial(x)) for x in random_inputs(layer)]
        except Exception as error:
            raise refused from error
        if any(a.shape != b.shape or not torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in pairs):
            raise refused
    return layer


@dataclass(frozen=True)
class _Change:
    """What is to be taken out of some code.

    Attributes:
        layer: The layer that takes it over.
        activation: The activation; ``none`` for an addition alone.
        residual: Whether an addition lies between.
        called: The module that the code calls for it; None for a function.
        removed: A module that becomes an identity wherever it is called, so that its call may stay.
    """

    layer: nn.Module
    activation: Activation
    residual: bool
    called: nn.Module | None
    removed: nn.Module | None

    @property
    def activation_in_code(self) -> bool:
        """Whether a call of the activation has to go."""
        return self.removed is None and self.activation[0] != "none"


def _edit_code(bench: Bench, op: Op, scope: str, change: _Change) -> str:
    """Takes the activation and the addition out of the code of the smallest enclosing module; its path."""
    failure: NotTraceable = _NotHere("the layer is not in this code")
    while True:
        module = bench.find(op, scope, "scope")
        if f"{op.path}.".startswith(f"{scope}." if scope else "") and module is not change.layer:
            bench.check_held(op.path, module)
            try:
                graph_module = code_graph(module)
                _CodeEdit(graph_module, op.path.removeprefix(f"{scope}." if scope else ""), change).carry_out()
            except NotTraceable as error:
                failure = error
            else:
                bench.replace(module, graph_module)
                return scope
        if not scope or not isinstance(failure, _NotHere):
            raise not_traced(op, failure) from failure
        scope = scope.rpartition(".")[0]


def _edit_head(bench: Bench, op: Op, scope: str, activation: Activation) -> str:
    """Takes the activation out of the code of a module that applies it to its input first; the module's path."""
    module = bench.find(op, scope, "scope")
    if hooked(module):
        raise Refused(Skip(op.path, SkipReason.HOOKS, f"{scope} has a hook, whose input would change"))
    graph_module = bench.graph(op, module)
    heads = [
        (node, source)
        for node in graph_module.graph.nodes
        if call_activation(node) == activation
        and isinstance(source := argument(node, 0, "input"), fx.Node)
        and source.op == "placeholder"
    ]
    if len(heads) != 1 or len(heads[0][1].users) != 1:
        raise not_traced(op, f"{scope} does not apply {activation[0]} to its input first")
    node, source = heads[0]
    node.replace_all_uses_with(source)
    graph_module.graph.erase_node(node)
    graph_module.graph.lint()
    graph_module.recompile()
    bench.replace(module, graph_module)
    return scope


class _NotHere(NotTraceable):
    """The code of this module does not make the call; that of an enclosing one may."""


class _CodeEdit:
    """The change of one module's graph.

    Args:
        graph_module: The module as a graph.
        path: The layer's path in it.
        change: What is to go.
    """

    def __init__(self, graph_module: Regraphed, path: str, change: _Change) -> None:
        self.graph_module, self.graph, self.path, self.change = graph_module, graph_module.graph, path, change

    def carry_out(self) -> None:
        """Edits the graph.

        Raises:
            NotTraceable: If the calls are not found in it as expected; the graph is to be thrown away then.
        """
        call, chain = self._call()
        last = self._onward(call)
        if self.change.residual:
            add, other = self._addition(self._reader(last), last)
            end = add
            if self.change.activation_in_code:
                end = self._reader(self._onward(add))
                self._check_activation(end)
            self._join(call, chain, other, end)
        elif self.change.activation_in_code:
            end = self._reader(last)
            self._check_activation(end)
            end.replace_all_uses_with(last)
            self.graph.erase_node(end)
        for node in list(self.graph.nodes):
            if node.op == "call_module" and len(node.args) == 1 and is_identity(self._module(node)):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        self.graph.lint()
        self.graph_module.recompile()

    def _call(self) -> tuple[fx.Node, list[str]]:
        """The node whose output is the layer's, and the calls that it stands for where the layer lies deeper."""
        calls = [n for n in self.graph.nodes if n.op == "call_module" and self._holds(n)]
        if len(calls) != 1:
            raise _NotHere(f"{self.path} is called {len(calls)} times in this code, expected once")
        node, target = calls[0], str(calls[0].target)
        if len(node.args) != 1 or node.kwargs:
            raise NotTraceable(f"{target} takes more than one argument")
        chain = self._ends_with_layer(target, self._module(node))
        if chain is None:
            raise NotTraceable(f"{self.path} is not the last thing that {target} does")
        return node, chain

    def _holds(self, node: fx.Node) -> bool:
        return any(child is self.change.layer for child in self._module(node).modules())

    def _ends_with_layer(self, target: str, module: nn.Module) -> list[str] | None:
        """The calls of a chain of containers whose last one, identities apart, is the layer."""
        if module is self.change.layer:
            return [target]
        names = _chain(module)
        if names is None:
            return None
        names = [name for name in names if not is_identity(module.get_submodule(name))]
        if not names:
            return None
        *first, last = names
        inner = self._ends_with_layer(f"{target}.{last}", module.get_submodule(last))
        return None if inner is None else [*(f"{target}.{name}" for name in first), *inner]

    def _module(self, node: fx.Node) -> nn.Module:
        return self.graph_module.get_submodule(str(node.target))

    def _reader(self, node: fx.Node) -> fx.Node:
        readers = list(node.users)
        if len(readers) == 1 and readers[0].op == "output":
            raise _NotHere(f"what follows {self.path} is outside of this code")
        if len(readers) != 1:
            raise NotTraceable(f"the output of {self.path} has {len(readers)} readers in this code")
        return readers[0]

    def _onward(self, node: fx.Node) -> fx.Node:
        """Behind the identities that follow a node."""
        while len(node.users) == 1:
            reader = next(iter(node.users))
            if reader.op != "call_module" or not is_identity(self._module(reader)):
                break
            node = reader
        return node

    def _addition(self, node: fx.Node, last: fx.Node) -> tuple[fx.Node, fx.Node]:
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not (method or (node.op == "call_function" and node.target in _ADDS)) or node.kwargs or len(node.args) != 2:
            raise NotTraceable(f"{node.format_node() or node.name} is no plain addition")
        first, second = node.args
        other = second if first is last else first
        if not isinstance(other, fx.Node) or other is last:
            raise NotTraceable("the other operand is no tensor of its own")
        return node, other

    def _check_activation(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self._module(node)
            if self.change.called is not None and module is self.change.called:
                return
            if self.change.called is None and module_activation(module) == self.change.activation:
                return
        elif self.change.called is None and call_activation(node) == self.change.activation:
            return
        raise NotTraceable(f"this code has {node.target} behind {self.path}, not {self.change.activation[0]}")

    def _join(self, call: fx.Node, chain: list[str], other: fx.Node, end: fx.Node) -> None:
        """Puts the layer's call, with the residual, where the addition or the activation was."""
        source = call.args[0]
        for target in chain[:-1]:
            with self.graph.inserting_before(call):
                source = self.graph.call_module(target, (source,))
        with self.graph.inserting_before(end):
            joined = self.graph.call_module(chain[-1], (source, other))
        between = [call]
        while between[-1] is not end:
            between.append(next(iter(between[-1].users)))
        end.replace_all_uses_with(joined)
        for node in reversed(between):
            self.graph.erase_node(node)


def _chain(module: nn.Module) -> list[str] | None:
    """Names of the children that a module's code calls one after the other, each once; None where it does more."""
    if hooked(module) or isinstance(module, PointwiseActivation):
        return None
    if type(module).forward is nn.Sequential.forward and isinstance(module, nn.Sequential):
        names = list(module._modules)
        return names if len({id(child) for child in module._modules.values()}) == len(names) else None
    try:
        nodes = list(to_graph(module).graph.nodes)
    except NotTraceable:
        return None
    calls = nodes[1:-1]
    if nodes[0].op != "placeholder" or any(node.op != "call_module" for node in calls):
        return None
    if any(node.args != (before,) or node.kwargs for before, node in zip(nodes, calls)):
        return None
    return [str(node.target) for node in calls] if nodes[-1].args == (nodes[-2],) else None
