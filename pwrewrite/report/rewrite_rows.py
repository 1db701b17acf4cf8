"""What the cells of a rewrite's report say, whatever its form: the saving, the proof, the layers, what was left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..core import text
from ..core.numbers import count, exact, percent, plural, size
from ..core.plan import Edit, Skip
from ..core.verification import Verification
from .page import Column
from .records import Compression, EditRow, Report
from .rows import natural

_ROUNDING = 1e-6
"""Relative output error up to which outputs count as the same where nothing says that they should be."""

ROOT = "(model)"
"""What the model itself is called, whose path is empty."""

TOP = 20
"""Layers shown unless all are asked for."""

_TOTALS = {
    "params": "parameters",
    "macs": "MACs",
    "weight_bytes": "weights",
    "activation_bytes": "activations",
    "peak_activation_bytes": "peak memory",
}
"""Totals that are shown, and what they are called."""


def totals(report: Report | Compression) -> list[tuple[str, str, str, str]]:
    """The saving: what is counted, before, after, and the change; counts with all their digits."""

    def text(key: str, value: int) -> str:
        if key.endswith("bytes"):
            return size(value)
        return f"{count(value)} ({exact(value)})" if value >= 1000 else exact(value)

    both = {key: (report.before[key], report.after[key]) for key in _TOTALS if key in report.before}
    return [(_TOTALS[key], text(key, old), text(key, new), change(old, new)) for key, (old, new) in both.items()]


def change(before: int, after: int) -> str:
    """``-57.8%``; ``0%`` where nothing changed; ``new`` where there was nothing."""
    if before == after:
        return "0%"
    if not before:
        return "new"
    share = (after - before) / before
    text = f"{100 * share:+.1f}%"
    return text if text not in ("+0.0%", "-0.0%") else ("<+0.1%" if share > 0 else "<-0.1%")


def layer_column(paths: Iterable[str]) -> Column:
    """The paths of layers."""
    return Column("layer", [path or ROOT for path in paths], right=False, style="cyan", shrink=18, code=True)


def change_column(changes: Sequence[str]) -> Column:
    """Changes, green where there is less, yellow where there is more."""
    styles = [
        "green" if c.startswith(("-", "<-")) else "yellow" if c.startswith(("+", "<+", "new")) else "" for c in changes
    ]
    return Column("change", changes, styles=styles)


def error_text(error: float | None) -> str:
    """A relative error to three digits; ``–`` where there is none."""
    if error is None:
        return "–"
    if error == 0 or error >= 0.001:
        return f"{error:.3f}"
    return f"{error:.0e}"


def headline(report: Report, *, planned: bool = False) -> str:
    """What was done and what became of the outputs, in a sentence."""
    done = "would be rewritten" if planned else "rewritten"
    if not report.edits:
        return f"nothing {done}"
    passes = list(dict.fromkeys(row.edit.op.pass_name for row in report.edits))
    by = f" by {', '.join(passes)}" if passes else ""
    return f"{plural(len(report.edits), 'layer')} {done}{by}{and_outputs(report.verification)}"


def and_outputs(proof: Verification | None) -> str:
    """What a headline says of the outputs, where they were compared."""
    return f"; {change_text(proof)}" if proof is not None and proof.relative_error is not None else ""


def shares(report: Report) -> str:
    """How much of the model's MACs the edited layers did."""
    done, total = sum(row.macs_before for row in report.edits), report.before.get("macs", 0)
    if not total or len({row.edit.path for row in report.edits}) < len(report.edits):
        return ""
    return f"they did {percent(min(done / total, 1.0))} of the MACs"


def verdict(proof: Verification) -> str:
    """Whether all that was checked held, in a few words."""
    checks = plural(len(proof.checks), "check")
    if proof.passed:
        return f"verified: {checks} passed"
    return f"FAILED: {len(proof.failures)} of {checks}" + (
        f", from {proof.diverges_at} on" if proof.diverges_at else ""
    )


def change_text(proof: Verification) -> str:
    """How far the outputs moved: ``same prediction for 3 of 9 inputs``, or the relative error."""
    if proof.agreement is not None:
        return f"same prediction for {exact(proof.agreeing)} of {plural(proof.samples, 'input')}"
    return "outputs the same up to rounding" if _same(proof) else f"outputs off by {error_text(proof.relative_error)}"


def outputs_text(proof: Verification) -> tuple[str, bool | None]:
    """How far the outputs moved, against what limit, and whether that is good; None where no limit says so."""
    broken = any(check.name.startswith(("numerics", "finite")) for check in proof.failures)
    if proof.relative_error is None:
        return "not compared", False if broken else None
    moved = "the same up to rounding" if _same(proof) and not broken else "changed"
    parts = [f"{moved}: relative error {error_text(proof.relative_error)}"]
    if proof.agreement is not None:
        parts.append(f"{change_text(proof)} ({percent(proof.agreement)})")
    if proof.max_error is not None:
        side = "above" if proof.relative_error > proof.max_error else "within"
        parts.append(f"{side} the limit of {proof.max_error:g}")
    elif not _same(proof):
        parts.append("no limit set (--max-error)")
    good = True if proof.max_error is not None or _same(proof) else None
    return " · ".join(parts), False if broken else good


def _same(proof: Verification) -> bool:
    """Whether the outputs are held to rounding, or come out so."""
    return proof.exact or (proof.relative_error is not None and proof.relative_error <= _ROUNDING)


def form_text(edit: Edit) -> str:
    """What came in place of the layer: ``bottleneck``, ``project``, and that it is fresh where it is."""
    fresh = edit.op.settings.get("init") == "fresh"
    return f"{edit.method} fresh" if fresh else edit.method


def widths_text(edit: Edit) -> str:
    """The widths between, first to last: ``32→64``, or one number where there is only one or they are equal."""
    widths = [w for w in (edit.rank_in, edit.rank_out) if w is not None]
    return "→".join(str(w) for w in dict.fromkeys(widths)) or "–"


def ordered(rows: Sequence[EditRow], everything: bool) -> tuple[Sequence[EditRow], int]:
    """The edits to show, and how many more there are: the largest savings first, or all in the order they were done."""
    if everything or len(rows) <= TOP + 1:
        return rows, 0
    largest = sorted(rows, key=lambda row: row.macs_after - row.macs_before)
    return largest[:TOP], len(rows) - TOP


def reasons(skips: Sequence[Skip]) -> dict[str, list[Skip]]:
    """Skips by reason, the most frequent first, each in the natural order of its paths."""
    groups: dict[str, list[Skip]] = {}
    for skip in skips:
        groups.setdefault(str(skip.reason), []).append(skip)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return {reason: sorted(group, key=lambda skip: natural(skip.path)) for reason, group in ordered}


def common_detail(group: Sequence[Skip]) -> str:
    """Why the skips of one reason are left; that of the first by its name where they say different things."""
    if len({skip.detail for skip in group}) == 1:
        return group[0].detail
    return f"each for its own; {group[0].path or ROOT}: {group[0].detail}"


def counts_text(skips: Sequence[Skip]) -> str:
    """How many were left for which reason: ``36 pointwise, 2 no-gain``."""
    return ", ".join(f"{len(group)} {reason}" for reason, group in reasons(skips).items())


def few(paths: Sequence[str], most: int = 3) -> str:
    """Some paths, and how many more there are."""
    return text.few([path or ROOT for path in paths], most)


def notes(report: Report) -> list[str]:
    """What a reader should be told, the verification's own notes included."""
    own = report.verification.notes if report.verification else ()
    return list(dict.fromkeys((*report.notes, *own)))
