"""Convolutions whose own code computes the weight anew in each call, as weight standardisation does (Qiao et al. 2019).

The op that makes a plain convolution of one is a fold: of what the code does to the weight, into the weight. The action
tries it out, and refuses where the weight depends on the input or the code does more.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..capturing.eligibility import computes_weight, module_refusal
from ..capturing.records import Layer, info
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..edit.actions.bench import spec_of_module
from ..edit.actions.fold import WEIGHT
from ..edit.swap import stem
from ..forms.specs import spec_to_dict
from .base import Proposal
from .patterns import Graph


def own_weights(graph: Graph, by: str) -> Iterator[Proposal]:
    """The ops of the pass of that name, or why a layer stays."""
    for layer in graph.capture.layers:
        if computes_weight(layer, graph.owners) and (proposal := _own_weight(graph, layer, by)) is not None:
            yield proposal


def _own_weight(graph: Graph, layer: Layer, by: str) -> Proposal | None:
    path, module = layer.path, graph.modules[layer.path]
    spec = spec_of_module(module)
    if spec is None:
        return None
    refusal = module_refusal(path, module, graph.owners.holders)
    if refusal is None or refusal.reason is not SkipReason.OVERRIDDEN_FORWARD:
        return refusal
    for name, parameter in module.named_parameters():
        other = any(info(user).path != path for user in graph.readers(path, name))
        if other or len(graph.owners.holders.get(id(parameter), ())) > 1:
            detail = f"{stem(path)}{name}, from which it computes its weight, is also used elsewhere"
            return Skip(path, SkipReason.SHARED_WEIGHT, detail)
    own = [node for node in graph.nodes if info(node).path == path and node.op != "get_attr"]
    params, same = sum(p.numel() for p in module.parameters()), any(info(node).op == "pad" for node in own)
    settings = {"side": WEIGHT, "layer": path, "same": same, "spec": spec_to_dict(spec)}
    return Op("fold", path, by, settings, Estimate(params, spec.params, layer.macs, layer.macs))
