"""`MergePointwise`: two linear neighbours of which one is 1×1 become one layer where that costs less. Exact.

With ``y = B (A x + a) + b`` the two are ``(B A) x + (B a + b)``, whatever the spatial extent of one of them::

    1×1 ∘ 1×1      W_oi  = Σ_c B_oc A_ci         strides multiply
    1×1, then k×k  W_oik = Σ_c B_ock A_ci        only where no zero is padded between, or A has no bias
    k×k, then 1×1  W_oik = Σ_c B_oc A_cik        strides multiply

One layer of ``in × out`` channels takes more MACs than two with a narrow width between (that is what a bottleneck is
for), so only those are merged where MACs and parameters both do not grow: bottlenecks that a budget made pointless, an
inserted expand before the pointwise layer behind it, neighbours left when a norm between them was folded.
"""

from __future__ import annotations

from torch import fx

from ..capturing.eligibility import eligible
from ..capturing.records import Capture, Layer
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..edit.actions.merge import merged_layer
from ..forms.specs import spec_to_dict
from ..layers import PointwiseActivation
from .base import Pass, Proposal, spec_of
from .patterns import Graph


class MergePointwise(Pass):
    """Merges linear neighbours of which one is 1×1."""

    name = "merge-pointwise"
    summary = "two convolutions in a row, one of them 1×1, become one where that costs less"
    exact = "eval"

    def propose(self, capture: Capture) -> list[Proposal]:
        """See `Pass.propose`."""
        graph = Graph(capture)
        taken: set[str] = set()
        proposals: list[Proposal] = []
        for node in graph.nodes:
            first = graph.layers.get(node.name)
            reader = graph.sole_reader(last := graph.onward(node))
            second = graph.layers.get(reader.name) if reader is not None else None
            if first is None or second is None or reader is None or not reader.args or reader.args[0] is not last:
                continue
            if {first.path, second.path} & taken:
                continue
            found = _pair(capture, graph, first, second)
            if isinstance(found, Op):
                found = _unsafe(graph, second, node, reader) or found
            if isinstance(found, Op):
                taken |= {first.path, second.path}
            if found is not None:
                proposals.append(found)
        return proposals


def _unsafe(graph: Graph, second: Layer, node: fx.Node, reader: fx.Node) -> Skip | None:
    """Why the first of two layers may not be computed where the second one is."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or graph.written(source, node, reader):
        detail = "what the layer before reads is written into before this one runs"
        return Skip(second.path, SkipReason.WRITTEN, detail)
    why = graph.unfixed(node, reader)
    return None if why is None else Skip(second.path, SkipReason.DATA_DEPENDENT, why)


def _pair(capture: Capture, graph: Graph, first: Layer, second: Layer) -> Proposal | None:
    before, after = spec_of(first), spec_of(second)
    if len(first.calls) != 1 or len(second.calls) != 1 or first.out_channels != second.in_channels:
        return None
    merged = merged_layer(before, after)
    if isinstance(merged, str):
        return None
    fused = [isinstance(graph.modules.get(layer.path), PointwiseActivation) for layer in (first, second)]
    if any(fused):
        return None
    macs, params = first.macs + second.macs, first.params + second.params
    a, b = first.calls[0], second.calls[0]
    rows = 1
    for n in b.output_shape[:-1]:
        rows *= n
    new = merged.macs(a.input_shape, b.output_shape) if merged.dims else rows * merged.in_channels * merged.out_channels
    if new >= macs or merged.params > params:
        return None  # a bottleneck that pays, as most are meant to
    for layer in (first, second):
        refusal = eligible(capture, layer, graph.owners)
        if refusal is not None:
            return refusal
        if layer.functional:
            return Skip(layer.path, SkipReason.FUNCTIONAL, "a functional call; make it a module")
    settings = {"first": first.path, "first_layer": spec_to_dict(before), "layer": spec_to_dict(after)}
    return Op("merge", second.path, MergePointwise.name, settings, Estimate(params, merged.params, macs, new))
