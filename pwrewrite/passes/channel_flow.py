"""Where the channels of one branch of a concatenation go: `follow`.

The walk starts at a concatenation and goes forward through everything that treats each channel alone, until every path
ends at a convolution or linear map (a *consumer*, whose input channels can change), at a norm by channel (which changes
with them and lets them through) or at an output of the model. Anything else is a reason not to change the width.

Operations that are linear and treat all channels the same way commute with a 1×1: behind them, consumers can be
factorised jointly with a projection. The flow remembers the first one on the way that does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import fx

from ..capturing.eligibility import eligible
from ..capturing.functions import argument
from ..capturing.records import Layer, info
from ..core.operations import OPERATIONS
from ..edit.actions.project import CHANNEL_NORMS
from .patterns import Graph

_LINEAR = frozenset(name for row in OPERATIONS if row.linear for name in row.names)
_ALONE = frozenset(
    name
    for row in OPERATIONS
    if row.kind in ("activation", "elementwise", "arithmetic", "pool") and row.name != "prelu"
    for name in row.names
)
_RESHAPES = frozenset(("flatten", "view", "reshape", "squeeze"))


@dataclass(frozen=True)
class Segment:
    """The part of a tensor's axis 1 that comes from the branch: ``channels`` with ``repeat`` entries each."""

    offset: int
    channels: int
    repeat: int = 1


@dataclass
class Flow:
    """What the branch's channels reach; each with the part of its channels that comes from the branch."""

    consumers: list[tuple[Layer, Segment]] = field(default_factory=list)
    norms: list[tuple[str, Any, Segment]] = field(default_factory=list)  # path and module
    outputs: list[tuple[int, int, Segment]] = field(default_factory=list)  # number of an output, and its width
    nonlinear: str = ""  # what on the way does not commute with a 1×1
    dropout: bool = False  # whether one is on the way, which commutes in eval mode only
    blocked: str = ""  # why the width cannot change
    nodes: dict[fx.Node, Segment] = field(default_factory=dict)


def channel_axis(node: fx.Node) -> bool:
    """Whether a node joins tensors along axis 1, the channels of a batch."""
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    made = [info(source).outputs for source in node.all_input_nodes]  # none by an assignment to items, ``x[:, :4] = y``
    return isinstance(dim, int) and all(m and len(m[0].shape) >= 2 and dim % len(m[0].shape) == 1 for m in made)


def joined(node: fx.Node) -> list[fx.Node]:
    """The tensors that a concatenation joins, in order."""
    return list(argument(node, 0, "tensors", ()))


def follow(graph: Graph, branch: fx.Node, cat: fx.Node) -> Flow:
    """Follows the output of a branch from a concatenation along the channels to everything that reads it."""
    walk = _Walk(graph)
    reached = {branch: Segment(0, info(branch).outputs[0].shape[1])}
    for node in graph.nodes[graph.order[cat] :]:
        sources = [source for source in node.all_input_nodes if source in reached]
        if sources:
            segment = walk.through(node, reached, sources)
            if walk.flow.blocked:
                break
            if segment is not None:
                reached[node] = walk.flow.nodes[node] = segment
    return walk.flow


