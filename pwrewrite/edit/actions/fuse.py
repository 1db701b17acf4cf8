"""``fuse``: a layer takes over the activation behind it, and the residual addition between.

Settings: ``layer`` (shape facts), ``activation`` and ``scalars`` (see `pwrewrite.layers`); ``remove``: path of an
activation module that is called once and becomes an identity. Otherwise ``scope``: path of the module whose code makes
the call (or of one inside it; the search goes outwards), and ``called``: path of the activation module that it calls
there, empty for a function. ``residual``: whether an addition lies between, which that code makes. ``same``: whether
the layer's own code pads as TensorFlow does, so that the output is as large as the input over the stride. ``head``:
whether the code of ``scope`` lies behind the layer and applies the activation to its input before all else.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from ...capturing.code_trace import NotTraceable
from ...core.convolution import ConvSpec
from ...core.errors import PlanError, UsageError
from ...core.plan import Edit, Op, Skip, SkipReason
from ...forms.specs import spec_from_dict
from ...layers import PointwiseActivation
from ...layers.activations import checked
from ...layers.known import call_activation, hooked, is_identity, module_activation
from ..graph_edit import Regraphed, to_graph
from .bench import Bench, Refused, spec_of_module
from .evaluation import code_graph

_ADDS = frozenset({operator.add, operator.iadd, torch.add})


def fuse_layer(bench: Bench, op: Op) -> Edit:
    """Carries out a ``fuse`` op.

    Raises:
        PlanError: If the op makes no sense or was made for another model.
        Refused: If the layer must stay as it is, or the code around it cannot become a graph.
    """
    settings = op.settings
    spec = spec_from_dict(settings.get("layer"), op.where("layer"))
    name, scalars, residual = settings.get("activation"), settings.get("scalars", []), settings.get("residual", False)
    try:
        numbers = checked(str(name), scalars)
    except (UsageError, TypeError, ValueError) as error:
        raise PlanError(str(error).splitlines()[0], where=op.where("activation")) from None
    same = settings.get("same") is True
    layer = _padding_layer(bench, op, spec) if same else bench.layer(op, op.path, spec)
    remove = settings.get("remove")
    scope = settings.get("scope")
    act: nn.Module | None = None
    if remove is not None:
        act = bench.find(op, remove, "remove")
        bench.check_held(remove, act)
        if hooked(act):
            raise Refused(Skip(op.path, SkipReason.HOOKS, f"{remove} has a hook, which would no longer see it"))
    elif not isinstance(scope, str):
        raise PlanError("neither remove nor scope", where=op.where("scope"), expected="a path", got=repr(scope))
    graph_path = None
    if residual or act is None:
        if not isinstance(scope, str):
            raise PlanError("scope is no path", where=op.where("scope"), expected="a string", got=repr(scope))
        if settings.get("head") is True:
            graph_path = _edit_head(bench, op, scope, (str(name), numbers))
        else:
            graph_path = _edit_code(bench, op, scope, layer, (str(name), numbers), bool(residual), act)
    new = PointwiseActivation.of_layer(layer, spec, str(name), numbers, same=same)
    paths = bench.names_of(layer)
    bench.replace(layer, new)
    if act is not None:
        identity = nn.Identity()
        identity.train(act.training)
        if settings.get("alias") is True and isinstance(remove, str):
            bench.replace_item(remove, identity)
        else:
            bench.replace(act, identity)
    params = sum(p.numel() for p in new.parameters())
    return Edit(
        op=op,
        kind="module" if graph_path is None else "graph",
        method=f"add+{name}" if residual and name != "none" else "add" if residual else str(name),
        rank_in=None,
        rank_out=None,
        params_before=params,
        params_after=params,
        relative_error=None,
        exact="both",
        aliases=tuple(path for path in paths if path != op.path),
        graph_module=graph_path,
    )


def _padding_layer(bench: Bench, op: Op, spec: ConvSpec) -> Any:
    """A convolution with code of its own that pads its input; tried out, where it has values, at two sizes.

    Raises:
        PlanError: If it is another layer.
        Refused: If its code does something else.
    """
    layer: Any = bench.find(op, op.path)
    if not isinstance(layer, nn.Conv2d) or spec_of_module(layer) != spec:
        raise PlanError("the plan was made for another layer", where=op.where("layer"), got=str(layer)[:80])
    bench.check_held(op.path, layer)
    detail = f"{type(layer).__qualname__} has a forward of its own that does more than pad"
    refused = Refused(Skip(op.path, SkipReason.OVERRIDDEN_FORWARD, detail))
    if hooked(layer) or layer._parameters.get("weight") is None:
        raise refused
    if not bench.fill or layer.weight.is_meta:
        return layer
    trial = PointwiseActivation.of_layer(layer, spec, "none", same=True)
    generator = torch.Generator().manual_seed(0)
    for height, width in ((13, 16), (18, 15)):
        x = torch.randn(1, spec.in_channels, height, width, generator=generator).to(layer.weight)
        try:
            with torch.no_grad():
                found, wanted = layer(x), trial(x)
        except Exception as error:
            raise refused from error
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-2, atol=1e-3):
            raise refused
    return layer


def _edit_code(
    bench: Bench,
    op: Op,
    scope: str,
    layer: nn.Module,
    activation: tuple[str, tuple[float, ...]],
    residual: bool,
    removed: nn.Module | None,
) -> str:
    """Takes the activation and the addition out of the code of the smallest enclosing module; its path."""
    called = op.settings.get("called", "")
    act = bench.find(op, called, "called") if called else None
    failure = "the layer is not in this code"
    while True:
        module = bench.find(op, scope, "scope")
        inside = op.path == scope or not scope or op.path.startswith(f"{scope}.")
        if inside and module is not layer:
            bench.check_held(op.path, module)
            try:
                made = code_graph(module)
                relative = op.path.removeprefix(f"{scope}." if scope else "")
                edit = _CodeEdit(made, relative, layer, activation, residual, act, removed)
                edit.carry_out()
            except NotTraceable as error:
                failure = str(error)
                if not isinstance(error, _NotHere):
                    raise Refused(Skip(op.path, SkipReason.NOT_TRACED, failure)) from error
            else:
                bench.replace(module, made)
                return scope
        if not scope:
            raise Refused(Skip(op.path, SkipReason.NOT_TRACED, failure))
        scope = scope.rpartition(".")[0]


def _edit_head(bench: Bench, op: Op, scope: str, activation: tuple[str, tuple[float, ...]]) -> str:
    """Takes the activation out of the code of a module that applies it to its input first; the module's path."""
    module = bench.find(op, scope, "scope")
    bench.check_held(op.path, module)
    if hooked(module):
        raise Refused(Skip(op.path, SkipReason.HOOKS, f"{scope} has a hook, which would see what it is given change"))
    try:
        made = code_graph(module)
    except NotTraceable as error:
        raise Refused(Skip(op.path, SkipReason.NOT_TRACED, str(error))) from error
    found = []
    for node in made.graph.nodes:
        given = node.args[0] if node.args else node.kwargs.get("input")
        if call_activation(node) == activation and isinstance(given, fx.Node) and given.op == "placeholder":
            found.append((node, given))
    if len(found) != 1 or len(found[0][1].users) != 1:
        detail = f"{scope} does not apply {activation[0]} to its input first"
        raise Refused(Skip(op.path, SkipReason.NOT_TRACED, detail))
    node, given = found[0]
    node.replace_all_uses_with(given)
    made.graph.erase_node(node)
    made.graph.lint()
    made.recompile()
    bench.replace(module, made)
    return scope


