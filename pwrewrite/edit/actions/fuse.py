"""``fuse``: a layer takes over the activation behind it, and the residual addition between.

An activation module that is called once becomes an identity. Otherwise the code that calls it, that of the smallest
module around the layer, becomes a graph without the call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx, nn

from ...capturing.code_trace import NotTraceable
from ...capturing.functions import argument
from ...core.convolution import ConvSpec
from ...core.errors import PlanError, UsageError
from ...core.plan import Edit, Op, SkipReason
from ...layers import PointwiseActivation
from ...layers.known import ACTIVATIONS, Found, bare, call_activation, checked, hooked, is_identity, module_activation
from ..graph_edit import Regraphed, calls_identity, drop_identities, drop_node, finish, to_graph
from ..swap import stem
from .bench import Bench, Refused, not_traced, param_count, same_outputs
from .evaluation import code_graph
from .fold import agree, own_convolution
from .settings import wrong

_ADDS = frozenset({operator.add, operator.iadd, torch.add})


@dataclass(frozen=True)
class FuseSettings:
    """Settings of ``fuse``."""

    layer: ConvSpec
    activation: str  # its name, see `pwrewrite.layers.known`
    scalars: tuple[float, ...] = ()  # its numbers
    remove: str | None = None  # path of an activation module that is called once and becomes an identity
    scope: str | None = None  # else, or with ``residual``: path of the module whose code makes the call
    called: str = ""  # path of the activation module that this code calls; empty for a function
    residual: bool = False  # whether an addition lies between, which this code makes
    same: bool = False  # whether the layer's own code pads as TensorFlow does
    head: bool = False  # whether the code of ``scope`` lies behind the layer and applies the activation to its input
    alias: bool = False  # whether only the name ``remove`` becomes an identity, and the module's others stay
    keep_nan: bool = False  # whether NaN stays NaN behind an activation whose kernel returns a number for it

    @property
    def method(self) -> str:
        """What an edit calls it."""
        if not self.residual:
            return self.activation
        return "add" if self.activation == "none" else f"add+{self.activation}"


def fuse_layer(bench: Bench, op: Op, settings: FuseSettings) -> Edit:
    """Carries out a ``fuse`` op."""
    spec = settings.layer
    try:
        activation = settings.activation, checked(settings.activation, settings.scalars)
    except UsageError as error:
        raise PlanError(error.message, where=op.where("activation"), expected=error.expected, got=error.got) from None
    layer: nn.Module
    if settings.same:
        layer, refused = own_convolution(bench, op, spec, "does more than pad")
        trial = PointwiseActivation.of_layer(layer, spec, "none", same=True)
        if bench.fill and not trial.weight.is_meta and not agree(layer, trial):
            raise refused
    else:
        layer = bench.layer(op, op.path, spec)
    removed = None if settings.remove is None else bench.find(op, settings.remove, "remove")
    if removed is not None:
        bench.check_removable(op, str(settings.remove), removed)
        _check_removed(op, removed, activation)
    scope = None
    if settings.residual or removed is None:
        if settings.scope is None:
            raise wrong(op, "scope", "fuse needs a scope or what to remove", "a path")
        if settings.head:
            scope = _edit_head(bench, op, settings.scope, activation)
        else:
            called = bench.find(op, settings.called, "called") if settings.called else None
            in_code = removed is None and activation[0] != "none"
            edit_graph = partial(_CodeEdit, layer, activation, settings.residual, called, in_code)
            scope = _edit_code(bench, op, settings.scope, layer, edit_graph)
    new = PointwiseActivation.of_layer(layer, spec, *activation, same=settings.same, keep_nan=settings.keep_nan)
    aliases, params = bench.replace(layer, new, op.path), param_count(new)
    if removed is not None and settings.alias:
        owner, _, name = str(settings.remove).rpartition(".")
        bench.model.get_submodule(owner)._modules[name] = nn.Identity().train(removed.training)
    elif removed is not None:
        bench.remove(removed)
    edit = Edit(op, "module" if scope is None else "graph", settings.method, exact="both", graph_module=scope)
    return replace(edit, params_before=params, params_after=params, aliases=aliases)


def _check_removed(op: Op, module: nn.Module, activation: Found) -> None:
    """Checks that a module is the activation that the layer takes over."""
    same = module_activation(module) == activation
    if not same and bare(module):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), device="cpu")
        plain, numbers = ACTIVATIONS[activation[0]].plain, activation[1]
        # Where it fails, its code calls the activation on inputs of some other shape.
        same = same_outputs(module, lambda x: plain(x, *numbers), [x], 1e-4, 1e-5) is not False
    if not same:
        message = "the plan removes an activation that is another one here"
        raise wrong(op, "remove", message, activation[0], str(module)[:80])


def _edit_code(bench: Bench, op: Op, scope: str, layer: nn.Module, edit: Callable[[Regraphed, str], _CodeEdit]) -> str:
    """Takes the activation and the addition out of the code of the smallest enclosing module; its path."""
    failure: NotTraceable = _NotHere("the layer is not in this code")
    while True:
        module, inner = bench.find(op, scope, "scope"), stem(scope)
        if stem(op.path).startswith(inner) and module is not layer:
            bench.check_held(op.path, module)
            try:
                graph_module = code_graph(module)
                edit(graph_module, op.path.removeprefix(inner)).carry_out()
            except NotTraceable as error:
                failure = error
            else:
                bench.replace(module, graph_module)
                return scope
        if not scope or not isinstance(failure, _NotHere):
            raise not_traced(op, failure) from failure
        scope = scope.rpartition(".")[0]


def _edit_head(bench: Bench, op: Op, scope: str, activation: Found) -> str:
    """Takes the activation out of the code of a module that applies it to its input first; the module's path."""
    module = bench.find(op, scope, "scope")
    if hooked(module):
        raise Refused(op.path, SkipReason.HOOKS, f"{scope} has a hook, whose input would change")
    graph_module = bench.graph(op, module)
    calls = [node for node in graph_module.graph.nodes if call_activation(node) == activation]
    heads = [(node, source) for node in calls if isinstance(source := argument(node, 0, "input"), fx.Node)]
    heads = [(node, source) for node, source in heads if source.op == "placeholder"]
    if len(heads) != 1 or len(heads[0][1].users) != 1:
        raise not_traced(op, f"{scope} does not apply {activation[0]} to its input first")
    drop_node(*heads[0])
    finish(graph_module)
    bench.replace(module, graph_module)
    return scope


