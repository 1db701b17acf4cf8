"""From a recorded graph to layers and their calls.

A layer is a weight. It is found through the module that holds it (a leaf call), through the parameter that a functional
call reads (``F.conv2d(x, self.weight)``), or, where the weight is computed in the graph (standardised, re-parametrised,
predicted from the input), through the module whose code makes the call.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, fx, nn

from ..convolution import CONV_MODULES, ConvSpec
from .records import Call, Layer, info

_KINDS = (*CONV_MODULES, nn.Linear)


def find_layers(model: nn.Module, graph: fx.Graph) -> tuple[Layer, ...]:
    """Every convolution and linear map of a model, with the calls that the graph makes of it.

    Args:
        model: The model that was recorded.
        graph: Its graph; nodes carry their `NodeInfo`.

    Returns:
        Layers in graph order, then those that the graph does not call in module order.
    """
    modules: dict[str, nn.Module] = {}
    names: defaultdict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        modules[path] = module
        if isinstance(module, _KINDS):
            names[id(module)].append(path)
    islands = _islands(graph)
    calls: defaultdict[str, list[Call]] = defaultdict(list)
    found: dict[str, dict[str, Any]] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        facts = info(node)
        if facts.spec is None and facts.op != "linear":
            continue
        if node.op == "call_module":
            module = modules[node.target]
            path = names[id(module)][0]
            weight = getattr(module, "_parameters", {}).get("weight")
            found.setdefault(path, _of_module(module, names[id(module)], path if weight is not None else None))
        else:
            path, weight_name = _functional_path(node, facts.path, modules)
            if path not in found:
                found[path] = _of_call(node, path, weight_name, modules, names)
        out = facts.outputs[0].shape
        calls[path].append(
            Call(path, node.name, facts.inputs[0].shape, out, facts.cost, islands.get(node, ""))
        )
    for same in names.values():
        if not any(path in found for path in same):
            found[same[0]] = _of_module(modules[same[0]], same, same[0])
    return tuple(Layer(path=path, calls=tuple(calls[path]), **facts) for path, facts in found.items())


def _of_module(module: Any, names: list[str], weight_owner: str | None) -> dict[str, Any]:
    linear = isinstance(module, nn.Linear)
    spec = None if linear else ConvSpec.of_module(module)
    tensors = [t for t in (module.weight, module.bias) if isinstance(t, Tensor)]
    sizes = [_size(t) for t in tensors]
    prefix = f"{weight_owner}." if weight_owner else ""
    return {
        "aliases": tuple(names[1:]),
        "op": "linear" if spec is None else spec.op,
        "in_channels": module.in_features if linear else module.in_channels,
        "out_channels": module.out_features if linear else module.out_channels,
        "params": sum(n for n, _ in sizes),
        "weight_bytes": sum(b for _, b in sizes),
        "spec": spec,
        "functional": False,
        "weight": "" if weight_owner is None else f"{prefix}weight",
    }


def _size(t: Tensor) -> tuple[int, int]:
    n = t.numel()
    return n, n * t.dtype.itemsize


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _functional_path(node: fx.Node, scope: str, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """Path of the layer behind a functional call, and the full name of its weight (``""`` where computed)."""
    weight = _argument(node, 1, "weight")
    if isinstance(weight, fx.Node) and weight.op == "get_attr" and not str(weight.target).startswith("_constant"):
        name = str(weight.target)
        owner, _, attribute = name.rpartition(".")
        holder = modules.get(owner)
        alone = holder is not None and sum(p is not None and p.dim() > 1 for p in holder._parameters.values()) <= 1
        return (owner if owner and attribute == "weight" and alone else name), name
    if isinstance(modules.get(scope), _KINDS):
        return scope, ""
    return f"{scope}.{node.name}" if scope else node.name, ""


def _of_call(
    node: fx.Node, path: str, weight_name: str, modules: dict[str, nn.Module], names: dict[int, list[str]]
) -> dict[str, Any]:
    facts = info(node)
    module: Any = modules.get(path)
    spec = facts.spec
    if isinstance(module, _KINDS):
        own = _of_module(module, names[id(module)], path if weight_name else None)
        return {**own, "spec": spec if spec is not None else own["spec"], "functional": True}
    tensors = [
        info(arg).outputs[0]
        for arg in (_argument(node, 1, "weight"), _argument(node, 2, "bias"))
        if isinstance(arg, fx.Node) and arg.op == "get_attr"
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
