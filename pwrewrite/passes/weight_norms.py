"""Convolutions that normalise their weight in each call: `weight_norms`, for `FoldBatchNorm`."""

from __future__ import annotations

from torch import nn

from ..capturing.eligibility import module_refusal
from ..capturing.records import info
from ..core.plan import Estimate, Op, SkipReason
from ..edit.actions.bench import spec_of_module
from ..edit.actions.fold_weight import WEIGHT
from ..forms.specs import spec_to_dict
from .base import Proposal
from .patterns import Graph


def weight_norms(graph: Graph, name: str) -> list[Proposal]:
    """An op for each such convolution; the action tries them out.

    Args:
        graph: The model.
        name: Name of the pass.
    """
    found: dict[str, Proposal] = {}
    for node in graph.nodes:
        path = info(node).path
        if node.op != "call_function" or info(node).op != "batch_norm" or path in found:
            continue
        proposal = _one(graph, path, name)
        if proposal is not None:
            found[path] = proposal
    return list(found.values())


def _one(graph: Graph, path: str, name: str) -> Proposal | None:
    module = graph.modules.get(path)
    spec = spec_of_module(module) if isinstance(module, nn.Conv2d) else None
    if module is None or spec is None or any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    refusal = module_refusal(path, module, graph.owners.holders)
    if refusal is None or refusal.reason is not SkipReason.OVERRIDDEN_FORWARD:
        return refusal
    own = [node for node in graph.nodes if info(node).path == path and node.op != "get_attr"]
    kinds = [info(node).op for node in own]
    for key, parameter in module.named_parameters():
        reads = [user for node in graph.owners.reads.get(f"{path}.{key}" if path else key, []) for user in node.users]
        if any(info(user).path != path for user in reads) or len(graph.owners.holders.get(id(parameter), ())) > 1:
            return None
    layers = [graph.layers[node.name] for node in own if node.name in graph.layers]
    if not layers:
        return None
    params = sum(p.numel() for p in module.parameters())
    macs = layers[0].macs
    settings = {"side": WEIGHT, "layer": path, "same": "pad" in kinds, "spec": spec_to_dict(spec)}
    return Op("fold", path, name, settings, Estimate(params, spec.params, macs, macs))