class _NotHere(NotTraceable):
    """The code of this module does not make the call; that of an enclosing one may."""


@dataclass
class _CodeEdit:
    """The change of one module's graph, in which the layer that takes things over lies at ``path``; see `FuseSettings`.

    ``in_code`` says whether a call of the activation, to the module ``called`` or a function, has to go.
    """

    layer: nn.Module
    activation: Found
    residual: bool
    called: nn.Module | None
    in_code: bool
    graph_module: Regraphed
    path: str

    def carry_out(self) -> None:
        """Edits the graph, which is to be thrown away where it raises `NotTraceable`."""
        call, chain = self._call()
        last = end = self._onward(call)
        other = None
        if self.residual:
            end = self._reader(last)
            other = self._other_operand(end, last)
        if self.in_code:
            end = self._reader(self._onward(end))
            self._check_activation(end)
        if other is not None:
            self._join(call, chain, other, end)
        elif end is not last:
            drop_node(end, last)
        drop_identities(self.graph_module)
        finish(self.graph_module)

    def _call(self) -> tuple[fx.Node, list[str]]:
        """The node whose output is the layer's, and the calls that it stands for where the layer lies deeper."""
        nodes: list[fx.Node] = [node for node in self.graph_module.graph.nodes if node.op == "call_module"]
        calls = [node for node in nodes if any(child is self.layer for child in self._module(node).modules())]
        if len(calls) != 1:
            raise _NotHere(f"{self.path} is called {len(calls)} times in this code, expected once")
        node, target = calls[0], str(calls[0].target)
        if len(node.args) != 1 or node.kwargs:
            raise NotTraceable(f"{target} takes more than one argument")
        chain = self._ends_with_layer(target, self._module(node))
        if chain is None:
            raise NotTraceable(f"{self.path} is not the last thing that {target} does")
        return node, chain

    def _ends_with_layer(self, target: str, module: nn.Module) -> list[str] | None:
        """The calls of a chain of containers whose last one, identities apart, is the layer."""
        if module is self.layer:
            return [target]
        names = [name for name in _chain(module) if not is_identity(module.get_submodule(name))]
        if not names:
            return None
        *first, last = names
        if any(self.layer in module.get_submodule(name).modules() for name in first):
            return None
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
        while len(node.users) == 1 and calls_identity(self.graph_module, reader := next(iter(node.users))):
            node = reader
        return node

    def _other_operand(self, node: fx.Node, last: fx.Node) -> fx.Node:
        """What a plain addition adds to ``last``."""
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not (method or (node.op == "call_function" and node.target in _ADDS)) or node.kwargs or len(node.args) != 2:
            raise NotTraceable(f"{node.format_node() or node.name} is no plain addition")
        other = node.args[1] if node.args[0] is last else node.args[0]
        if not isinstance(other, fx.Node) or other is last:
            raise NotTraceable("the other operand is no tensor of its own")
        return other

    def _check_activation(self, node: fx.Node) -> None:
        module = self._module(node) if node.op == "call_module" else None
        if self.called is not None:
            same = module is self.called
        else:
            found = call_activation(node) if module is None else module_activation(module)
            same = found == self.activation
        if not same:
            raise NotTraceable(f"this code has {node.target} behind {self.path}, not {self.activation[0]}")

    def _join(self, call: fx.Node, chain: list[str], other: fx.Node, end: fx.Node) -> None:
        """Puts the layer's call, with the residual, where the addition or the activation was."""
        source, graph = call.args[0], self.graph_module.graph
        for target in chain[:-1]:
            with graph.inserting_before(call):
                source = graph.call_module(target, (source,))
        with graph.inserting_before(end):
            joined = graph.call_module(chain[-1], (source, other))
        between = [call]
        while between[-1] is not end:
            between.append(next(iter(between[-1].users)))
        end.replace_all_uses_with(joined)
        for node in reversed(between):
            graph.erase_node(node)


def _chain(module: nn.Module) -> list[str]:
    """Names of the children that a module's code calls one after the other; none where it does more.

    Raises:
        NotTraceable: If the code does not say.
    """
    if hooked(module) or isinstance(module, PointwiseActivation):
        return []
    if type(module).forward is nn.Sequential.forward and isinstance(module, nn.Sequential):
        return list(module._modules)
    nodes = list(to_graph(module).graph.nodes)
    calls = nodes[1:-1]
    in_a_row = all(node.args == (before,) and not node.kwargs for before, node in zip(nodes, calls))
    if nodes[0].op != "placeholder" or any(node.op != "call_module" for node in calls) or not in_a_row:
        return []
    return [str(node.target) for node in calls] if nodes[-1].args == (nodes[-2],) else []
