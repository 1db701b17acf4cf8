"""Totals by kind of operation, so that a hybrid's attention is not hidden behind its convolutions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from operator import attrgetter

from ..capturing.records import NodeInfo
from ..core.cost import Cost
from .records import OpTotal

NO_OPERATION = frozenset({"input", "output", "get_attr", "unknown"})
"""Kinds of nodes that run nothing."""

_FIELDS = [attrgetter(name) for name in ("params", "macs", "read_bytes", "write_bytes")]


def by_op(infos: Iterable[NodeInfo]) -> tuple[OpTotal, ...]:
    """One row per kind of operation, largest MACs first and then most bytes."""
    costs: defaultdict[str, list[Cost]] = defaultdict(list)
    for facts in infos:
        if facts.op not in NO_OPERATION:
            costs[facts.op].append(facts.cost)
    rows = [OpTotal(op, len(each), *(sum(map(get, each)) for get in _FIELDS)) for op, each in costs.items()]
    return tuple(sorted(rows, key=lambda row: (-row.macs, -(row.read_bytes + row.write_bytes), row.op)))
