"""Printing a report on stdout: in colour and fitted where a person looks, plain where a program reads."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..analysis.records import Analysis
    from ..report import View


def show(analysis: Analysis, form: str, view: View) -> None:
    """Prints an analysis.

    Args:
        analysis: The analysis.
        form: One of ``pwrewrite.report.FORMATS``.
        view: What to show.
    """
    from rich.console import Console

    from ..report import render, table

    if form == "table":
        console = Console(highlight=False, markup=False, emoji=False)
        if console.is_terminal:
            console.print(table.page(analysis, view, width=console.width))
            return
    text = render(analysis, form, view, width=_piped_width())
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What programs read is UTF-8 with the line ends it has, whatever the locale.
        sys.stdout.reconfigure(encoding="utf-8", newline="")
    sys.stdout.write(text)
    sys.stdout.flush()  # so that a closed pipe is noticed here


def _piped_width() -> int:
    from ..report.table import WIDTH

    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) > 0 else WIDTH
