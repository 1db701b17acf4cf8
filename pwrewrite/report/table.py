"""The report for a terminal: hotspots first, then what kinds of operation cost, memory, paths and notes.

It is made for 100 columns and gives up the least important columns in narrower ones. `page` returns a rich renderable,
`render` the same as a string. Nothing from the model is read as rich markup.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..analysis.records import Analysis, LayerReport
from ..core.numbers import count, exact, percent, size
from . import rows
from .layout import Column, bar, fit, plain_text, shorten
from .rows import Selection, View
from .tree import tree

#: Columns of a terminal that is none, such as a pipe or a file.
WIDTH = 100
#: Kinds of operation without MACs shown beside those with some.
_FREE_KINDS = 4
_LEGEND = "≤: ranks in→out up to which a bottleneck gains · half: what one at half width does to the MACs"


def page(analysis: Analysis, view: View, *, width: int = WIDTH) -> RenderableType:
    """The whole report.

    Args:
        analysis: The analysis.
        view: What to show.
        width: Terminal cells there are.
    """
    selection = rows.select(analysis, view)
    parts: list[RenderableType] = [_header(analysis, width)]
    if view.depth is not None:
        parts += [_section("Modules", f"{count(analysis.macs)} MACs"), tree(analysis, depth=view.depth, width=width)]
    else:
        title = "Hotspots" if selection.hotspots else "Layers"
        parts.append(_section(title, rows.headline(analysis, selection)))
        if selection.reports:
            parts.append(_hotspots(selection, width) if selection.hotspots else _layers(selection, width))
        if selection.hotspots and any(r.break_even is not None for r in selection.reports):
            parts.append(Text(_LEGEND, style="dim"))
        if selection.left_out:
            parts.append(Text(f"… and {exact(selection.left_out)} more (--top)", style="dim"))
    parts += [_section("Kinds of operation", ""), _kinds(analysis, width, None if view.everything else _FREE_KINDS)]
    parts += [Text(), _facts(analysis)]
    return Group(*parts)


def render(analysis: Analysis, view: View, *, width: int = WIDTH) -> str:
    """`page` as plain text without colours."""
    return plain_text(page(analysis, view, width=width), width)


def _section(title: str, note: str) -> Text:
    section = Text("\n").append(title, style="bold")
    return section.append(f"  {note}" if note else "")


def _header(analysis: Analysis, width: int) -> Text:
    target, kind = rows.plain(analysis.target), rows.plain(analysis.model_class)
    header = Text(shorten(target, width), style="bold")
    if kind != target:
        header.append("\n").append(shorten(kind, width), style="not bold dim")
    header.append("\n").append("input  " + ", ".join(rows.input_texts(analysis)), style="not bold")
    totals = rows.totals_text(analysis)
    if len(totals) > width:
        totals = rows.totals_text(analysis, digits=False)
    return header.append("\n").append(totals, style="not bold")


def _hotspots(selection: Selection, width: int) -> Table:
    reports = selection.reports
    columns = [
        Column("layer", [rows.path_text(r) for r in reports], right=False, style="cyan", shrink=22),
        Column("kernel", [rows.kernel_text(r) for r in reports], right=False, shrink=9),
        Column("channels", [rows.channels_text(r) for r in reports], right=False, keep=6),
        Column("output", [rows.output_text(r) for r in reports], keep=4),
        Column("params", [count(r.layer.params) for r in reports], keep=5),
        Column("MACs", [count(r.layer.macs) for r in reports]),
        Column("share", [percent(r.share) for r in reports], style="bold"),
        Column("cum.", [percent(share) for share in selection.cumulative], style="dim", keep=3),
        Column("≤ MACs", [rows.macs_ranks(r.break_even) for r in reports], keep=7),
        Column("≤ params", [rows.params_ranks(r.break_even) for r in reports], keep=1),
        _half("half", reports),
    ]
    return fit(columns, width)


def _half(title: str, reports: tuple[LayerReport, ...], *, right: bool = True) -> Column:
    """What a half-width bottleneck saves, in green, or why there may be none."""
    styles = ["green" if rows.saving_text(r).startswith("-") else "yellow" for r in reports]
    return Column(title, [rows.saving_text(r) for r in reports], right=right, styles=styles)


def _layers(selection: Selection, width: int) -> Table:
    reports = selection.reports
    return fit(
        [
            Column("layer", [rows.path_text(r) for r in reports], right=False, style="cyan", shrink=22),
            Column("kernel", [rows.kernel_text(r) for r in reports], right=False, shrink=9),
            Column("channels", [rows.channels_text(r) for r in reports], right=False, keep=5),
            Column("output", [rows.output_text(r) for r in reports], keep=3),
            Column("params", [count(r.layer.params) for r in reports], keep=4),
            Column("MACs", [count(r.layer.macs) for r in reports]),
            Column("share", [percent(r.share) for r in reports], style="bold"),
            Column("memory", [size(r.activation_bytes) for r in reports], keep=2),
            Column("bound", [r.bound or "–" for r in reports], right=False, keep=1),
            _half("half or why not", reports, right=False),
        ],
        width,
    )


def _kinds(analysis: Analysis, width: int, most: int | None) -> Table:
    shown, rest = rows.op_rows(analysis, most)
    moved = [total.read_bytes + total.write_bytes for total in shown]
    names = [rows.plain(total.op) for total in shown]
    cells = [
        (exact(t.calls), count(t.params), count(t.macs), percent(rows.share_of(t.macs, analysis.macs))) for t in shown
    ]
    bars = [bar(rows.share_of(t.macs, analysis.macs), 20) for t in shown]
    if rest:
        names.append(f"{len(rest)} more kinds")
        cells.append((exact(sum(t.calls for t in rest)), "0", "0", "0.0%"))
        moved.append(sum(t.read_bytes + t.write_bytes for t in rest))
        bars.append("")
    calls, params, macs, shares = zip(*cells, strict=True) if cells else ((), (), (), ())
    return fit(
        [
            Column("operation", names, right=False, style="cyan", shrink=16),
            Column("calls", calls),
            Column("params", params, keep=3),
            Column("MACs", macs),
            Column("share", shares, style="bold"),
            Column("moved", [size(n) for n in moved], keep=2),
            Column("", bars, right=False, style="blue", keep=1),
        ],
        width,
    )


def _facts(analysis: Analysis) -> Table:
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("peak memory", Text(rows.peak_text(analysis)))
    facts.add_row("critical path", Text(rows.critical_path_text(analysis)))
    facts.add_row("roofline", Text(rows.roofline_text(analysis)))
    coverage = analysis.coverage
    complete = coverage.in_graph == coverage.convolutions and not coverage.unpriced
    facts.add_row("graph", Text(rows.coverage_text(analysis), style="" if complete else "yellow"))
    for i, note in enumerate(rows.notes_of(analysis)):
        facts.add_row("" if i else "notes", Padding(Text(note), 0))
    return facts
