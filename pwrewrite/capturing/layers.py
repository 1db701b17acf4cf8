"""From a recorded graph to layers and their calls.

A layer is a weight. It is found through the module that holds it (a leaf call), through the parameter that a functional
call reads (``F.conv2d(x, self.weight)``), or, where the weight is computed in the graph (standardised, re-parametrised,
predicted from the input), through the module whose code makes the call.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, TypeGuard

from torch import Tensor, fx, nn

from ..core.convolution import CONV_MODULES, ConvSpec
from .inventory import Inventory
from .records import Call, Layer, info

_KINDS = (*CONV_MODULES, nn.Linear)


def find_layers(inventory: Inventory, graph: fx.Graph) -> tuple[Layer, ...]:
    """Every convolution and linear map of a model, with the calls that the graph makes of it.

    Returns:
        Layers in graph order, then those that the graph does not call in module order.
    """
    modules, names = inventory.paths, inventory.names
    islands = _islands(graph)
    calls: defaultdict[str, list[Call]] = defaultdict(list)
    known: dict[str, dict[str, Any]] = {}
    for node in graph.nodes:
        facts = info(node)
        spec = facts.spec
        if spec is None and facts.op != "linear":
            continue
        if node.op == "call_module":
            path = node.target
            if path not in known:
                module = modules[path]
                known[path] = _of_module(module, names[id(module)], spec)
        else:
            path, weight_name = _functional_path(node, facts.path, inventory)
            if path not in known:
                known[path] = _of_call(node, path, weight_name, modules, names)
        call = Call(path, node.name, facts.inputs[0].shape, facts.outputs[0].shape, facts.cost, islands.get(node, ""))
        calls[path].append(call)
    for module in inventory.modules:
        if isinstance(module, _KINDS):
            same = names[id(module)]
            if not any(path in known for path in same):
                known[same[0]] = _of_module(module, same, None)
    return tuple([Layer(path=path, calls=tuple(calls[path]), **facts) for path, facts in known.items()])


def _of_module(module: Any, names: list[str], spec: ConvSpec | None) -> dict[str, Any]:
    linear = isinstance(module, nn.Linear)
    if spec is None and not linear:
        spec = _spec_of(module)
    params = size = 0
    for t in _weights(module):
        params += t.numel()
        size += t.nbytes
    return {
        "aliases": tuple(names[1:]),
        "op": "linear" if spec is None else spec.op,
        "in_channels": module.in_features if linear else module.in_channels,
        "out_channels": module.out_features if linear else module.out_channels,
        "params": params,
        "weight_bytes": size,
        "spec": spec,
        "functional": False,
        "weight": "" if module._parameters.get("weight") is None else _joined(names[0], "weight"),
    }


def _weights(module: Any) -> list[Tensor]:
    """The parameters of a layer: its own, and the originals of those that are computed from others."""
    own = [p for p in module._parameters.values() if p is not None]
    parametrizations = module._modules.get("parametrizations") if module._modules else None
    return own if parametrizations is None else [*own, *parametrizations.parameters()]


def _spec_of(module: Any) -> ConvSpec:
    """The spec of a convolution without asking for a weight or bias that would have to be computed."""
    if not (module._modules and "parametrizations" in module._modules):
        return ConvSpec.of_module(module)
    shell = nn.Module()
    shell.__dict__.update(module.__dict__, bias=module._parameters.get("bias", "computed"))
    return ConvSpec.of_module(shell)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _argument(node: fx.Node, position: int, name: str) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _is_stored(weight: object) -> TypeGuard[fx.Node]:
    """Whether an argument is a tensor under a name of the model's."""
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and not str(weight.target).startswith("_constant")


def _functional_path(node: fx.Node, scope: str, inventory: Inventory) -> tuple[str, str]:
    """Path of the layer behind a functional call, and the full name of its weight (``""`` where computed)."""
    modules = inventory.paths
    weight = _argument(node, 1, "weight")
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


def _of_call(
    node: fx.Node, path: str, weight_name: str, modules: dict[str, nn.Module], names: dict[int, list[str]]
) -> dict[str, Any]:
    facts = info(node)
    module: Any = modules.get(path)
    spec = facts.spec
    if isinstance(module, _KINDS):
        return {**_of_module(module, names[id(module)], spec), "functional": True}
    tensors = [
        info(arg).outputs[0] for arg in (_argument(node, 1, "weight"), _argument(node, 2, "bias")) if _is_stored(arg)
    ]
    weight = _argument(node, 1, "weight")
    shape = info(weight).outputs[0].shape if isinstance(weight, fx.Node) else ()
    return {
        "aliases": (),
        "op": facts.op,
        "in_channels": spec.in_channels if spec else (shape[-1] if shape else 0),
        "out_channels": spec.out_channels if spec else (shape[0] if shape else 0),
        "params": sum(t.numel for t in tensors),
        "weight_bytes": sum(t.nbytes for t in tensors),
        "spec": spec,
        "functional": True,
        "weight": weight_name,
    }


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
