"""Showing what a command found: on stdout or in a file, for people or for programs; closing words."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.text import plain
from .encoding import FALLBACK
from .options import Common, Listed, Reported

if TYPE_CHECKING:
    from ..report.page import Page


def show(reported: Listed, page: Page, **texts: Callable[[], str]) -> None:
    """Shows something in the form that was asked for: coloured and fitted where a person looks, plain elsewhere.

    ``page`` is for people; ``texts`` name each form for programs and what makes its text.
    """
    from rich.console import Console

    from ..core import files
    from ..report import markdown, terminal, web

    output = reported.output if isinstance(reported, Reported) else None
    if reported.form == "table" and output is None:
        console = Console(highlight=False, markup=False, emoji=False)
        if console.is_terminal:
            console.print(terminal.renderable(page, console.width))
            return
    if reported.form == "table":
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if output is None and columns.isdecimal() and int(columns) > 0 else terminal.WIDTH
        text = terminal.text(page, width)
    elif reported.form in texts:
        text = texts[reported.form]()
    else:
        text = markdown(page) if reported.form == "markdown" else web.document(page)
    if output is not None:
        files.write_file(output, text)
        tell(f"written to {output}", reported)
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        if reported.form != "table":  # what programs read is UTF-8
            sys.stdout.reconfigure(encoding="utf-8")
        sys.stdout.reconfigure(newline="", errors=FALLBACK)
    sys.stdout.write(text)
    sys.stdout.flush()  # so that a closed pipe is noticed here


def tell(text: str, common: Common) -> None:
    """A closing word on stderr, unless only errors are wanted."""
    if not common.quiet:
        with contextlib.suppress(OSError):
            print(plain(text), file=sys.stderr)
