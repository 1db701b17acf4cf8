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

from ..capturing.records import Capture, Layer
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..core.records import as_data
from ..decompose.affine import Affine, NotExact
from ..edit.actions.merge import MergeSettings, merged_layer
from ..layers import PointwiseActivation
from .base import Pass, Proposal, spec_of
from .patterns import Graph


class MergePointwise(Pass):
    """Merges linear neighbours of which one is 1×1."""

    name = "merge-pointwise"
    summary = "two convolutions in a row, one of them 1×1, become one where that costs less"
    exact = "eval"

    def propose(self, capture: Capture) -> list[Proposal]:
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
            proposal = _pair(graph, first, second, node, reader)
            if isinstance(proposal, Op):
                taken |= {first.path, second.path}
            if proposal is not None:
                proposals.append(proposal)
        return proposals


def _pair(graph: Graph, first: Layer, second: Layer, node: fx.Node, reader: fx.Node) -> Proposal | None:
    before, after = spec_of(first), spec_of(second)
    fused = any(isinstance(graph.modules.get(layer.path), PointwiseActivation) for layer in (first, second))
    if fused or not len(first.calls) == len(second.calls) == 1:
        return None
    try:
        merged = merged_layer(Affine.on_meta(before), Affine.on_meta(after)).spec
    except NotExact:
        return None
    macs, params = first.macs + second.macs, first.params + second.params
    inputs, outputs = first.calls[0].input_shape, second.calls[0].output_shape
    new = merged.macs(inputs, outputs)
    if new >= macs or merged.params > params:
        return None  # a bottleneck that pays, as most are meant to
    for layer in (first, second):
        if refusal := graph.unfusable(layer):
            return refusal
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or graph.written(source, node, reader):
        detail = "what the layer before reads is written into before this one runs"
        return Skip(second.path, SkipReason.WRITTEN, detail)
    if why := graph.unfixed(node, reader):
        return Skip(second.path, SkipReason.DATA_DEPENDENT, why)
    settings = as_data(MergeSettings(first.path, before, after))
    return Op("merge", second.path, MergePointwise.name, settings, Estimate(params, merged.params, macs, new))
