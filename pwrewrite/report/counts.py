"""How other tools count the same model, beside our MACs: one multiply-accumulate is one of whatever each counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.numbers import exact, percent
from . import spreadsheet
from .page import Block, Column, Listing, Section

if TYPE_CHECKING:
    from ..analysis.conventions import Count

COLUMNS = ("tool", "unit", "kind", "rule", "calls", "counted", "macs", "difference")
"""The columns of the CSV; new ones are added at the end."""

_MOST = 6
"""Reasons shown for one tool before the rest is summed up."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Which counts a report shows: the tool whose total stands in the place of ours, and those that are explained."""

    chosen: Count | None = None
    explained: tuple[Count, ...] = ()

    def __bool__(self) -> bool:
        return self.chosen is not None or bool(self.explained)

    def data(self) -> dict[str, Any]:
        """What an analysis' JSON has beside its own keys."""
        content: dict[str, Any] = {}
        if self.chosen is not None:
            content["convention"] = convention(self.chosen)
        if self.explained:
            content["counts"] = [data(counted) for counted in self.explained]
        return content

    def csv(self) -> str:
        """The counts as CSV, in which an analysis has no place for them: a row per kind and rule, then the total."""
        every = [*([self.chosen] if self.chosen is not None else []), *self.explained]
        return spreadsheet.table(COLUMNS, (row for counted in every for row in _rows(counted)))


def _rows(counted: Count) -> list[tuple[object, ...]]:
    tool, unit = counted.tool, counted.unit
    rows: list[tuple[object, ...]] = [
        (tool, unit, row.kind, row.rule, row.calls, row.counted, row.ours, row.difference) for row in counted.rows
    ]
    return [*rows, (tool, unit, "total", "", "", counted.total, counted.ours, counted.difference)]


def difference_text(counted: Count) -> str:
    """How far a tool's total is from ours: ``+22,328,320 (+0.5%)``."""
    if not counted.difference:
        return "equal"
    share = percent(abs(counted.difference) / counted.ours) if counted.ours else ""
    if share and not share.startswith("<"):
        share = ("+" if counted.difference > 0 else "-") + share
    return f"{counted.difference:+,}" + (f" ({share})" if share else "")


def reason_texts(counted: Count, most: int = _MOST) -> list[str]:
    """The ``most`` largest reasons of a difference, the rest in sum, and what keeps the total from being exact."""
    reasons = counted.reasons
    cut = len(reasons) if len(reasons) <= most + 1 else most
    texts = [str(row) + (f" ({exact(row.calls)} calls)" if row.calls > 1 else "") for row in reasons[:cut]]
    if reasons[cut:]:
        rest = sum(row.difference for row in reasons[cut:])
        texts.append(f"{rest:+,} in {len(reasons) - cut} smaller reasons")
    return texts + [f"not exact: {caveat}" for caveat in counted.caveats]


def blocks(counts: Sequence[Count]) -> list[Block]:
    """The part of a page about the counts: each tool's total, its distance from ours, and what makes it up."""
    lines: list[tuple[str, str, str, str]] = []
    for counted in counts:
        lines.append((counted.tool, exact(counted.total), counted.unit, difference_text(counted)))
        lines += [("", "", "", text) for text in reason_texts(counted)]
    if not lines:
        return []
    tools, totals, units, texts = ([line[i] for line in lines] for i in range(4))
    columns = [
        Column("tool", tools, right=False, style="cyan"),
        Column("total", totals, style="bold"),
        Column("unit", units, right=False, style="dim"),
        Column("beside ours, because", texts, right=False),
    ]
    return [Section("How others count", f"beside our {exact(counts[0].ours)} MACs"), Listing(columns)]


def convention(counted: Count) -> dict[str, Any]:
    """A tool's total as JSON data."""
    return {"tool": counted.tool, "total": counted.total, "unit": counted.unit}


def data(counted: Count) -> dict[str, Any]:
    """A tool's total with its reasons as JSON data."""
    names = COLUMNS[2:]
    rows = [dict(zip(names, row[2:], strict=True)) for row in _rows(counted)[:-1]]
    more = {"macs": counted.ours, "difference": counted.difference, "rows": rows, "caveats": list(counted.caveats)}
    return {**convention(counted), **more}