class _Walk:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.flow = graph, Flow()

    def through(self, node: fx.Node, reached: dict[fx.Node, Segment], sources: list[fx.Node]) -> Segment | None:
        """The branch's part of what a node makes; None where the way ends there."""
        facts = info(node)
        if node.op == "output":
            tensors = list[fx.Node]()
            fx.node.map_arg(node.args, tensors.append)
            widths = [(i, info(t).outputs[0].shape[1], reached[t]) for i, t in enumerate(tensors) if t in reached]
            self.flow.outputs += widths
            return None
        if len(sources) > 1:
            return self._block(node, "joins several copies of the branch's channels")
        source, segment = sources[0], reached[sources[0]]
        if facts.op == "cat":
            return self._cat(node, source, segment)
        if node.name in self.graph.layers:
            return self._consumer(node, source, segment)
        if node.op == "call_module" and isinstance(self.graph.modules.get(str(node.target)), CHANNEL_NORMS):
            return self._norm(node, segment)
        if len(node.all_input_nodes) > 1:
            return self._block(node, "combines them with another tensor, which would keep its width")
        return self._elementwise(node, source, segment)

    def _elementwise(self, node: fx.Node, source: fx.Node, segment: Segment) -> Segment | None:
        op, before, after = info(node).op, info(source).outputs[0].shape, info(node).outputs
        if len(after) != 1:
            return self._block(node, "splits the tensor")
        shape = after[0].shape
        same_channels = len(shape) >= 2 and shape[:2] == before[:2]
        if op in _RESHAPES:
            spatial = prod(before[2:])
            if same_channels:
                return segment
            if shape != (before[0], before[1] * spatial):
                return self._block(node, "moves channels to another axis")
            return Segment(segment.offset * spatial, segment.channels, segment.repeat * spatial)
        if not same_channels or (op == "mean" and 1 in reduced_axes(node, len(before))):
            return self._block(node, "does not keep the channels apart")
        if op in _LINEAR or op in ("mean", "sum") or (op == "pad" and _zero_pad(node)):
            self.flow.dropout |= op == "dropout"
            return segment
        if op in _ALONE or op == "pad" or (op == "prelu" and self._one_slope(node)):
            self._remember(node)
            return segment
        return self._block(node, "is not known to treat each channel alone")

    def _cat(self, node: fx.Node, source: fx.Node, segment: Segment) -> Segment | None:
        tensors = joined(node)
        if tensors.count(source) != 1:
            return self._block(node, "joins the branch's channels with themselves")
        if not channel_axis(node):
            return self._block(node, "joins them along another axis")
        earlier = sum(info(tensor).outputs[0].shape[1] for tensor in tensors[: tensors.index(source)])
        return Segment(earlier + segment.offset, segment.channels, segment.repeat)

    def _consumer(self, node: fx.Node, source: fx.Node, segment: Segment) -> Segment | None:
        layer = self.graph.layers[node.name]
        read = argument(node, 0, "input")
        dims = 0 if layer.spec is None else layer.spec.dims
        if layer.functional or read is not source:
            return self._block(node, "reads them in a functional call, whose weight is not a module's")
        if layer.spec is not None and layer.spec.groups != 1:
            return self._block(node, "is grouped, so its output channels hang on single input channels")
        if len(info(source).outputs[0].shape) != dims + 2:
            return self._block(node, "reads another axis as its channels")
        if len(layer.calls) > 1:
            return self._block(node, "is called several times")
        if refused := eligible(self.graph.capture, layer, self.graph.owners):
            return self._block(node, f"cannot change: {refused.detail}")
        self.flow.consumers.append((layer, segment))
        return None

    def _norm(self, node: fx.Node, segment: Segment) -> Segment | None:
        path = str(node.target)
        norm = self.graph.modules[path]
        if self.graph.calls[path] > 1:
            return self._block(node, "is called several times")
        if segment.repeat > 1:
            return self._block(node, "normalises single positions")
        if self.graph.shares(norm):
            return self._block(node, "shares its parameters")
        self.flow.norms.append((path, norm, segment))
        self._remember(node)
        return segment

    def _one_slope(self, node: fx.Node) -> bool:
        module: Any = self.graph.modules.get(str(node.target))
        return node.op == "call_module" and module.num_parameters == 1

    def _remember(self, node: fx.Node) -> None:
        self.flow.nonlinear = self.flow.nonlinear or describe(node)

    def _block(self, node: fx.Node, why: str) -> Segment | None:
        self.flow.blocked = f"{describe(node)} {why}"
        return None


def describe(node: fx.Node) -> str:
    """A node in words: its operation, and the module where it runs."""
    facts = info(node)
    return f"{facts.op} in {facts.path}" if facts.path else facts.op


def reduced_axes(node: fx.Node, rank: int) -> tuple[int, ...]:
    """The axes that a reduction goes over."""
    given = argument(node, 1, "dim", ())
    values = given if isinstance(given, (tuple, list)) else (given,)
    return tuple(value % rank for value in values if isinstance(value, int))


def _zero_pad(node: fx.Node) -> bool:
    """Whether a padding commutes with a 1×1: all do but those with a constant other than 0."""
    return str(argument(node, 2, "mode", "constant")) != "constant" or not bool(argument(node, 3, "value"))
