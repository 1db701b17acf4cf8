"""Showing what a command found: on stdout or in a file, as a table, Markdown or JSON; and closing words on stderr."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def show(
    form: str,
    output: Path | None,
    *,
    page: Callable[[int], RenderableType],
    markdown: Callable[[], str],
    data: Callable[[], str],
) -> None:
    """Shows something in one of its forms.

    Args:
        form: ``table``, ``markdown`` or ``json``.
        output: A file; stdout if None.
        page: Makes the table for a width.
        markdown: Makes the Markdown.
        data: Makes the JSON.
    """
    from rich.console import Console

    from ..core import files
    from ..report.layout import plain_text
    from ..report.table import WIDTH

    if form == "table" and output is None:
        console = Console(highlight=False, markup=False, emoji=False)
        if console.is_terminal:
            console.print(page(console.width))
            return
    if form == "table":
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if output is None and columns.isdecimal() and int(columns) > 0 else WIDTH
        text = plain_text(page(width), width)
    else:
        text = markdown() if form == "markdown" else data()
    if output is not None:
        files.write_file(output, text)
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="")
    sys.stdout.write(text)
    sys.stdout.flush()  # so that a closed pipe is noticed here


def tell(text: str) -> None:
    """A closing word on stderr."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)
