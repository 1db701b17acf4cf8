"""The chain of dependent operations with the most MACs, and how much of the work lies off it.

The heaviest path to a node is its own weight plus the heaviest path to any of its predecessors: one pass in
topological order, the order of `pwrewrite.graph`. No schedule on any number of devices does the model in less than
this chain takes; what lies off it can overlap with it (the branches of an Inception module).

Limits: MACs are not time. Operations without MACs weigh nothing here, and equally heavy branches count one of them.
"""

from __future__ import annotations

import networkx as nx

from .records import CriticalPath


def critical_path(graph: nx.DiGraph) -> CriticalPath:
    """The heaviest path by MACs of a graph made by `pwrewrite.graph`, whose nodes are in topological order."""
    heaviest: dict[str, int] = {}
    before: dict[str, str] = {}
    macs: dict[str, int] = dict(graph.nodes(data="macs"))
    for name, sources in graph.pred.items():
        best = -1
        for source in sources:
            if heaviest[source] > best:
                best = heaviest[source]
                before[name] = source
        heaviest[name] = macs[name] + max(best, 0)
    total = sum(macs.values())
    if not total:
        return CriticalPath(0, (), 0.0)
    last: str | None = max(heaviest, key=heaviest.__getitem__)
    length = heaviest[last] if last is not None else 0
    nodes = []
    while last is not None:
        if macs[last]:
            nodes.append(last)
        last = before.get(last)
    return CriticalPath(length, tuple(reversed(nodes)), (total - length) / total)
