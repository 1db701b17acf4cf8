"""The chain of dependent operations with the most MACs, and how much of the work lies off it.

The heaviest path to a node is its own weight plus the heaviest path to any of its predecessors: one pass in
the order of the run. No schedule on any number of devices does the model in less than
this chain takes; what lies off it can overlap with it (the branches of an Inception module).

Limits: MACs are not time. Operations without MACs weigh nothing here, and equally heavy branches count one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .records import CriticalPath


def critical_path(macs: Mapping[str, int], sources: Mapping[str, Iterable[str]]) -> CriticalPath:
    """The heaviest path through operations in the order of the run, from the MACs of each and what each reads."""
    heaviest: dict[str, int] = {}
    before: dict[str, str] = {}
    for name, read in sources.items():
        best = -1
        for source in read:
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
