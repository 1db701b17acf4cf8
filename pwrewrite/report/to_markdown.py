"""A page as GitHub-flavoured Markdown, for an issue, a pull request or a wiki.

Names in a model stand in code spans and everything else is escaped, so that no path turns into markup.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..core.text import plain
from . import terminal
from .page import Block, Column, Facts, Line, Listing, Notes, Page, Section, Table, Title


def markdown(page: Page) -> str:
    """The page, with every column and every cell in full."""
    return "\n\n".join(filter(None, map(_block, page))) + "\n"


def _block(block: Block) -> str:
    match block:
        case Title(name, lines):
            texts = [line if isinstance(line, str) else line[0] for line in lines]
            return f"# {code(name)}\n\n" + ("  \n".join(map(escape, texts)) if len(texts) > 1 else sentence(*texts))
        case Section(title, note, verdict):
            if verdict is not None:
                return f"## {title}\n\n{'✓' if verdict else '✗'} **{escape(note)}**"
            return f"## {title}\n\n{sentence(note)}" if note else f"## {title}"
        case Table(columns, tree):
            return _fenced(terminal.text((block,))) if tree else pipe_table(columns)
        case Listing(columns):
            return pipe_table(columns)
        case Facts(rows):
            return "\n".join(f"- {escape(name[:1].upper() + name[1:])}: {escape(fact)}" for name, fact, _ in rows)
        case Notes(notes):
            return "\n".join(["## Notes", "", *(f"- {escape(note)}" for note in notes)])
        case Line(line, _, hint):
            return "" if hint else escape(line)


def pipe_table(columns: Sequence[Column]) -> str:
    """Columns as a pipe table."""
    shown = [column for i, column in enumerate(columns) if column.title or not i]  # bars are for terminals
    cells = [[code(cell) if c.code else escape(cell) for cell in c.full or c.cells] for c in shown]
    body = [[re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row] for row in zip(*cells, strict=True)]
    rules = ["--:" if column.right else ":--" for column in shown]
    return "\n".join(f"| {' | '.join(row)} |" for row in ([c.long or c.title for c in shown], rules, *body))


def sentence(text: str) -> str:
    """An escaped text as a sentence."""
    escaped = escape(text)
    return f"{escaped[:1].upper()}{escaped[1:]}" + ("" if escaped.endswith((".", "!", "?")) else ".")


def code(text: str) -> str:
    """A code span, fenced by more backticks than the text has in a row."""
    shown = plain(text)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"


def escape(text: str) -> str:
    """A text in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]>|#~]|<(?![-+]?\d))", r"\\\1", plain(text))
