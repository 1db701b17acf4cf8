"""What a report consists of, whatever its form: titles, sections, tables, facts, notes and lines.

Each subject (an analysis, a rewrite, a frontier, …) makes a `Page` once; `terminal`, `to_markdown` and `to_html`
write it. So every form has the same columns and the same words. Text in a page is as it comes: the writers spell out
control characters, escape markup and cut what is too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its head.
        cells: One text per row.
        right: Whether it is right-aligned, as numbers are.
        style: Rich style of its cells.
        styles: A style for each cell, over that of all.
        keep: How much it matters where a terminal is narrow: the lowest is dropped first; None never.
        shrink: Narrowest width down to which its texts may be shortened; None where they may not.
        long: Its head where there is room, in Markdown and HTML; `title` where empty.
        full: Its cells where there is room; `cells` where empty.
        code: Whether its cells are names in the model, which Markdown and HTML set as code.
        joined: Whether a terminal's list appends it to the column before, behind a colon.
        wrap: Whether a terminal breaks its cells into lines where they are too long.
    """

    title: str
    cells: Sequence[str]
    right: bool = True
    style: str = ""
    styles: Sequence[str] = ()
    keep: int | None = None
    shrink: int | None = None
    long: str = ""
    full: Sequence[str] = ()
    code: bool = False
    joined: bool = False
    wrap: bool = False


@dataclass(frozen=True, slots=True)
class Title:
    """What the page is about; of a tuple in ``lines``, a narrow terminal takes the second text."""

    name: str
    lines: Sequence[str | tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """The head of a part; ``verdict`` tells whether a proof is good, ``silent`` makes it a blank line in a terminal."""

    title: str
    note: str = ""
    verdict: bool | None = None
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of equal length; ``tree`` for one whose first column draws a hierarchy."""

    columns: Sequence[Column]
    tree: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """Columns without a head in a terminal, whose last one wraps."""

    columns: Sequence[Column]


@dataclass(frozen=True, slots=True)
class Facts:
    """Names, what is said of each, and a style."""

    rows: Sequence[tuple[str, str, str]]


@dataclass(frozen=True, slots=True)
class Notes:
    """What a reader should be told."""

    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text; ``hint`` for one that only helps in a terminal, such as how to read its short column heads."""

    text: str
    style: str = ""
    hint: bool = False


Block = Title | Section | Table | Listing | Facts | Notes | Line
Page = tuple[Block, ...]


def notes_part(notes: Sequence[str]) -> list[Block]:
    """The notes at the end of a page, set apart; nothing where there are none."""
    return [Line(""), Notes(notes)] if notes else []
