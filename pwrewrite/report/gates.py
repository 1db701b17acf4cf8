"""Limits that a build can hang on: a model that exceeds them is an error, after its report was shown."""

from __future__ import annotations

from ..analysis.records import Analysis
from ..core.errors import GateError
from ..core.numbers import exact
from .rows import unpriced_text


def check(
    analysis: Analysis, *, max_params: int | None = None, max_macs: int | None = None, strict: bool = False
) -> None:
    """Holds an analysis against limits.

    Args:
        analysis: The analysis.
        max_params: Most parameters allowed.
        max_macs: Most MACs allowed.
        strict: Whether every operation must have a cost formula and every convolution must be in the graph.

    Raises:
        GateError: If a limit is exceeded; it names all that are.
    """
    failures: list[tuple[str, str, str]] = []
    for what, limit, value in (("parameters", max_params, analysis.params), ("MACs", max_macs, analysis.macs)):
        if limit is not None and value > limit:
            amount = f"{exact(value)} {what} ({exact(value - limit)} too many)"
            failures.append((f"too many {what}", f"at most {exact(limit)} {what}", amount))
    if strict and analysis.coverage.unpriced:
        amount = unpriced_text(analysis)
        failures.append(("operations without a cost formula", "every operation priced (--strict)", amount))
    if failures:
        over, expected, got = zip(*failures, strict=True)
        unpriced = failures[0][0].startswith("operations")  # and so the only one
        hint = "pwrewrite.register_formula gives an operation its cost" if unpriced else None
        message = f"{analysis.target}: {' and '.join(over)}"
        raise GateError(message, expected="; ".join(expected), got="; ".join(got), hint=hint)
