"""A page for a terminal, in colour and fitted to a width, or as plain text.

Made for 100 columns: in narrower ones the least important columns are dropped, then texts are shortened in their
middle. Widths are counted in terminal cells, of which a CJK character takes two. Nothing from a model is read as rich
markup.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from ..core.text import plain
from .page import Block, Column, Facts, Line, Listing, Notes, Page, Section, Table, Title

WIDTH = 100
"""Columns of a terminal that is none, such as a pipe or a file."""

_HEAD_RULE = box.Box("    \n    \n ── \n    \n    \n    \n    \n    \n", ascii=False)


def renderable(page: Page, width: int = WIDTH) -> RenderableType:
    """The page for a rich console of ``width`` cells."""
    blocks: list[Block] = []
    for block in page:
        if isinstance(block, Notes) and blocks and isinstance(blocks[-1], Facts):  # in line with them
            blocks[-1] = Facts((*blocks[-1].rows, *_noted(block)))
        else:
            blocks.append(block)
    return Group(*(_block(block, width) for block in blocks))


def text(page: Page, width: int = WIDTH) -> str:
    """The page without colours: no blanks at line ends, one line break at the end."""
    console = Console(
        file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False, _environ={}
    )
    with console.capture() as captured:
        console.print(renderable(page, width), highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _block(block: Block, width: int) -> RenderableType:
    match block:
        case Title(name, lines):
            title = Text(shorten(plain(name), width), style="bold")
            for line in lines:
                long, short = (line, line) if isinstance(line, str) else line
                line = plain(long if cell_len(plain(long)) <= width else short)
                title.append(f"\n{line}", style="not bold")
            return title
        case Section(silent=True):
            return Text()
        case Section(name, note, verdict):
            style = "" if verdict is None else "green" if verdict else "bold red"
            return Text("\n").append(name, style="bold").append(f"  {plain(note)}" if note else "", style=style)
        case Table(columns):
            return fit(columns, width)
        case Listing(columns):
            return _listing(columns, width)
        case Facts(rows):
            return _grid([(Text(plain(name), "bold"), Text(plain(fact), style)) for name, fact, style in rows])
        case Notes():
            return _block(Facts(_noted(block)), width)
        case Line(line, style):
            return Text(plain(line), style=style)


def _noted(notes: Notes) -> list[tuple[str, str, str]]:
    return [("" if i else "notes", note, "") for i, note in enumerate(notes.notes)]


def _grid(rows: Sequence[Sequence[Text]], rights: Sequence[bool] = ()) -> RichTable:
    """Cells side by side, the last of a row wrapped."""
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    for i in range(len(rows[0]) if rows else 0):
        right, last = bool(rights) and rights[i], i == len(rows[0]) - 1
        grid.add_column(justify="right" if right else "left", no_wrap=not last, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def _listing(columns: Sequence[Column], width: int) -> RichTable:
    rows: list[list[Text]] = [[] for _ in columns[0].cells]
    for column in columns:
        for i, cell in enumerate(column.cells):
            shown = plain(cell) if column.shrink is None else shorten(plain(cell), max(column.shrink, width // 3))
            style = column.styles[i] if column.styles else column.style
            if column.joined:
                rows[i][-1].append(f": {shown}", style="not bold default")
            else:
                rows[i].append(Text(shown, style=style))
    return _grid(rows, [column.right for column in columns if not column.joined])


def fit(columns: Sequence[Column], width: int) -> RichTable:
    """A table of the columns that fit into ``width`` cells, as long as those that may not be dropped allow it."""
    cells = {id(c): [plain(cell) for cell in c.cells] for c in columns}
    widths = {id(c): max(cell_len(cell) for cell in (c.title, *cells[id(c)])) for c in columns}
    chosen = list(columns)
    while True:
        gap = 2 if sum(widths[id(c)] for c in chosen) + 2 * (len(chosen) - 1) <= width else 1
        least = sum(min(widths[id(c)], c.shrink or widths[id(c)]) for c in chosen) + gap * (len(chosen) - 1)
        droppable = [column for column in chosen if column.keep is not None]
        if least <= width or not droppable:
            break
        chosen.remove(min(droppable, key=lambda column: column.keep or 0))
    excess = sum(widths[id(c)] for c in chosen) + gap * (len(chosen) - 1) - width
    while excess > 0 and (able := [c for c in chosen if c.shrink is not None and widths[id(c)] > c.shrink]):
        widths[id(max(able, key=lambda c: widths[id(c)]))] -= 1  # the widest first
        excess -= 1
    shown = {
        i: texts if c.wrap else [shorten(t, widths[i]) for t in texts]
        for c in chosen
        for i, texts in [(id(c), cells[id(c)])]
    }
    table = RichTable(box=_HEAD_RULE, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0), header_style="bold")
    for column in chosen:
        table.add_column(
            Text(shorten(column.title, widths[id(column)])),
            justify="right" if column.right else "left",
            style=column.style,
            no_wrap=not column.wrap,
            overflow="fold",
            width=widths[id(column)],
        )
    for i in range(max((len(column.cells) for column in chosen), default=0)):
        table.add_row(*(Text(shown[id(c)][i], style=c.styles[i] if c.styles else "") for c in chosen))
    return table


def shorten(text: str, width: int) -> str:
    """Cuts a text to ``width`` cells in its middle; its end keeps two thirds: ``backbone.…layer4.conv2``."""
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
