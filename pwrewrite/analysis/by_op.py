"""Totals by kind of operation, so that a hybrid's attention is not hidden behind its convolutions."""

from __future__ import annotations

from collections.abc import Iterable

from ..capturing.records import NodeInfo
from .records import OpTotal

NO_OPERATION = frozenset({"input", "output", "get_attr", "unknown"})
"""Kinds of nodes that run nothing."""


def by_op(infos: Iterable[NodeInfo]) -> tuple[OpTotal, ...]:
    """One row per kind of operation, largest MACs first and then most bytes."""
    totals: dict[str, list[int]] = {}
    for facts in infos:
        if facts.op in NO_OPERATION:
            continue
        row = totals.get(facts.op)
        if row is None:
            row = totals[facts.op] = [0, 0, 0, 0, 0]
        cost = facts.cost
        row[0] += 1
        row[1] += cost.params
        row[2] += cost.macs
        row[3] += cost.read_bytes
        row[4] += cost.write_bytes
    rows = [OpTotal(op, *row) for op, row in totals.items()]
    return tuple(sorted(rows, key=lambda row: (-row.macs, -(row.read_bytes + row.write_bytes), row.op)))
