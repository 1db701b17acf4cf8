"""The report of a rewrite as GitHub-flavoured Markdown; also the body of a saved folder's README."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.numbers import count, exact, plural
from ..core.plan import Skip
from ..core.verification import Verification
from . import budget_rows
from . import rewrite_rows as rows
from .markdown import code, escape, pipe_table, sentence
from .records import EditRow, Report


def render(report: Report, *, everything: bool = False, planned: bool = False) -> str:
    """The whole report.

    Args:
        report: The report.
        everything: Whether to show every layer, and every layer that was left with its own reason.
        planned: Whether nothing was done yet.
    """
    blocks = [f"# {code(report.target)}", sentence(rows.headline(report, planned=planned))]
    blocks += body(report, everything=everything, planned=planned)
    return "\n\n".join(blocks) + "\n"


def body(report: Report, *, everything: bool = False, planned: bool = False) -> list[str]:
    """The report's sections, without its head."""
    blocks = [saving(report)]
    if report.budget is not None:
        lines = budget_rows.lines(report.budget)
        blocks += ["## Budget", "\n".join(f"- {escape(name)}: {escape(text)}" for name, text in lines)]
    blocks += [f"**{escape(line)}**, as allowed." for line in report.output_changes]
    if not planned:
        blocks += ["## Proof", *proof(report)]
    if report.edits:
        shown, more = rows.ordered(report.edits, everything)
        blocks += ["## Layers", _edits(shown)]
        if more:
            blocks.append(f"… and {exact(more)} more that save less.")
    if report.skips:
        blocks += ["## Left as they are", sentence(plural(len(report.skips), "layer"))]
        blocks.append(_each_skip(report.skips) if everything else _skips(report.skips))
    notes = rows.notes(report)
    if notes:
        blocks += ["## Notes", "\n".join(f"- {escape(note)}" for note in notes)]
    return blocks


def saving(report: Report) -> str:
    """The totals before and after."""
    cells = [(t.name, t.before, t.after, t.change) for t in rows.totals(report)]
    return pipe_table(("", "before", "after", "change"), cells, "lrrr")


def proof(report: Report) -> list[str]:
    """The verdict and each check."""
    text, good = rows.verdict(report)
    blocks = [f"{'✓' if good else '✗'} **{escape(text)}**"]
    return [*blocks, checks(report.verification)] if report.verification is not None else blocks


def verification(found: Verification, names: tuple[str, str]) -> str:
    """A verification on its own."""
    mark = "✓" if found.passed else "✗"
    blocks = [
        f"# {code(names[0])} against {code(names[1])}",
        f"{mark} **{escape(rows.proof_text(found))}**",
        checks(found),
    ]
    if found.notes:
        blocks += ["## Notes", "\n".join(f"- {escape(note)}" for note in found.notes)]
    return "\n\n".join(blocks) + "\n"


def checks(found: Verification) -> str:
    """A row for each check, failures first."""
    cells = [("✓" if ok else "✗", escape(name), escape(detail)) for ok, name, detail in rows.check_lines(found)]
    return pipe_table(("", "check", "what was found"), cells, "lll")


def _edits(shown: Sequence[EditRow]) -> str:
    head = ("layer", "form", "width", "params", "MACs", "change", "error", "exact in", "kind")
    cells = [
        (
            code(rows.path_text(row.edit.path)),
            rows.form_text(row.edit),
            rows.widths_text(row.edit),
            f"{count(row.edit.params_before)} → {count(row.edit.params_after)}",
            f"{count(row.macs_before)} → {count(row.macs_after)}",
            rows.change(row.macs_before, row.macs_after),
            rows.error_text(row.edit.relative_error),
            row.edit.exact or "–",
            rows.kind_text(row.edit),
        )
        for row in shown
    ]
    return pipe_table(head, cells, "llrrrrrll")


def _skips(skips: Sequence[Skip]) -> str:
    cells = [
        (exact(len(group.paths)), group.reason, ", ".join(code(rows.path_text(p)) for p in group.paths[:3])
         + (f" and {exact(len(group.paths) - 3)} more" if len(group.paths) > 3 else ""), escape(group.detail))
        for group in rows.left(skips)
    ]  # fmt: skip
    return pipe_table(("layers", "reason", "which", "why"), cells, "rlll")


def _each_skip(skips: Sequence[Skip]) -> str:
    cells = [(code(rows.path_text(skip.path)), str(skip.reason), escape(skip.detail)) for skip in skips]
    return pipe_table(("layer", "reason", "why"), cells, "lll")
