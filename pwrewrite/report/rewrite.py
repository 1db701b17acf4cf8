"""The report of a rewrite for a terminal: the saving, the proof, the layers, what was left and why.

Made for 100 columns as the report of an analysis is, with the same helpers. `page` returns a rich renderable, `render`
the same as plain text. A plan that was not carried out is shown likewise, without a proof (`planned=True`).
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core.numbers import count, exact, plural
from ..core.plan import Skip
from ..core.verification import Verification
from . import budget_rows
from . import rewrite_rows as rows
from .layout import Column, fit, plain_text, shorten
from .records import EditRow, Report
from .rows import plain
from .table import WIDTH


def page(report: Report, *, width: int = WIDTH, everything: bool = False, planned: bool = False) -> RenderableType:
    """The whole report.

    Args:
        report: The report.
        width: Terminal cells there are.
        everything: Whether to show every layer, and every layer that was left with its own reason.
        planned: Whether nothing was done yet.
    """
    parts: list[RenderableType] = [_header(report, width, planned), Text(), _saving(report, width)]
    if report.budget is not None:
        parts += [_section("Budget", ""), _facts(budget_rows.lines(report.budget))]
    for line in report.output_changes:
        parts.append(Text(f"{plain(line)}, as allowed", style="yellow"))
    if not planned:
        verdict, good = rows.verdict(report)
        parts.append(_section("Proof", verdict, style="green" if good else "bold red"))
        if report.verification is not None:
            parts.append(checks(report.verification))
    if report.edits:
        parts += [_section("Layers", rows.shares(report)), *_layers(report, width, everything)]
    if report.skips:
        parts.append(_section("Left as they are", plural(len(report.skips), "layer")))
        parts.append(_each_skip(report.skips, width) if everything else _skips(report.skips))
    notes = rows.notes(report)
    if notes:
        parts += [Text(), _notes(notes)]
    return Group(*parts)


def render(report: Report, *, width: int = WIDTH, everything: bool = False, planned: bool = False) -> str:
    """`page` as plain text without colours."""
    return plain_text(page(report, width=width, everything=everything, planned=planned), width)


def verification_page(proof: Verification, names: tuple[str, str], *, width: int = WIDTH) -> RenderableType:
    """A verification on its own.

    Args:
        proof: The verification.
        names: What the two models are called.
        width: Terminal cells there are.
    """
    header = Text(shorten(plain(names[0]), width), style="bold").append("\n")
    header.append(shorten(f"against {plain(names[1])}", width))
    parts = [header, _section("Proof", rows.proof_text(proof), style="green" if proof.passed else "bold red")]
    body: list[RenderableType] = [*parts, checks(proof)]
    if proof.notes:
        body += [Text(), _notes([plain(note) for note in proof.notes])]
    return Group(*body)


def checks(proof: Verification) -> Table:
    """One line for each check, failures first."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for passed, name, detail in rows.check_lines(proof):
        style = "green" if passed else "bold red"
        table.add_row(
            Text("✓" if passed else "✗", style=style), Text(name), Text(detail, style="dim" if passed else "")
        )
    return table


def _facts(lines: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines:
        table.add_row(Text(name), Text(text))
    return table


def _section(title: str, note: str, *, style: str = "") -> Text:
    section = Text("\n").append(title, style="bold")
    return section.append(f"  {note}" if note else "", style=style)


def _header(report: Report, width: int, planned: bool) -> Text:
    header = Text(shorten(plain(report.target), width), style="bold").append("\n")
    return header.append(rows.headline(report, planned=planned), style="not bold")


def _saving(report: Report, width: int) -> Table:
    totals = rows.totals(report)
    styles = ["" if t.better is None else "green" if t.better else "yellow" for t in totals]
    return fit(
        [
            Column("", [t.name for t in totals], right=False, style="bold"),
            Column("before", [t.before for t in totals]),
            Column("after", [t.after for t in totals]),
            Column("change", [t.change for t in totals], styles=styles),
        ],
        width,
    )


def _layers(report: Report, width: int, everything: bool) -> list[RenderableType]:
    shown, more = rows.ordered(report.edits, everything)
    parts: list[RenderableType] = [_edits(shown, width)]
    if more:
        parts.append(Text(f"… and {exact(more)} more that save less (--all)", style="dim"))
    return parts


def _edits(shown: Sequence[EditRow], width: int) -> Table:
    edits = [row.edit for row in shown]
    columns = [
        Column("layer", [rows.path_text(e.path) for e in edits], right=False, style="cyan", shrink=18),
        Column("form", [rows.form_text(e) for e in edits], right=False, shrink=8),
        Column("width", [rows.widths_text(e) for e in edits], keep=4),
        Column("params", [_arrow(e.params_before, e.params_after) for e in edits], keep=3),
        Column("MACs", [_arrow(row.macs_before, row.macs_after) for row in shown]),
        Column(
            "change",
            [rows.change(row.macs_before, row.macs_after) for row in shown],
            styles=["green" if row.macs_after < row.macs_before else "yellow" for row in shown],
        ),
    ]
    if any(e.relative_error is not None for e in edits):
        columns.append(Column("error", [rows.error_text(e.relative_error) for e in edits], keep=5))
    if any(e.exact for e in edits):
        columns.append(Column("exact in", [e.exact or "–" for e in edits], right=False, keep=2))
    columns.append(Column("kind", [rows.kind_text(e) for e in edits], right=False, keep=1))
    return fit(columns, width)


def _arrow(before: int, after: int) -> str:
    return f"{count(before)} → {count(after)}"


def _skips(skips: Sequence[Skip]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, style="yellow")
    table.add_column(overflow="fold")
    for group in rows.left(skips):
        what = Text(rows.few(group.paths), style="cyan").append(f": {group.detail}", style="not bold default")
        table.add_row(exact(len(group.paths)), Text(group.reason), what)
    return table


def _each_skip(skips: Sequence[Skip], width: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(no_wrap=True, style="yellow")
    table.add_column(overflow="fold")
    for skip in skips:
        table.add_row(
            Text(shorten(rows.path_text(skip.path), max(18, width // 3))),
            Text(str(skip.reason)),
            Text(plain(skip.detail)),
        )
    return table


def _notes(notes: Sequence[str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for i, note in enumerate(notes):
        table.add_row("" if i else "notes", Text(note))
    return table
