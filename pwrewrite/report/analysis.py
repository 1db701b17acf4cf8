"""The report of an analysis: hotspots first, then what kinds of operation cost, memory, paths and notes."""

from __future__ import annotations

from collections.abc import Iterable

from ..analysis.records import Analysis, TreeNode
from ..core.numbers import count, exact, percent, size
from . import counts as other_tools, rows
from .counts import Counts
from .page import Block, Column, Facts, Line, Notes, Page, Section, Table, Title
from .rows import Selection, View
from .terminal import bar

DEPTH = 2
"""Levels of the module hierarchy shown unless the user says otherwise."""

_FREE_KINDS = 4
"""Kinds of operation without MACs shown beside those with some."""


def page(analysis: Analysis, view: View | None = None, counts: Counts | None = None) -> Page:
    """The whole report."""
    view, counts = view or View(), counts or Counts()
    selection = rows.select(analysis, view)
    blocks: list[Block] = [_title(analysis, counts)]
    blocks += [Line(f"not exact: {caveat}", "yellow") for caveat in (counts.chosen.caveats if counts.chosen else ())]
    if view.depth is not None:
        blocks += [Section("Modules", f"{count(analysis.macs)} MACs"), tree(analysis, view.depth)]
    else:
        blocks.append(Section("Hotspots" if selection.hotspots else "Layers", rows.headline(analysis, selection)))
        if selection.reports:
            blocks.append(Table(layer_columns(selection, receptive_field=view.receptive_field)))
        if selection.hotspots and any(r.break_even is not None for r in selection.reports):
            legend = "≤: ranks in→out up to which a bottleneck gains · half: what one at half width does to the MACs"
            blocks.append(Line(legend, "dim", hint=True))
        if selection.left_out:
            blocks.append(Line(f"… and {exact(selection.left_out)} more (--top)", "dim"))
    blocks += [Section("Kinds of operation"), _kinds(analysis, None if view.everything else _FREE_KINDS)]
    blocks += [Section("Facts", silent=True), Facts(_facts(analysis))]
    notes = rows.notes_of(analysis)
    return (*blocks, *([Notes(notes)] if notes else []), *other_tools.blocks(counts.explained))


def _title(analysis: Analysis, counts: Counts) -> Title:
    lines: list[str | tuple[str, str]] = [] if analysis.model_class == analysis.target else [analysis.model_class]
    lines.append("input  " + ", ".join(rows.input_texts(analysis)))
    short = rows.totals_text(analysis, counts.chosen, digits=False)
    lines.append((rows.totals_text(analysis, counts.chosen), short))
    return Title(analysis.target, lines)


def layer_columns(selection: Selection, *, receptive_field: bool = False) -> list[Column]:
    """What is said of each layer: of hotspots where a bottleneck gains, of all layers what bounds them, too."""
    reports, hotspots = selection.reports, selection.hotspots
    layers = [report.layer for report in reports]
    columns = [
        Column("layer", [rows.path_text(r) for r in reports], right=False, style="cyan", shrink=22, code=True),
        Column("kernel", [rows.kernel_text(r) for r in reports], right=False, shrink=9),
        Column("channels", [f"{layer.in_channels}→{layer.out_channels}" for layer in layers], right=False, keep=6),
        Column("output", [rows.output_text(r) for r in reports], keep=4),
        Column("params", [count(layer.params) for layer in layers], keep=5),
        Column("MACs", [count(layer.macs) for layer in layers]),
        Column("share", [percent(r.share) for r in reports], style="bold"),
    ]
    if hotspots:
        columns += [
            Column("cum.", [percent(s) for s in selection.cumulative], style="dim", keep=3, long="cumulative"),
            Column("≤ MACs", [rows.ranks_text(r, "macs") for r in reports], keep=7, long="break-even rank (MACs)"),
            Column(
                "≤ params", [rows.ranks_text(r, "params") for r in reports], keep=1, long="break-even rank (params)"
            ),
        ]
    else:
        columns += [
            Column("memory", [size(r.activation_bytes) for r in reports], keep=2),
            Column("bound", [r.bound or "–" for r in reports], right=False, keep=1),
        ]
    if receptive_field:
        columns.append(Column("sees", [rows.field_text(r) for r in reports], keep=8, long="receptive field"))
    savings = [rows.saving_text(r) for r in reports]
    half = Column(
        "half" if hotspots else "half or why not",
        savings,
        right=hotspots,
        styles=["green" if text.startswith("-") else "yellow" for text in savings],
        long="half width" if hotspots else "half width or why not",
        full=[": ".join(filter(None, (t, r.skip.detail if r.skip else ""))) for t, r in zip(savings, reports)],
    )
    return [*columns, half]


