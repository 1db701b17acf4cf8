"""How other tools count the same model (`pwrewrite.analysis.conventions`), beside our own: table, Markdown, CSV, data.

A tool's figure is compared with our MACs, since one multiply-accumulate is one of whatever each of them counts.

`render` and `report` are the report of an analysis with such counts in it: a chosen tool's total in the place of
ours, and a section that explains every tool's. CSV, which has no place for either beside its layers, then holds the
counts instead.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..analysis.conventions import Count, Row
from ..analysis.records import Analysis
from ..core.numbers import count, exact, percent
from . import markdown as markdown_report
from . import rows
from . import table as table_report
from .layout import plain_text
from .rows import View

COLUMNS = ("tool", "unit", "kind", "rule", "calls", "counted", "macs", "difference")
"""The columns of the CSV; new ones are added at the end."""

TITLE = "How others count"
_MOST = 6
"""Reasons shown for one tool before the rest is summed up."""


def total_text(found: Count, *, digits: bool = True) -> str:
    """A tool's total in the words of the tool: ``flops 4.11G (4,111,512,576) as fvcore counts``."""
    total = f"{count(found.total)} ({exact(found.total)})" if digits else count(found.total)
    return f"{found.unit} {total} as {found.tool} counts"


def difference_text(found: Count) -> str:
    """How far a tool's total is from ours: ``+22,328,320 (+0.5%)``."""
    if not found.difference:
        return "equal"
    share = percent(abs(found.difference) / found.ours) if found.ours else ""
    if share and not share.startswith("<"):
        share = ("+" if found.difference > 0 else "-") + share
    return f"{found.difference:+,}" + (f" ({share})" if share else "")


def reason_text(row: Row) -> str:
    """One reason of a difference: ``+22,227,968 batch norm, 2 per element (53 calls)``."""
    calls = f" ({exact(row.calls)} calls)" if row.calls > 1 else ""
    return f"{row}{calls}"


def reason_texts(found: Count, most: int | None = None) -> list[str]:
    """The reasons of a tool's difference, largest first, then what keeps the total from being exact.

    Args:
        found: The tool's count.
        most: How many reasons to show before the rest is summed up; None for all.
    """
    reasons = found.reasons
    cut = len(reasons) if most is None or len(reasons) <= most + 1 else most
    texts = [reason_text(row) for row in reasons[:cut]]
    if reasons[cut:]:
        rest = sum(row.difference for row in reasons[cut:])
        texts.append(f"{rest:+,} in {len(reasons) - cut} smaller reasons")
    return texts + [f"not exact: {caveat}" for caveat in found.caveats]


def page(counts: Sequence[Count], *, most: int | None = _MOST) -> RenderableType:
    """The counts for a terminal: each tool's total, its distance from ours, and what makes it up.

    Args:
        counts: What the tools say.
        most: Reasons shown for one tool; None for all.
    """
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for found in counts:
        texts = [difference_text(found), *reason_texts(found, most)]
        table.add_row(found.tool, exact(found.total), found.unit, Text("\n".join(texts)))
    ours = counts[0].ours if counts else 0
    title = Text("\n").append(TITLE, style="bold").append(f"  beside our {exact(ours)} MACs")
    return Group(title, table)


def markdown(counts: Sequence[Count]) -> str:
    """The counts as a Markdown section, with every reason."""
    lines = [f"## {TITLE}", "", "| tool | total | unit | beside ours | because |", "| :-- | --: | :-- | --: | :-- |"]
    for found in counts:
        reasons = "<br>".join(_escape(text) for text in reason_texts(found))
        lines.append(f"| {found.tool} | {exact(found.total)} | {found.unit} | {difference_text(found)} | {reasons} |")
    return "\n".join(lines)


