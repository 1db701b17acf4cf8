"""The report of a rewrite, or of a plan that was not carried out: the saving, the proof, the layers, what was left."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.numbers import count, exact, plural
from ..core.plan import Plan, Skip
from ..core.text import NO_WEIGHTS
from ..core.verification import Verification
from . import budget_rows, rewrite_rows as rows
from .page import Block, Column, Facts, Line, Listing, Page, Section, Table, Title, notes_part
from .records import EditRow, Report

_ERROR = (
    "error: how far a layer's weights moved, ‖W − Ŵ‖ / ‖W‖; factors fitted to activations may move them far, even "
    "above 1, and the outputs little"
)


def page(report: Report, *, everything: bool = False, planned: bool = False) -> Page:
    """The whole report: ``everything`` shows every layer, ``planned`` is for what was not carried out."""
    title = Title(report.target, [rows.headline(report, planned=planned)])
    return (title, *body(report, everything=everything, planned=planned))


def body(report: Report, *, everything: bool = False, planned: bool = False) -> Page:
    """The report's parts, without its title."""
    blocks: list[Block] = [Line(""), saving(rows.totals(report))]
    if report.budget is not None:
        random = any(note.startswith(NO_WEIGHTS) for note in report.notes)
        facts = [(*line, "") for line in budget_rows.lines(report.budget, random=random)]
        blocks += [Section("Budget"), Facts(facts)]
    blocks += [Line(f"{line}, as allowed", "yellow") for line in report.output_changes]
    if not planned:
        blocks += verdicts(report.verification)
    if report.edits:
        shown, more = rows.ordered(report.edits, everything)
        blocks += [Section("Layers", rows.shares(report)), _edits(shown)]
        if more:
            blocks.append(Line(f"… and {exact(more)} more that save less (--all)", "dim"))
        if any(row.edit.relative_error is not None for row in shown):
            blocks.append(Line(_ERROR, "dim"))
    blocks += _left_parts(report.skips, everything=everything)
    notes = rows.notes(report)
    return (*blocks, *notes_part(notes))


def plan_page(plan: Plan) -> Page:
    """A plan on its own."""
    ops = plan.ops
    estimates = [f"{count(e.macs_before)} → {count(e.macs_after)}" if (e := op.estimate) else "–" for op in ops]
    title = Title(str(plan.model.get("target") or plan.model.get("class") or "plan"), [plural(len(ops), "op")])
    table = Table(
        [
            rows.layer_column(op.path for op in ops),
            Column("action", [op.action for op in ops], right=False),
            Column("pass", [op.pass_name for op in ops], right=False, keep=1),
            Column("MACs", estimates),
        ]
    )
    return (title, Line(""), table, *_left_parts(plan.skips, everything=False))


def verification_page(proof: Verification, names: tuple[str, str] | None = None) -> Page:
    """A verification of two models, called ``names``, on its own."""
    blocks: list[Block] = [Title(names[0], [f"against {names[1]}"])] if names else []
    return (*blocks, *verdicts(proof), *notes_part(proof.notes))


def verdicts(proof: Verification | None) -> list[Block]:
    """The two verdicts, on the outputs and on the structure, and each check; failures first."""
    if proof is None:
        return [Section("Proof", "NOT VERIFIED: nothing here is proven", verdict=False)]
    text, good = rows.outputs_text(proof)
    outputs = Section("Outputs", text, verdict=good)
    return [outputs, Section("Structure", rows.verdict(proof), verdict=proof.passed), checks(proof)]


def checks(proof: Verification) -> Listing:
    """One line for each check, failures first."""
    ordered = sorted(proof.checks, key=lambda check: check.passed)
    return Listing(
        [
            Column("", ["✓" if c.passed else "✗" for c in ordered], right=False,
                   styles=["green" if c.passed else "bold red" for c in ordered]),
            Column("check", [c.name for c in ordered], right=False),
            Column("what was found", [c.detail for c in ordered], right=False,
                   styles=["dim" if c.passed else "" for c in ordered]),
        ]
    )  # fmt: skip


def saving(lines: Sequence[tuple[str, str, str, str]]) -> Table:
    """What is counted, before and after, and the change: green where there is less of it."""
    names, before, after, changes = ([line[i] for line in lines] for i in range(4))
    head = Column("", names, right=False, style="bold")
    return Table([head, Column("before", before), Column("after", after), rows.change_column(changes)])


def _edits(shown: Sequence[EditRow]) -> Table:
    edits = [row.edit for row in shown]
    changes = [rows.change(row.macs_before, row.macs_after) for row in shown]
    columns = [
        rows.layer_column(e.path for e in edits),
        Column("form", [rows.form_text(e) for e in edits], right=False, shrink=8),
        Column("width", [rows.widths_text(e) for e in edits], keep=4),
        Column("params", [f"{count(e.params_before)} → {count(e.params_after)}" for e in edits], keep=3),
        Column("MACs", [f"{count(row.macs_before)} → {count(row.macs_after)}" for row in shown]),
        rows.change_column(changes),
    ]
    if any(e.relative_error is not None for e in edits):
        columns.append(Column("error", [rows.error_text(e.relative_error) for e in edits], keep=5, long="weight error"))
    if any(e.exact for e in edits):
        columns.append(Column("exact in", [e.exact or "–" for e in edits], right=False, keep=2))
    columns.append(Column("kind", [e.kind for e in edits], right=False, keep=1))
    return Table(columns)


def _left_parts(skips: Sequence[Skip], *, everything: bool) -> list[Block]:
    if not skips:
        return []
    head = Section("Left as they are", plural(len(skips), "layer"))
    return [head, _each_skip(skips) if everything else _skips(skips)]


def _skips(skips: Sequence[Skip]) -> Listing:
    groups = rows.reasons(skips)
    return Listing(
        [
            Column("layers", [exact(len(group)) for group in groups.values()]),
            Column("reason", list(groups), right=False, style="yellow"),
            Column("which", [rows.few([s.path for s in g]) for g in groups.values()], right=False, style="cyan"),
            Column("why", [rows.common_detail(group) for group in groups.values()], right=False, joined=True),
        ]
    )


def _each_skip(skips: Sequence[Skip]) -> Listing:
    return Listing(
        [
            rows.layer_column(skip.path for skip in skips),
            Column("reason", [str(skip.reason) for skip in skips], right=False, style="yellow"),
            Column("why", [skip.detail for skip in skips], right=False),
        ]
    )