def _kinds(analysis: Analysis, most: int | None) -> Table:
    shown, rest = rows.op_rows(analysis, most)
    names, shares = [total.op for total in shown], [rows.share_of(total.macs, analysis.macs) for total in shown]
    moved = [total.read_bytes + total.write_bytes for total in shown]
    calls, params, macs = ([getattr(total, key) for total in shown] for key in ("calls", "params", "macs"))
    if rest:
        names.append(f"{len(rest)} more kinds")
        calls.append(sum(total.calls for total in rest))
        moved.append(sum(total.read_bytes + total.write_bytes for total in rest))
        for values in (params, macs, shares):
            values.append(0)
    return Table(
        [
            Column("operation", names, right=False, style="cyan", shrink=16, code=True),
            Column("calls", [exact(n) for n in calls]),
            Column("params", [count(n) for n in params], keep=3),
            Column("MACs", [count(n) for n in macs]),
            Column("share", [percent(share) for share in shares], style="bold"),
            Column("moved", [size(n) for n in moved], keep=2, long="bytes moved"),
            Column("", [bar(share, 20) for share in shares], right=False, style="blue", keep=1),
        ]
    )


def _facts(analysis: Analysis) -> list[tuple[str, str, str]]:
    coverage = analysis.coverage
    complete = coverage.in_graph == coverage.convolutions and not coverage.unpriced
    return [
        ("peak memory", rows.peak_text(analysis), ""),
        ("critical path", rows.critical_path_text(analysis), ""),
        ("roofline", rows.roofline_text(analysis), ""),
        ("graph", rows.coverage_text(analysis), "" if complete else "yellow"),
    ]


def tree(analysis: Analysis, depth: int) -> Table:
    """The modules down to ``depth`` below the model, each with the cost of all that runs inside, unless none."""
    shown = list(_walk(analysis.tree, depth, ()))
    shares = [rows.share_of(node.macs, analysis.macs) for node, _, _ in shown]
    names = [_stem(lasts) + (node.name or "(model)") + (" …" if more else "") for node, lasts, more in shown]
    return Table(
        [
            Column("module", names, right=False, style="cyan", shrink=24),
            Column("class", [node.kind for node, _, _ in shown], right=False, style="dim", shrink=12, keep=2),
            Column("params", [count(node.params) for node, _, _ in shown]),
            Column("MACs", [count(node.macs) for node, _, _ in shown]),
            Column("share", [percent(share) for share in shares], style="bold"),
            Column("", [bar(share, 20) for share in shares], right=False, style="blue", keep=1),
        ],
        tree=True,
    )


def _walk(node: TreeNode, depth: int, lasts: tuple[bool, ...]) -> Iterable[tuple[TreeNode, tuple[bool, ...], bool]]:
    """Each node, whether the node on each level down to it is the last of its siblings, and whether more is hidden."""
    children = [child for child in node.children if child.macs or child.params]
    yield node, lasts, bool(children) and depth <= 0
    if depth > 0:
        for i, child in enumerate(children):
            yield from _walk(child, depth - 1, (*lasts, i == len(children) - 1))


def _stem(lasts: tuple[bool, ...]) -> str:
    """The lines left of a name: one stroke per ancestor that has more children to come."""
    if not lasts:
        return ""
    return "".join("   " if last else "│  " for last in lasts[:-1]) + ("└─ " if lasts[-1] else "├─ ")
