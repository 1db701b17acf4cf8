"""What ``pwrewrite analyze`` does for ``--as`` and ``--explain-count``: counts as other tools do, and shows that."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..analysis.records import Analysis
    from ..capturing.records import Capture
    from ..report import View
    from ..report.counts import Counts


def counts_of(captured: Capture, *, tool: str | None, explained: bool) -> Counts:
    """The counts of other tools.

    Args:
        captured: The model.
        tool: The tool whose total is wanted in the place of ours.
        explained: Whether every tool's total is to be explained.
    """
    from ..analysis.conventions import count, explain
    from ..report.counts import Counts

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
