"""A capture as one `networkx.DiGraph`: activations flow along its edges, costs sit on its nodes.

Nodes have the names of ``Capture.graph`` and stand in the order in which they run, which is topological. An edge
``u → v`` says that ``v`` reads what ``u`` makes. Weights and constants (``get_attr``) are left out: their cost is in
``params`` and ``read_bytes`` of the node that uses them. All is plain data for ``networkx.node_link_data``:

========================  ====================================================================================
``op``                    kind of operation: ``conv2d``, ``relu``, ``add``, ``input``, ``output``, …
``path``                  path of the module that ran it
``layer``                 path of the layer that it calls, or None
``shape``, ``dtype``      of its first output (``()`` and ``""`` where it makes no tensor)
``shapes``                of all its outputs
``params``, ``macs``      parameters used first here; multiply-accumulates
``read_bytes``            bytes of activations and weights read
``write_bytes``           bytes of activations written; 0 for views
``alias_of``              node whose storage it shares (views, in-place operations), or None
========================  ====================================================================================

Edges have ``bytes`` (of the tensors that ``v`` reads of what ``u`` makes) and ``shape`` (of the first of them)::

    g = pwrewrite.graph(capture)
    max(g.edges(data="bytes"), key=lambda edge: edge[2])            # the largest tensor between two operations
    [n for n in g if g.out_degree(n) > 1]                           # where branches start
    networkx.ancestors(g, "layer4_0_conv1")                         # all that a convolution depends on
"""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
from torch import fx

from ..core.errors import InputError
from .records import Capture, NodeInfo, TensorSpec, info
from .tensors import dtype_name


def graph(capture: Capture) -> nx.DiGraph:
    """The graph of a capture, a new directed acyclic one in the order of execution; see the module for its attributes.

    >>> import torch
    >>> from torch import nn
    >>> from pwrewrite import capture
    >>> flow = graph(capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.empty(1, 3, 8, 8, device="meta")))
    >>> [data["op"] for _, data in flow.nodes(data=True)]
    ['input', 'conv2d', 'relu', 'output']
    """
    if not isinstance(capture, Capture):
        hint = "pwrewrite.capture(model, example_inputs) makes one"
        raise InputError("this is no capture", expected="a Capture", got=type(capture).__name__, hint=hint)
    layer_of = {call.node: call.layer for call in capture.calls}
    nodes: list[tuple[str, dict[str, object]]] = []
    edges: list[tuple[str, str, dict[str, object]]] = []
    flows: dict[fx.Node, dict[str, object]] = {}
    for node in capture.graph.nodes:
        if node.op == "get_attr":
            continue
        facts, name = info(node), node.name
        nodes.append((name, _attributes(facts, layer_of.get(name))))
        flows[node] = _flow(facts.outputs)
        for source in node.all_input_nodes:
            flow = flows.get(source)
            if flow is not None:
                if len(info(source).outputs) > 1:
                    flow = _part(node, source)
                edges.append((source.name, name, flow))
    result = nx.DiGraph(name=type(capture.model).__name__)
    result.add_nodes_from(nodes)
    result.add_edges_from(edges)
    return result


def _attributes(facts: NodeInfo, layer: str | None) -> dict[str, object]:
    outputs, cost = facts.outputs, facts.cost
    return {
        "op": facts.op,
        "path": facts.path,
        "layer": layer,
        "shape": outputs[0].shape if outputs else (),
        "shapes": tuple([t.shape for t in outputs]),
        "dtype": dtype_name(outputs[0].dtype) if outputs else "",
        "params": cost.params,
        "macs": cost.macs,
        "read_bytes": cost.read_bytes,
        "write_bytes": cost.write_bytes,
        "alias_of": facts.alias_of,
    }


def _flow(tensors: Sequence[TensorSpec]) -> dict[str, object]:
    return {"bytes": sum([t.nbytes for t in tensors]), "shape": tensors[0].shape if tensors else ()}


def _part(node: fx.Node, source: fx.Node) -> dict[str, object]:
    """What ``node`` reads of the tensors that ``source`` makes: its inputs that no other source accounts for."""
    rest = list(info(node).inputs)
    for other in node.all_input_nodes:
        outputs = info(other).outputs
        if len(outputs) == 1 and outputs[0] in rest:
            rest.remove(outputs[0])
    taken = [t for t in rest if t in info(source).outputs]
    return _flow(taken or info(source).outputs)
