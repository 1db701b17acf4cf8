"""`MergeBranches`: branches of linear layers and their sum become one convolution where that costs less. Exact.

What is merged is any part of the graph that reads one value and gives one, out of convolutions, linear maps, norms with
fixed statistics, average pools that count what they pad, identities, scales, shifts, sums and differences, with a sum
or a scale in it that code makes: the training form of RepVGG, MobileOne, RepViT, FastViT, Diverse Branch Block and
ACNet, a residual addition around a convolution, two heads that are averaged, LayerScale behind a convolution. `Affine`
has the algebra, and says what is not exact: a shift in front of a kernel that pads with zeros, of which the border has
none; two k×k kernels in a row.

Of the parts that end in one value the largest is taken that is exact and takes no more MACs than its layers. The code
around it becomes a graph, so one module's code must make the sum; code with decisions, hooks, layers that are called
twice or share a weight, and layers whose result is read elsewhere are left. Sums of several inputs are not taken apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import cast

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..capturing.records import Capture, Layer, info
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..core.records import as_data
from ..decompose.affine import Affine, NotExact
from ..edit.actions.branches import KINDS, LINEAR, POOLS, BranchSettings, ModuleReader, evaluate
from ..edit.actions.code_norm import NormFacts
from ..edit.actions.evaluation import function_of
from ..edit.swap import stem
from ..layers.known import hooked, is_identity
from .base import Pass, Proposal
from .patterns import Graph, passes_on, stack_of, tensor_of

_CALLS = ("call_module", "call_function", "call_method")


class MergeBranches(Pass):
    """Merges branches of linear layers, and what is added to them, into one convolution."""

    name = "merge-branches"
    summary = "parallel convolutions, norms, identities and their sum become one convolution where that costs less"
    exact = "eval"

    def propose(self, capture: Capture) -> list[Proposal]:
        graph, taken = Graph(capture), set[fx.Node]()
        proposals: dict[str, Proposal] = {}
        for root in reversed(graph.nodes):
            if root in taken or passes_on(root) or root.name in graph.layers or not _linear(graph, root):
                continue
            proposal: Proposal | None = None
            region = _Region(graph, root, (root,))
            for candidate in _regions(graph, root):
                if not candidate.worth:
                    continue
                better = candidate.proposal()
                if isinstance(better, Op) or (proposal is None and candidate.sums):
                    proposal, region = better, candidate
            if isinstance(proposal, Op):
                taken.update(region.nodes)
            if proposal is not None and (isinstance(proposal, Op) or proposal.path not in proposals):
                proposals[proposal.path] = proposal
        return list(proposals.values())  # the last first: an edit leaves how often code called what before it


def _inputs(graph: Graph, node: fx.Node) -> list[fx.Node]:
    """What a node reads, its weights apart; a norm's statistics are among these."""
    if node.name in graph.layers:
        return [arg for arg in node.args[:1] if isinstance(arg, fx.Node)]
    return [n for n in node.all_input_nodes if n.op != "get_attr"]


def _linear(graph: Graph, node: fx.Node) -> bool:
    """Whether a node may be part of one convolution."""
    if passes_on(node):
        return len(node.args) == 1
    if node.op != "call_module" and node.name in graph.layers:
        return True  # what `eligible` says of it is the reason why it is left
    module = graph.modules.get(info(node).path)
    if node.op == "call_module":
        if len(node.args) != 1 or node.kwargs or not isinstance(module, (*LINEAR, *POOLS, _BatchNorm)):
            return False
        return not isinstance(module, _BatchNorm) or _fixed(module)
    kind = KINDS.get(function_of(node), "")
    if function_of(node) == "batch_norm":
        flags = [node.kwargs.get("training", False), *node.args[5:6]]
        return isinstance(module, _BatchNorm) and _fixed(module) and not any(flags)
    if not kind or len(node.args) != 2 or node.kwargs or len(info(node).outputs) != 1:
        return False
    operands = [arg for arg in node.args if isinstance(arg, fx.Node) and arg.op != "get_attr"]
    if kind in ("mul", "div") and (len(operands) != 1 or (kind == "div" and operands[0] is not node.args[0])):
        return False
    in_place = function_of(node)[-1] == "_" or function_of(node)[:3] == "__i" or function_of(node)[:1] == "i"
    if in_place and isinstance(node.args[0], fx.Node) and len(node.args[0].users) > 1:
        return False  # who else reads it may see what is written
    return all(info(n).outputs == info(node).outputs for n in operands)


