"""From a recorded graph to layers and their calls.

A layer is a weight. It is found through the module that holds it (a leaf call), through the parameter that a functional
call reads (``F.conv2d(x, self.weight)``), or, where the weight is computed in the graph (standardised, re-parametrised,
predicted from the input), through the module whose code makes the call.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TypeGuard

from torch import Tensor, fx, nn

from ..core.convolution import CONV_MODULES, ConvSpec
from .functions import argument
from .inventory import Inventory
from .records import Call, Layer, info

_KINDS = (*CONV_MODULES, nn.Linear)


def find_layers(inventory: Inventory, graph: fx.Graph) -> tuple[Layer, ...]:
    """Every convolution and linear map of a model, with the calls that the graph makes of it: in graph order, then
    those that it does not call in module order.
    """
    islands = _islands(graph)
    calls: defaultdict[str, list[Call]] = defaultdict(list)
    first: dict[str, tuple[fx.Node, str]] = {}
    for node in graph.nodes:
        facts = info(node)
        if facts.spec is None and facts.op != "linear":
            continue
        leaf = node.op == "call_module"
        path, weight = (str(node.target), "") if leaf else _functional_path(node, facts.path, inventory)
        first.setdefault(path, (node, weight))
        call = Call(path, node.name, facts.inputs[0].shape, facts.outputs[0].shape, facts.cost, islands.get(node, ""))
        calls[path].append(call)
    layers = [_layer(path, *use, tuple(calls[path]), inventory) for path, use in first.items()]
    for module in inventory.modules:
        if isinstance(module, _KINDS) and not any(path in first for path in inventory.names[id(module)]):
            layers.append(_of_module(inventory.names[id(module)], module, None))
    return tuple(layers)


def _layer(path: str, node: fx.Node, weight_name: str, calls: tuple[Call, ...], inventory: Inventory) -> Layer:
    facts = info(node)
    spec, module, functional = facts.spec, inventory.paths.get(path), node.op != "call_module"
    if module is not None and (not functional or isinstance(module, _KINDS)):
        return _of_module([path, *inventory.names[id(module)][1:]], module, spec, functional, calls)
    weight = argument(node, 1, "weight")
    tensors = [info(arg).outputs[0] for arg in (weight, argument(node, 2, "bias")) if _is_stored(arg)]
    shape = info(weight).outputs[0].shape if isinstance(weight, fx.Node) else ()
    widths = (spec.in_channels, spec.out_channels) if spec else (shape[-1], shape[0]) if shape else (0, 0)
    params, size = sum(t.numel for t in tensors), sum(t.nbytes for t in tensors)
    return Layer(path, (), facts.op, *widths, params, size, spec, True, weight_name, calls)


def _of_module(
    names: list[str], module: nn.Module, spec: ConvSpec | None, functional: bool = False, calls: tuple[Call, ...] = ()
) -> Layer:
    if isinstance(module, nn.Linear):
        op, widths = "linear", (int(module.in_features), int(module.out_features))
    else:
        spec = spec or _spec_of(module)
        op, widths = spec.op, (spec.in_channels, spec.out_channels)
    params = size = 0
    for t in _weights(module):
        params += t.numel()
        size += t.nbytes
    weight = "" if module._parameters.get("weight") is None else f"{names[0]}.weight".removeprefix(".")
    return Layer(names[0], tuple(names[1:]), op, *widths, params, size, spec, functional, weight, calls)


def _weights(module: nn.Module) -> list[Tensor]:
    """The parameters of a layer: its own, and the originals of those that are computed from others."""
    own: list[Tensor] = [p for p in module._parameters.values() if p is not None]
    parametrizations = module._modules.get("parametrizations") if module._modules else None
    return own if parametrizations is None else [*own, *parametrizations.parameters()]


def _spec_of(module: nn.Module) -> ConvSpec:
    """The spec of a convolution without asking for a weight or bias that would have to be computed."""
    if not (module._modules and "parametrizations" in module._modules):
        return ConvSpec.of_module(module)
    shell = nn.Module()
    shell.__dict__.update(module.__dict__, bias=module._parameters.get("bias", "computed"))
    return ConvSpec.of_module(shell)


def _is_stored(weight: object) -> TypeGuard[fx.Node]:
    """Whether an argument is a tensor under a name of the model's."""
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and not str(weight.target).startswith("_constant")


def _functional_path(node: fx.Node, scope: str, inventory: Inventory) -> tuple[str, str]:
    """Path of the layer behind a functional call, and the full name of its weight (``""`` where computed)."""
    modules = inventory.paths
    weight = argument(node, 1, "weight")
    if _is_stored(weight):
        name = str(weight.target)
        owner, _, attribute = name.rpartition(".")
        holder = modules.get(owner)
        alone = holder is not None and sum(p is not None and p.dim() > 1 for p in holder._parameters.values()) <= 1
        whole = attribute == "weight" and (isinstance(holder, _KINDS) or (bool(owner) and alone))
        return (owner if whole else name), name
    if isinstance(modules.get(scope), _KINDS) or scope in inventory.strays:
        return scope, ""  # the layer's own code computes its weight, or it is outside the model's tree
    return f"{scope}.{node.name}" if scope else node.name, ""


def _islands(graph: fx.Graph) -> dict[fx.Node, str]:
    """Connected parts of a graph by name; empty where there is only one."""
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent.setdefault(node, node) is not node:
            parent[node] = node = parent[parent[node]]
        return node

    if not any(node.op == "get_attr" and info(node).op == "unknown" for node in graph.nodes):
        return {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        for source in node.all_input_nodes:
            parent[root(node)] = root(source)
    return {node: root(node).name for node in graph.nodes if node.op != "output"}
