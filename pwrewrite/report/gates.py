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
    over, expected, got = [], [], []
    for what, limit, value in (("parameters", max_params, analysis.params), ("MACs", max_macs, analysis.macs)):
        if limit is not None and value > limit:
            over.append(f"too many {what}")
            expected.append(f"at most {exact(limit)} {what}")
            got.append(f"{exact(value)} {what} ({exact(value - limit)} too many)")
    if strict and analysis.coverage.unpriced:
        over.append("operations without a cost formula")
        expected.append("every operation priced (--strict)")
        got.append(unpriced_text(analysis))
    if over:
        hint = (
            "pwrewrite.register_formula gives an operation its cost"
            if strict and not (max_params or max_macs)
            else None
        )
        raise GateError(
            f"{analysis.target}: {' and '.join(over)}", expected="; ".join(expected), got="; ".join(got), hint=hint
        )
