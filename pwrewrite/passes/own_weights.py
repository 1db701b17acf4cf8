"""Convolutions whose own code computes the weight anew in each call, as weight standardisation does (Qiao et al. 2019).

The op that makes a plain convolution of one is a fold: of what the code does to the weight, into the weight. The action
tries it out, and refuses where the weight depends on the input or the code does more. Those whose code only runs a
padding that they hold (``self.static_padding(x)``, TensorFlow's for one size) become plain ones in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

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
    yield from own_paddings(graph, by)


def own_paddings(graph: Graph, by: str) -> Iterator[Op]:
    """The ops for convolutions whose own code only runs a padding of theirs, or nothing beside the convolution."""
    for layer in graph.capture.layers:
        pads = _padding(graph, layer)
        spec = spec_of_module(graph.modules[layer.path]) if pads is not None else None
        if pads is not None and spec is not None:
            settings = {"side": WEIGHT, "layer": layer.path, "spec": spec_to_dict(spec), "pads": pads}
            yield Op("fold", layer.path, by, settings, Estimate(layer.params, layer.params, layer.macs, layer.macs))


def _padding(graph: Graph, layer: Layer) -> list[int] | None:
    """What a convolution's own code pads its input by, as ``F.pad`` takes it; None where it is another layer."""
    module = graph.modules.get(layer.path)
    if not isinstance(module, nn.Conv2d) or not layer.functional or len(layer.calls) != 1 or [*module.buffers()]:
        return None
    refusal = module_refusal(layer.path, module, graph.owners.holders)
    if refusal is None or refusal.reason is not SkipReason.OVERRIDDEN_FORWARD or module.padding_mode != "zeros":
        return None
    pads, call = [0, 0, 0, 0], graph.named[layer.calls[0].node]
    for child in module.children():
        if isinstance(child, nn.ConstantPad2d) and child.value == 0:
            pads = [ours + theirs for ours, theirs in zip(pads, child.padding)]
        elif not isinstance(child, nn.Identity):
            return None
    own = [node for node in graph.nodes if info(node).path == layer.path and node.op != "get_attr"]
    readers = graph.readers(layer.path, "weight", "bias")
    plain = own == [call] and all(reader is call for reader in readers) and spec_of_module(module) == layer.spec
    return pads if plain and min(pads) >= 0 else None


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