def table(counts: Sequence[Count]) -> str:
    """The counts as CSV: one row per kind and rule, then one with the total; integers unscaled."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for found in counts:
        for row in found.rows:
            writer.writerow(
                (found.tool, found.unit, row.kind, row.rule, row.calls, row.counted, row.ours, row.difference)
            )
        writer.writerow((found.tool, found.unit, "total", "", "", found.total, found.ours, found.difference))
    return out.getvalue()


def convention(found: Count) -> dict[str, Any]:
    """A tool's total as JSON data."""
    return {"tool": found.tool, "total": found.total, "unit": found.unit}


def data(found: Count) -> dict[str, Any]:
    """A tool's total with its reasons as JSON data."""
    rows = [
        {
            "kind": row.kind,
            "rule": row.rule,
            "calls": row.calls,
            "counted": row.counted,
            "macs": row.ours,
            "difference": row.difference,
        }
        for row in found.rows
    ]
    more = {"macs": found.ours, "difference": found.difference, "rows": rows, "caveats": list(found.caveats)}
    return {**convention(found), **more}


# ------------------------------------------------------------------------------------- in the report of an analysis


@dataclass(frozen=True, slots=True)
class Counts:
    """Which counts a report shows.

    Attributes:
        chosen: The tool whose total stands in the place of ours; None for ours.
        explained: The tools whose totals a section explains.
    """

    chosen: Count | None = None
    explained: tuple[Count, ...] = ()


def render(analysis: Analysis, form: str, view: View, counts: Counts, *, width: int = table_report.WIDTH) -> str:
    """An analysis with counts as text.

    Args:
        analysis: The analysis.
        form: ``table``, ``markdown``, ``csv`` or ``json``.
        view: What to show of the analysis.
        counts: What to show of the tools.
        width: Terminal cells there are, for the table.
    """
    if form == "table":
        return plain_text(report(analysis, view, counts, width=width), width)
    if form == "csv":
        return table([found for found in (counts.chosen,) if found is not None] + list(counts.explained))
    if form == "json":
        content = analysis.to_dict()
        if counts.chosen is not None:
            content["convention"] = convention(counts.chosen)
        if counts.explained:
            content["counts"] = [data(found) for found in counts.explained]
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    text = markdown_report.render(analysis, view)
    if counts.chosen is not None:
        old, new = _totals(analysis, counts.chosen, digits=True)
        caveats = "".join(f"\n\nNot exact: {_escape(caveat)}." for caveat in counts.chosen.caveats)
        text = text.replace(f"**{old}**", f"**{new}**{caveats}", 1)
    return f"{text}\n{markdown(counts.explained)}\n" if counts.explained else text


def report(analysis: Analysis, view: View, counts: Counts, *, width: int = table_report.WIDTH) -> RenderableType:
    """An analysis with counts for a terminal.

    Args:
        analysis: The analysis.
        view: What to show of the analysis.
        counts: What to show of the tools.
        width: Terminal cells there are.
    """
    header, *parts = cast(Group, table_report.page(analysis, view, width=width)).renderables
    if counts.chosen is not None:
        header = _replaced(cast(Text, header), *_totals(analysis, counts.chosen, digits=True))
        header = _replaced(header, *_totals(analysis, counts.chosen, digits=False))
        for caveat in counts.chosen.caveats:
            header.append(f"\nnot exact: {caveat}", style="not bold yellow")
    return Group(header, *parts, *((page(counts.explained),) if counts.explained else ()))


def _totals(analysis: Analysis, chosen: Count, *, digits: bool) -> tuple[str, str]:
    """The line of totals as the report has it, and with a tool's total in the place of our MACs and FLOPs."""
    old = rows.totals_text(analysis, digits=digits)
    before, _, rest = old.partition(" · MACs ")
    _, _, after = rest.partition(" · FLOPs ")
    return old, f"{before} · {total_text(chosen, digits=digits)} · {after.partition(' · ')[2]}"


def _replaced(text: Text, old: str, new: str) -> Text:
    start = text.plain.find(old)
    if start < 0:
        return text
    return Text.assemble(text[:start], (new, "not bold"), text[start + len(old) :])


def _escape(text: str) -> str:
    return "".join(f"\\{c}" if c in r"\`*_[]<>|#~" else c for c in text)
