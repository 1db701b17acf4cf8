"""`BakeWeights` and `UnfuseLayers`: layers that other passes cannot replace become plain ones. Exact in evaluation.

Audio and temporal networks are weight-normed throughout, and no pass replaces a layer whose weight something else
computes. Parametrizations, ``weight_norm``, ``spectral_norm``, pruning masks and standardisation are gone afterwards:
train on without them.
"""

from __future__ import annotations

from ..capturing.records import Capture, info
from ..core.plan import Estimate, Op
from ..edit.actions.bench import param_count
from ..edit.actions.plain_layers import computed_weights
from ..edit.swap import stem
from ..layers import PointwiseActivation
from .base import Pass, Proposal
from .own_weights import own_paddings, own_weights
from .patterns import Graph


class BakeWeights(Pass):
    """Makes plain parameters of weights that are computed before each call."""

    name = "bake-weights"
    summary = "parametrized, weight-normed, standardised and pruned weights become plain ones"
    exact = "eval"

    def propose(self, capture: Capture) -> list[Proposal]:
        ops = list(own_weights(Graph(capture), self.name))
        for path, module in capture.model.named_modules():
            if not (computed := computed_weights(module)):
                continue
            inner, nodes = stem(path), map(info, capture.graph.nodes)
            macs = sum(node.cost.macs for node in nodes if node.path == path or node.path.startswith(inner))
            own = sum(layer.macs for layer in capture.layers if layer.path == path or layer.path.startswith(inner))
            plain = {name: p for name, p in module.named_parameters() if not any(key in name for key in computed)}
            after = sum(t.numel() for t in (*plain.values(), *(getattr(module, name) for name in computed)))
            estimate = Estimate(param_count(module), after, macs, own)
            ops.append(Op("bake", path, self.name, {"weights": list(computed)}, estimate))
        return ops


class PlainPadding(Pass):
    """Makes plain layers of convolutions whose own code only runs a padding that they hold."""

    name = "plain-padding"
    summary = "convolutions whose own code only pads become plain ones"
    exact = "both"

    def propose(self, capture: Capture) -> list[Proposal]:
        return list(own_paddings(Graph(capture), self.name))


class UnfuseLayers(Pass):
    """Makes plain layers and activations of fused ones."""

    name = "unfuse-layers"
    summary = "fused layers become plain layers and activations again"
    exact = "eval"

    def propose(self, capture: Capture) -> list[Proposal]:
        ops: list[Proposal] = []
        for path, module in capture.model.named_modules():
            if isinstance(module, PointwiseActivation):
                params = param_count(module)
                macs = sum(layer.macs for layer in capture.layers if layer.path == path)
                ops.append(Op("unfuse", path, self.name, {}, Estimate(params, params, macs, macs)))
        return ops
