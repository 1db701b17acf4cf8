"""Which layers read the same map and could share one reduction of it: `find_shared`.

The branches of an Inception module, a residual block and its shortcut, the rates of an ASPP, the heads behind a feature
map: dense convolutions that are handed the very same tensor. The reduction has to run once, in the code that hands the
map to them, so that code must be one module's and become a graph, and nothing else may happen to the map on its way
from there to a reader. Who else reads the map keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile, zip_longest
from math import prod

from torch import fx

from ..capturing.code_trace import NotTraceable
from ..capturing.eligibility import eligible
from ..capturing.records import Capture, Layer, info
from ..core.convolution import ConvSpec
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..core.records import Json
from ..edit.actions.evaluation import code_graph
from ..edit.swap import stem
from ..forms.expand import FORM as EXPAND
from ..forms.specs import Chain, chain_macs, chain_params, pointwise_spec
from ..layers.factorized import Factorized, Projected
from ..layers.known import hooked
from .base import enclosing_rewrite, spec_of
from .channel_units import ReaderOf, norm_behind
from .narrow import reading
from .patterns import Graph, stack_of
from .reaching import reached, reached_around

NAME = "share-reduction"
"""Of the pass, the form of budgets, and the action."""


@dataclass(frozen=True)
class SharedMap:
    """A map and the layers that could share a reduction of it.

    Attributes:
        scope: Path of the module whose code hands it to them.
        calls: What that code calls with it, by path from there, in order: the readers, or modules around them.
        readers: The layers, in graph order.
        shape: That of the map.
        reduction: Name that is free there for the reduction.
    """

    scope: str
    calls: tuple[str, ...]
    readers: tuple[ReaderOf, ...]
    shape: tuple[int, ...]
    reduction: str

    @property
    def path(self) -> str:
        """That of the first reader."""
        return self.readers[0].layer.path

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the readers."""
        return tuple(reader.layer for reader in self.readers)

    @property
    def full(self) -> int:
        """The width from which on a reduction is exact."""
        return min(self.shape[1], sum(prod(spec_of(y).weight_shape) // y.in_channels for y in self.layers))

    def reduce_spec(self, rank: int) -> ConvSpec:
        """The reduction."""
        return pointwise_spec(len(self.shape) - 2, self.shape[1], rank)

    def core(self, reader: int, rank: int, width: int | None = None) -> Chain:
        """What a reader becomes behind a reduction: its core, with a 1×1 behind it where that has a width."""
        narrower = replace(spec_of(self.layers[reader]), in_channels=rank)
        return (("core", narrower),) if width is None else EXPAND.stages(narrower, {EXPAND.widths[0]: width})

    def cost(self, reader: int, rank: int, width: int | None = None) -> tuple[int, int]:
        """Parameters and MACs of that."""
        chain, (call,) = self.core(reader, rank, width), self.layers[reader].calls
        return chain_params(chain), chain_macs(chain, self.reduced(rank), call.output_shape)

    def reduced(self, rank: int) -> tuple[int, ...]:
        """The shape of the reduced map."""
        return (self.shape[0], rank, *self.shape[2:])

    def estimate(self, rank: int, widths: Sequence[int | None] = ()) -> Estimate:
        """What parameters and MACs become with a reduction of some width, and 1×1s of some behind the cores."""
        costs = [(self.reduce_spec(rank).params, prod(self.shape) * rank)]
        costs += [self.cost(i, rank, width) for i, (_, width) in enumerate(zip_longest(self.layers, widths))]
        params, macs = (sum(each) for each in zip(*costs))
        return Estimate(sum(y.params for y in self.layers), params, sum(y.macs for y in self.layers), macs)

    def op(self, rank: int, widths: Sequence[int | None] = ()) -> Op:
        """The op that puts a reduction of some width in, and 1×1s of some behind the cores."""
        readers = [
            reading(reader) | ({} if width is None else {"width": width})
            for reader, width in zip_longest(self.readers, widths)
        ]
        settings: dict[str, Json] = {
            "scope": self.scope,
            "calls": list(self.calls),
            "reduction": self.reduction,
            "rank": rank,
            "readers": readers,
        }
        return Op(NAME, self.path, NAME, settings, self.estimate(rank, widths))


class _Unshared(Exception):
    """Why layers cannot share a reduction: those at or inside of a path, or all of them."""

    def __init__(self, reason: SkipReason, detail: str, path: str = "") -> None:
        self.reason, self.detail, self.path = reason, detail, path


def find_shared(capture: Capture, graph: Graph | None = None) -> tuple[list[SharedMap], list[Skip]]:
    """The maps of a model that several layers could share a reduction of, and why each other convolution does not.

    Where some of the readers of a map are wider than 1×1 and others are not, the former are also found alone.
    """
    graph = graph or Graph(capture)
    finder, readers = _Finder(graph), dict[fx.Node, list[fx.Node]]()
    maps, skips = list[SharedMap](), list[Skip]()
    for node in graph.nodes:
        if node.name in graph.layers and spec_of(graph.layers[node.name]).dims:
            source = node.args[0] if node.args else node.kwargs.get("input")
            if isinstance(source, fx.Node):  # of which, if it gives several tensors, nothing says who reads which
                readers.setdefault(source if len(info(source).outputs) == 1 else node, []).append(node)
    for source, nodes in readers.items():
        fit = list[fx.Node]()
        for node in nodes:
            refusal = finder.refusal(node) if len(nodes) > 1 else None
            fit += [node] * (refusal is None)
            skips += [refusal] if refusal is not None else []
        found = finder.shared(source, fit, skips)
        wide = [node for node in fit if not spec_of(graph.layers[node.name]).is_pointwise]
        maps += found + (finder.shared(source, wide, []) if 1 < len(wide) < len(fit) and found else [])
    shared = {layer.path for each in maps for layer in each.layers}
    told = dict[str, Skip]()
    for skip in skips:
        if skip.path not in shared and (skip.path not in told or told[skip.path].reason is SkipReason.WRONG_FORM):
            told[skip.path] = skip
    return maps, list(told.values())


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.codes: dict[str, fx.GraphModule | NotTraceable] = {}

    def refusal(self, node: fx.Node) -> Skip | None:
        """Why a layer cannot read a reduction; None where it could."""
        graph, layer = self.graph, self.graph.layers[node.name]
        spec, path = spec_of(layer), layer.path
        if layer.functional:
            return Skip(path, SkipReason.FUNCTIONAL, "called as a function, whose weight is not a module's")
        if len(layer.calls) > 1:
            return Skip(path, SkipReason.CALLED_TWICE, "called several times, on several maps")
        if (skip := eligible(graph.capture, layer, graph.owners)) is not None:
            return skip
        place = enclosing_rewrite(graph.modules, path, (Factorized, Projected))
        if place is not None:
            return Skip(path, SkipReason.ALREADY_BOTTLENECK, f"part of what a rewrite put at {place or 'the root'}")
        if spec.groups > 1 or spec.transposed:
            kind = "transposed" if spec.transposed else "grouped"
            return Skip(path, SkipReason.WRONG_FORM, f"a {kind} convolution cannot share the reduction of others")
        if len(layer.calls[0].input_shape) != spec.dims + 2:
            return Skip(path, SkipReason.WRONG_FORM, "it runs without a batch axis")
        if spec.pads_copy and (writer := graph.overwriter(layer)) is not None:
            detail = f"its input is overwritten by {writer.name} after it ran, and the reduction would keep it"
            return Skip(path, SkipReason.WRITTEN, detail)
        return None

    def shared(self, source: fx.Node, nodes: Sequence[fx.Node], skips: list[Skip]) -> list[SharedMap]:
        """The map that some layers read, if they can share it; why others cannot is added to ``skips``."""
        left = list(nodes)
        while len(left) > 1:
            try:
                return [self._map(source, left)]
            except _Unshared as why:
                out = [node for node in left if not why.path or why.path in stack_of(node)]
                skips += [Skip(self.graph.layers[node.name].path, why.reason, why.detail) for node in out]
                left = [node for node in left if node not in out]
        alone = "no other convolution that could share a reduction reads its input"
        skips += [Skip(self.graph.layers[node.name].path, SkipReason.WRONG_FORM, alone) for node in left]
        return []

    def _map(self, source: fx.Node, nodes: Sequence[fx.Node]) -> SharedMap:
        graph = self.graph
        if graph.written(source, nodes[0], nodes[-1]):
            raise _Unshared(SkipReason.WRITTEN, "what they read is written into in between")
        stacks = {node: stack_of(node) for node in nodes}
        callers = zip(*(stack[:-1] for stack in stacks.values()))
        depth = sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, callers))
        prefix, callees = stacks[nodes[0]][:depth], dict.fromkeys(stack[depth] for stack in stacks.values())
        scope = prefix[-1] if prefix else None
        paths = [each for each in callees if isinstance(each, str)]
        if not isinstance(scope, str) or not all(each.startswith(stem(scope)) for each in paths):
            raise _Unshared(SkipReason.NOT_TRACED, "no one module's code hands the map to them")
        for stack in stacks.values():
            self._check_within([each for each in stack[depth:] if isinstance(each, str)])
        for path in paths:
            inside = {graph.layers[node.name].path for node, stack in stacks.items() if stack[depth] == path}
            try:
                read = set(self._read_by(path, inside))
            except _Unshared as unread:  # maybe of a module to which none of these layers belongs
                raise _Unshared(unread.reason, unread.detail, path) from unread
            if read != inside:
                raise _Unshared(SkipReason.NOT_TRACED, f"{path} hands the map to other layers, too", path)
        calls = self._calls(scope, [path.removeprefix(stem(scope)) for path in paths])
        if why := reached_around(graph.modules, scope, {call.partition(".")[0] for call in calls}):
            raise _Unshared(SkipReason.NOT_TRACED, why)
        self._check_between(scope, calls)
        readers = tuple(self._reader(node) for node in nodes)
        name = "_".join(["shared", *calls[0].split(".")])
        while hasattr(graph.modules[scope], name):
            name += "_"
        return SharedMap(scope, calls, readers, info(source).outputs[0].shape, name)

    def _reader(self, node: fx.Node) -> ReaderOf:
        layer = self.graph.layers[node.name]
        return ReaderOf(layer, norm="" if spec_of(layer).bias else norm_behind(self.graph, node))

    def _code(self, path: str) -> fx.Graph:
        """The code of a module, which must be the same for every input."""
        if path not in self.codes:
            try:
                self.codes[path] = code_graph(self.graph.modules[path])
            except NotTraceable as error:
                self.codes[path] = error
        code = self.codes[path]
        if isinstance(code, NotTraceable):
            raise _Unshared(SkipReason.NOT_TRACED, f"the code of {path or 'the model'} hands the map on: {code}", path)
        return code.graph

    def _check_within(self, stack: Sequence[str]) -> None:
        """Refuses where code between a call and a reader, the last of the stack, asks for what will be another."""
        *around, reader = stack
        for path in around:
            if name := reached(self.graph.modules[path], self.graph.modules[reader], ("in_channels", "weight")):
                raise _Unshared(SkipReason.WEIGHT_READ, f"the code of {path} may ask for {name} of {reader}", path)

    def _check_between(self, scope: str, calls: Sequence[str]) -> None:
        """Refuses where a module that is given the map in between may write into it on other inputs."""
        nodes = list(self._code(scope).nodes)
        places = [i for i, node in enumerate(nodes) if node.op == "call_module" and node.target in calls]
        (held,) = nodes[places[0]].args
        for node in nodes[places[0] : places[-1]]:
            if node.op == "call_module" and node.target not in calls and held in node.all_input_nodes:
                try:
                    self._check_fixed(f"{stem(scope)}{node.target}")
                except _Unshared as why:
                    detail = f"the map is given to {stem(scope)}{node.target} in between, and {why.detail}"
                    raise _Unshared(SkipReason.WRITTEN, detail) from why

    def _check_fixed(self, path: str) -> None:
        """Refuses where a module, or what it hands its input to, has code that is not the same for every input."""
        module = self.graph.modules[path]
        if type(module).__module__.startswith("torch.nn.modules.") and not any(module.children()):
            return
        for node in self._code(path).nodes:
            if node.op == "call_module" and any(each.op == "placeholder" for each in node.all_input_nodes):
                self._check_fixed(f"{stem(path)}{node.target}")

    def _calls(self, scope: str, names: Sequence[str]) -> tuple[str, ...]:
        """The calls of some children in a module's code, which must all be given one value and nothing else."""
        nodes = [node for node in self._code(scope).nodes if node.op == "call_module"]
        called = {name: [node for node in nodes if node.target == name] for name in names}
        values = {node.args[0] for nodes in called.values() for node in nodes if node.args}
        plain = all(len(nodes) == 1 and len(nodes[0].args) == 1 and not nodes[0].kwargs for nodes in called.values())
        if not plain or len(values) != 1:
            what = f"the code of {scope or 'the model'} does not call {', '.join(names)} with one value"
            raise _Unshared(SkipReason.NOT_TRACED, what)
        return tuple(called)

    def _read_by(self, path: str, readers: set[str]) -> Iterator[str]:
        """Paths of the layers to which a module, or what it calls, hands its one input; nothing else may read it."""
        if path in readers:
            yield path
            return
        if hooked(self.graph.modules[path]):
            raise _Unshared(SkipReason.HOOKS, f"{path} has a hook, which would see the reduced map", path)
        inputs = [node for node in self._code(path).nodes if node.op == "placeholder"]
        if not inputs or any(node.users for node in inputs[1:]):
            raise _Unshared(SkipReason.NOT_TRACED, f"{path} takes more than the map", path)
        for user in inputs[0].users:
            alone = user.op == "call_module" and len(user.args) == 1 and not user.kwargs
            if not alone:
                raise _Unshared(
                    SkipReason.NOT_LINEAR, f"the code of {path} does more with the map than to hand it on", path
                )
            yield from self._read_by(f"{stem(path)}{user.target}", readers)