def _fixed(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and norm.running_var is not None and not norm.training


def _regions(graph: Graph, root: fx.Node) -> Iterator[_Region]:
    """The parts of a graph that end in a node and read one value, the smallest first."""
    nodes, frontier = [root], set(_inputs(graph, root))
    while frontier:
        latest = max(frontier, key=graph.order.__getitem__)
        if len(frontier) == 1:
            yield _Region(graph, latest, tuple(reversed(nodes)))
        if latest.op == "placeholder" or not _linear(graph, latest) or not set(latest.users) <= set(nodes):
            return
        nodes.append(latest)
        frontier = (frontier - {latest}) | set(_inputs(graph, latest))


@dataclass(frozen=True)
class _Region:
    """A part of a graph: what it reads, and its nodes in order."""

    graph: Graph
    source: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def root(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def layers(self) -> list[Layer]:
        return [self.graph.layers[node.name] for node in self.nodes if node.name in self.graph.layers]

    @property
    def sums(self) -> bool:
        """Whether it holds a sum of two maps."""
        kinds = [(KINDS.get(function_of(node)), len(_inputs(self.graph, node))) for node in self.nodes]
        return any(kind in ("add", "sub") and operands == 2 for kind, operands in kinds)

    @property
    def worth(self) -> bool:
        """Whether it holds a layer and a sum, a scale or a shift that code makes."""
        made = any(KINDS.get(function_of(node)) for node in self.nodes)
        return made and bool(self.layers) and len(info(self.source).outputs) == 1

    def proposal(self) -> Proposal:
        layers, graph = self.layers, self.graph
        place = max(layers, key=lambda layer: layer.macs)
        for layer in layers:
            if refusal := graph.unfusable(layer):
                return refusal
        try:
            merged = self._merged()
        except NotExact as error:
            return Skip(place.path, SkipReason.PADDING if error.padding else SkipReason.NOT_LINEAR, str(error))
        spec, macs = merged.spec, sum(layer.macs for layer in layers)
        new = spec.macs(*(info(node).outputs[0].shape for node in (self.source, self.root)))
        if new > macs:
            detail = f"merged with its branches it would take {new:,} MACs against {macs:,}"
            return Skip(place.path, SkipReason.NO_GAIN, detail)
        for layer in layers:
            if len(layer.calls) != 1:
                detail = f"called {len(layer.calls)} times; merging it would need copies of it"
                return Skip(layer.path, SkipReason.CALLED_TWICE, detail)
        scope, calls = self._calls()
        if scope is None:
            detail = "no one module's code calls the branches and adds what they make"
            return Skip(place.path, SkipReason.NOT_TRACED, detail)
        removed = [path for path in self._weighted() if path != place.path]
        if refusal := self._refusal(place, removed, scope):
            return refusal
        params = sum(p.numel() for path in (place.path, *removed) for p in graph.modules[path].parameters())
        own = graph.modules[scope].named_parameters(recurse=False)
        params += sum(p.numel() for name, p in own if self._last(scope, name))
        settings = as_data(BranchSettings(scope, tuple(calls), spec, spec.dims, spec.in_channels, tuple(removed)))
        return Op("merge-branches", place.path, MergeBranches.name, settings, Estimate(params, spec.params, macs, new))

    def _merged(self) -> Affine:
        graph, first = self.graph, self.layers[0]
        dims = first.spec.dims if first.spec is not None else 0
        spec = info(self.source).outputs[0]
        if len(spec.shape) != dims + 2 or any(info(n).outputs[0].dtype != spec.dtype for n in self.nodes):
            raise NotExact("what it reads is not batched, or of another dtype")
        reader = ModuleReader(Op("merge-branches", first.path, "", {}), dims, fill=False)

        def operand(node: fx.Node, x: Affine | None) -> Affine | Tensor:
            if x is None:
                tensor = tensor_of(graph.owners, str(node.target))
                if tensor is None:
                    raise NotExact("an operand is no tensor of the model")
                return reader.plain(tensor)
            module = graph.modules[info(node).path]
            if isinstance(module, _BatchNorm) and (facts := NormFacts.of(module)):
                return x.then(reader.norm(facts))
            return x if passes_on(node) else reader.module(module, x)

        like = reader.plain(cast("Tensor", graph.modules[first.path].weight))
        start = Affine.diagonal(like.new_ones(spec.shape[1]), None, dims)
        return evaluate(self.root, {self.source: start}, operand).symmetric()

    def _calls(self) -> tuple[str | None, list[tuple[str, int]]]:
        """The module whose code makes the sum, and the calls there that make up the region; None where there is none.

        All that these calls do is in the region, so what the region reads is known to that code.
        """
        stacks = {node: stack_of(node) for node in self.nodes}
        callers = zip(*(stack[:-1] for stack in stacks.values()))
        depth = sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, callers))
        prefix = stacks[self.root][:depth]
        scope = prefix[-1] if prefix else None
        if not isinstance(scope, str) or isinstance(self.graph.modules.get(scope), (nn.Sequential, nn.ModuleList)):
            return None, []
        calls: dict[tuple[str, int], None] = {}
        seen, children, inside = Counter[str](), set[str](), set(self.nodes)
        for node in self.graph.nodes:
            if node.op not in _CALLS or (stack := stack_of(node))[:depth] != prefix:
                continue
            callee = stack[depth]
            if isinstance(callee, str):
                what, module = callee.removeprefix(stem(scope)), self.graph.modules.get(callee)
                if node in inside and not (module is not None and is_identity(module)):
                    calls[what, seen[what]] = None
                    children.add(callee)
                seen[what] += len(stack) == depth + 1
            elif what := KINDS.get(function_of(node), ""):
                if node in inside:
                    calls[what, seen[what]] = None
                seen[what] += 1
        others = (node for node in self.graph.nodes if node.op in _CALLS and node not in inside)
        if any(callee in children for node in others for callee in stack_of(node)):
            return None, []
        return scope, list(calls)

    def _last(self, scope: str, name: str) -> bool:
        """Whether it alone reads a tensor of the module whose code makes the sum."""
        reads = self.graph.readers(scope, name)
        return bool(reads) and all(user in self.nodes for user in reads)

    def _weighted(self) -> list[str]:
        """Paths of the modules with weights or statistics that it runs."""
        nodes = [node for node in self.nodes if node.op == "call_module" or _own(self.graph, node)]
        modules = {info(node).path: self.graph.modules[info(node).path] for node in nodes}
        return [path for path, module in modules.items() if [*module.parameters(), *module.buffers()]]

    def _refusal(self, place: Layer, removed: Sequence[str], scope: str) -> Skip | None:
        """Why its modules have to stay as they are."""
        graph = self.graph
        inside = set(self.nodes)
        callers = {path for node in self.nodes for path in (*info(node).callers, info(node).path)} - {scope}
        for path in sorted(callers & graph.modules.keys()):
            if path.startswith(stem(scope)) and hooked(graph.modules[path]):
                return Skip(place.path, SkipReason.HOOKS, f"{path} has a hook, which would no longer be called")
        for path in removed:
            module = graph.modules[path]
            if any(info(n).path == path for n in graph.nodes if n not in inside and n.op not in ("get_attr", "output")):
                return Skip(place.path, SkipReason.CALLED_TWICE, f"{path} is called more than once")
            if graph.shares(module):
                return Skip(place.path, SkipReason.SHARED_WEIGHT, f"{path} shares a parameter with another module")
            names = (name for name, _ in (*module.named_parameters(), *module.named_buffers()))
            if any(user not in inside for user in graph.readers(path, *names)):
                return Skip(place.path, SkipReason.WEIGHT_READ, f"what {path} holds is also read by other code")
        if graph.written(self.source, self.source, self.root):
            detail = "what the branches read is written into before their sum is made"
            return Skip(place.path, SkipReason.WRITTEN, detail)
        return None


def _own(graph: Graph, node: fx.Node) -> bool:
    """Whether a function is called by the code of a module without children that is part of a region."""
    module = graph.modules.get(info(node).path)
    return module is not None and (isinstance(module, _BatchNorm) or not list(module.children()))
