"""What a person or a program reads: an analysis as a table, a tree, Markdown, CSV or JSON.

Everything here is a pure function from an `Analysis` to text; only the command prints. What the cells say is in `rows`,
how numbers are scaled in `numbers`, how columns are fitted in `layout`.
"""

from __future__ import annotations

from ..analysis.records import Analysis
from ..core.errors import UsageError
from . import as_csv as csv
from . import as_json as json
from . import markdown, table
from .rows import SORTS, View

FORMATS = ("table", "json", "markdown", "csv")
"""The names of what `render` makes."""

__all__ = ["FORMATS", "SORTS", "View", "render"]


def render(analysis: Analysis, form: str = "table", view: View | None = None, *, width: int = table.WIDTH) -> str:
    """An analysis as text.

    Args:
        analysis: The analysis.
        form: One of `FORMATS`.
        view: What to show; JSON always holds everything.
        width: Terminal cells there are, for the table.

    Raises:
        UsageError: If there is no such format.
    """
    view = view or View()
    if form == "table":
        return table.render(analysis, view, width=width)
    if form == "markdown":
        return markdown.render(analysis, view)
    if form == "csv":
        return csv.render(analysis, view)
    if form == "json":
        return json.render(analysis)
    raise UsageError("no such format", expected=", ".join(FORMATS), got=repr(form))