class _NotHere(NotTraceable):
    """The code of this module does not make the call; that of an enclosing one may."""


class _CodeEdit:
    """The change of one module's graph."""

    def __init__(
        self,
        made: Regraphed,
        path: str,
        layer: nn.Module,
        activation: tuple[str, tuple[float, ...]],
        residual: bool,
        act: nn.Module | None,
        removed: nn.Module | None,
    ) -> None:
        self.made, self.graph, self.path, self.layer = made, made.graph, path, layer
        self.activation, self.residual, self.act, self.removed = activation, residual, act, removed

    def carry_out(self) -> None:
        """Edits the graph.

        Raises:
            NotTraceable: If the calls are not found in it as expected; the graph is to be thrown away then.
        """
        call, chain = self._call()
        last = self._onward(call)
        reader = self._reader(last)
        add = other = None
        if self.residual:
            add, other = self._addition(reader, last)
            last = self._onward(add)
            if self.activation[0] != "none" and self.removed is None:
                reader = self._reader(last)
        if self.removed is None and self.activation[0] != "none":
            self._check_activation(reader)
            end = reader
        else:
            end = add if add is not None else last
        if add is not None:
            assert other is not None
            self._join(call, chain, other, end)
        else:
            end.replace_all_uses_with(last)
            self.graph.erase_node(end)
        for node in list(self.graph.nodes):
            if node.op == "call_module" and len(node.args) == 1 and is_identity(self._module(node)):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        self.graph.lint()
        self.made.recompile()

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
        return any(child is self.layer for child in self._module(node).modules())

    def _ends_with_layer(self, target: str, module: nn.Module) -> list[str] | None:
        """The calls of a chain of containers whose last one, identities apart, is the layer."""
        if module is self.layer:
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
        return self.made.get_submodule(str(node.target))

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
            if self.act is not None and module is self.act:
                return
            if self.act is None and module_activation(module) == self.activation:
                return
        elif self.act is None and call_activation(node) == self.activation:
            return
        raise NotTraceable(f"this code has {node.target} behind {self.path}, not {self.activation[0]}")

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
