"""Fits columns into a width: drops the least important ones, then shortens the text columns in their middle.

Widths are counted in terminal cells, of which a CJK character takes two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

HEAD_RULE = box.Box("    \n    \n ── \n    \n    \n    \n    \n    \n", ascii=False)
"""A table of nothing but a rule under its head."""


@dataclass(slots=True)
class Column:
    """A column before it is fitted.

    Attributes:
        title: Its head.
        cells: One text per row.
        right: Whether it is right-aligned, as numbers are.
        style: Rich style of its cells.
        keep: How much it matters: the lowest is dropped first; None never.
        styles: A style for each cell, over that of all.
        shrink: Narrowest width down to which its texts may be shortened; None where they may not.
    """

    title: str
    cells: Sequence[str]
    right: bool = True
    style: str = ""
    styles: Sequence[str] = ()
    keep: int | None = None
    shrink: int | None = None
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = max(cell_len(text) for text in (self.title, *self.cells))


def fit(columns: Sequence[Column], width: int) -> Table:
    """A table of those columns that fit.

    Args:
        columns: The columns, from left to right, all with as many cells.
        width: Cells there are.

    Returns:
        A table no wider than ``width``, as long as the columns that may not be dropped allow it.
    """
    chosen = list(columns)
    while True:
        gap = 2 if sum(column.width for column in chosen) + 2 * (len(chosen) - 1) <= width else 1
        if _least(chosen, gap) <= width:
            break
        droppable = [column for column in chosen if column.keep is not None]
        if not droppable:
            break
        chosen.remove(min(droppable, key=lambda column: column.keep or 0))
    _shrink(chosen, width - gap * (len(chosen) - 1))
    table = Table(box=HEAD_RULE, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0), header_style="bold")
    for column in chosen:
        table.add_column(
            Text(shorten(column.title, column.width)),
            justify="right" if column.right else "left",
            style=column.style,
            no_wrap=True,
            width=column.width,
        )
    for i in range(max((len(column.cells) for column in chosen), default=0)):
        table.add_row(*(Text(shorten(c.cells[i], c.width), style=c.styles[i] if c.styles else "") for c in chosen))
    return table


def _least(columns: Sequence[Column], gap: int) -> int:
    widths = (c.width if c.shrink is None else min(c.width, c.shrink) for c in columns)
    return sum(widths) + gap * (len(columns) - 1)


def _shrink(columns: Sequence[Column], width: int) -> None:
    """Takes what is too much from the shrinkable columns, the widest first."""
    excess = sum(column.width for column in columns) - width
    while excess > 0:
        able = [column for column in columns if column.shrink is not None and column.width > column.shrink]
        if not able:
            return
        widest = max(able, key=lambda column: column.width)
        widest.width -= 1
        excess -= 1


def plain_text(renderable: RenderableType, width: int) -> str:
    """A renderable as text: no colours, no blanks at line ends, one line break at the end."""
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False, _environ={})
    with console.capture() as captured:
        console.print(renderable, highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def shorten(text: str, width: int) -> str:
    """Cuts a text to a width in its middle; the end of a path says more than its start and keeps two thirds.

    Args:
        text: The text.
        width: Terminal cells it may take.

    Returns:
        The text itself where it fits, else ``backbone.…layer4.conv2``.
    """
    if cell_len(text) <= width:
        return text
    if width <= 1:
        return "…"[:width]
    head = set_cell_size(text, (width - 1) // 3).rstrip()
    tail = text
    while cell_len(head) + 1 + cell_len(tail) > width:
        tail = tail[1:]
    return f"{head}…{tail}"


def bar(share: float, width: int) -> str:
    """A horizontal bar of eighths of a character, empty only for nothing."""
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    full, part = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")
