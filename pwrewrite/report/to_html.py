"""A page as an HTML fragment for notebooks: every text escaped, styled only by what light and dark themes share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape as escape_html

from ..core.text import plain
from .page import Block, Column, Facts, Line, Listing, Notes, Page, Section, Table, Title

_GOOD, _BAD = "color:#2e8b57", "color:#c0392b;font-weight:bold"


def html(page: Page) -> str:
    """The page, with every column and every cell in full."""
    return f"<div style='line-height:1.4'>{''.join(map(_block, page))}</div>"


def _block(block: Block) -> str:
    match block:
        case Title(name, lines):
            texts = "<br>".join(escape(line if isinstance(line, str) else line[0]) for line in lines)
            return f"<p><b>{escape(name)}</b><br>{texts}</p>"
        case Section(title, note, verdict):
            style = "" if verdict is None else _GOOD if verdict else _BAD
            return f"<p><b>{escape(title)}</b> <span style='{style}'>{escape(note)}</span></p>"
        case Table(columns) | Listing(columns):
            return _table(columns)
        case Facts(rows):
            return _rows([(f"<b>{escape(name)}</b>", escape(fact)) for name, fact, _ in rows])
        case Notes(notes):
            return _rows([("<b>notes</b>" if not i else "", escape(note)) for i, note in enumerate(notes)])
        case Line(line, _, hint):
            return f"<p>{escape(line)}</p>" if line and not hint else ""


def _table(columns: Sequence[Column]) -> str:
    shown = [column for i, column in enumerate(columns) if column.title or not i]  # bars are for terminals
    sides = ["right" if column.right else "left" for column in shown]
    head = "".join(f"<th align={side}>{escape(c.long or c.title)}</th>" for c, side in zip(shown, sides))
    tag = ["code" if column.code else "span" for column in shown]
    cells = [[f"<{t}>{escape(cell)}</{t}>" for cell in c.full or c.cells] for c, t in zip(shown, tag)]
    return _rows(zip(*cells, strict=True), f"<tr>{head}</tr>" if any(c.title for c in shown) else "", sides)


def _rows(rows: Iterable[Sequence[str]], head: str = "", sides: Sequence[str] = ("left", "left")) -> str:
    body = "".join(
        "<tr>" + "".join(f"<td align={side} valign=top>{cell}</td>" for cell, side in zip(row, sides)) + "</tr>"
        for row in rows
    )
    return f"<table>{head}{body}</table>"


def escape(text: str) -> str:
    """A text in which nothing is markup; blanks that draw a tree stay."""
    shown = escape_html(plain(text))
    return shown.replace("  ", "&nbsp; ") if "  " in shown else shown
