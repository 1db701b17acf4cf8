"""The run, operation after operation, as plain data: what each reads, costs and keeps alive.

A picture of the graph and of the memory over time is drawn from it. Limits: an operation that makes no storage (a view,
one in place) is drawn at what was alive when the one before it ended.
"""

from __future__ import annotations

import networkx as nx
import torch

from ..capturing.records import Capture, info
from .records import Step
from .roofline import DeviceProfile


def steps(capture: Capture, graph: nx.DiGraph, device: DeviceProfile) -> tuple[Step, ...]:
    """The steps of a capture, whose graph `pwrewrite.graph` made, with their least times on a device."""
    position = {name: i for i, name in enumerate(graph)}
    live = _live(capture, position)
    made: list[Step] = []
    for node in capture.graph.nodes:
        if node.name in position:
            facts = info(node)
            cost, output = facts.cost, facts.outputs[0] if facts.outputs else None
            dtype = output.dtype if output else torch.float32
            seconds = max(cost.macs / device.peak(dtype), (cost.read_bytes + cost.write_bytes) / device.bytes_per_s)
            inputs = tuple([position[source] for source in graph.pred[node.name]])
            shape, leaf = output.shape if output else (), node.op == "call_module"
            made.append(Step(facts.op, facts.path, leaf, shape, inputs, cost, seconds, live[len(made)]))
    return tuple(made)


def _live(capture: Capture, position: dict[str, int]) -> list[int]:
    """Most bytes alive at each position, from the births and deaths of storages in order."""
    most = [-1] * len(position)
    after, now, at = [0] * len(position), 0, 0
    for event in capture.memory:
        now += event.nbytes
        if event.nbytes > 0:
            at = max(at, position.get(event.node, at))
            most[at] = max(most[at], now)
        if position:
            after[at] = now
    level = 0
    for i, peak in enumerate(most):
        if peak < 0:
            most[i] = level
        else:
            level = after[i]
    return most
