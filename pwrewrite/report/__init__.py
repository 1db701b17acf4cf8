"""What a person or a program reads: analyses, rewrites and plans as a table, Markdown, HTML, CSV or JSON.

Each subject makes a `page.Page` (in `analysis`, `rewrite`, `fused`, `frontier`, `passes`, `counts`); `terminal`,
`to_markdown` and `to_html` write it, so that every form has the same columns and words; `web` adds pictures.
Everything here is a pure function; only the command prints.
"""

from __future__ import annotations

import json

from ..analysis.records import Analysis
from ..core.errors import UsageError
from . import analysis as analysis_page, spreadsheet, terminal, web
from .counts import Counts
from .rows import SORTS, View
from .to_html import html
from .to_markdown import markdown

FORMATS = ("table", "json", "markdown", "csv", "html")

__all__ = ["FORMATS", "SORTS", "Counts", "View", "html", "markdown", "render"]


def render(
    analysis: Analysis,
    form: str = "table",
    view: View | None = None,
    counts: Counts | None = None,
    *,
    width: int = terminal.WIDTH,
) -> str:
    """An analysis as text in one of `FORMATS`, as far as ``view`` shows it; JSON always holds everything.

    Counts of other tools stand beside; CSV, which has no place for them beside the layers, then holds the counts.
    ``width`` are the terminal cells that there are for a table.
    """
    view, counts = view or View(), counts or Counts()
    if form == "json":
        return json.dumps({**analysis.to_dict(), **counts.data()}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if form == "csv":
        return counts.csv() if counts else spreadsheet.layers(analysis, view)
    if form == "table":
        return terminal.text(analysis_page.page(analysis, view, counts), width)
    if form == "markdown":
        return markdown(analysis_page.page(analysis, view, counts))
    if form == "html":
        return web.analysis(analysis, analysis_page.page(analysis, view, counts))
    raise UsageError("no such format", expected=", ".join(FORMATS), got=repr(form))
