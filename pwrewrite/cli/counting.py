"""What ``pwrewrite analyze`` does for ``--as`` and ``--explain-count``: counts as other tools do, and shows that.

The model is built and captured a second time for it, which takes no memory for its weights and little time.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..analysis.records import Analysis
    from ..report import View
    from ..report.counts import Counts


def counts_of(
    target: str,
    *,
    args: Mapping[str, object],
    weights: Path | None,
    weights_lenient: bool,
    inputs: Sequence[str],
    tool: str | None,
    explained: bool,
) -> Counts:
    """The counts of other tools for what can be typed.

    Args:
        target: As for `pwrewrite.analyze_target`.
        args: Arguments for whatever makes the model.
        weights: A checkpoint; its shapes matter, its values do not.
        weights_lenient: Accept a checkpoint that fits in part.
        inputs: Example inputs as text.
        tool: The tool whose total is wanted in the place of ours.
        explained: Whether every tool's total is to be explained.

    Raises:
        UsageError: If the target is a saved folder.
    """
    from ..capture import capture
    from ..conventions import count, explain
    from ..errors import UsageError
    from ..loading import load_target
    from ..report.counts import Counts
    from ..storage import is_saved

    if is_saved(target):
        raise UsageError("--as and --explain-count are not for a saved folder", got=target)
    loaded = load_target(target, args=args, weights=weights, weights_lenient=weights_lenient, inputs=inputs, empty=True)
    captured = capture(loaded.model, loaded.example_inputs)
    return Counts(count(captured, tool) if tool is not None else None, explain(captured) if explained else ())


def text_of(analysis: Analysis, form: str, view: View, counts: Counts) -> str:
    """An analysis with the counts in it as text, for a file."""
    from ..report.counts import render

    return render(analysis, form, view, counts)


def show_counts(analysis: Analysis, form: str, view: View, counts: Counts) -> None:
    """Prints an analysis with the counts in it.

    Args:
        analysis: The analysis.
        form: One of ``pwrewrite.report.FORMATS``.
        view: What to show of the analysis.
        counts: What to show of the tools.
    """
    from rich.console import Console

    from ..report import table
    from ..report.counts import render, report

    console = Console(highlight=False, markup=False, emoji=False)
    if form == "table" and console.is_terminal:
        console.print(report(analysis, view, counts, width=console.width))
        return
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and int(columns) > 0 else table.WIDTH
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="")
    sys.stdout.write(render(analysis, form, view, counts, width=width))
    sys.stdout.flush()
