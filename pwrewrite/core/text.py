"""Text from models, plans and exceptions made safe to show: no control characters, no endless lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

LONGEST = 2000
"""Characters of one text that a report or a message shows at most."""

NO_WEIGHTS = "no --weights"
"""How the note of a model begins that nobody gave weights: those that its code makes."""


def nearest(name: str, known: Iterable[str], n: int = 1) -> list[str]:
    """The known names most like a given one, compared without case, best first; none if none is near."""
    by_lower = {k.lower(): k for k in known}
    return [by_lower[k] for k in get_close_matches(name.lower(), by_lower, n=n)]


def did_you_mean(known: Iterable[str], *names: str, n: int = 1) -> str | None:
    """The hint that offers, for each of the names, the ``n`` known ones most like it; None without any."""
    near = [match for name in names for match in nearest(name, known, n)]
    return f"did you mean {', '.join(near)}?" if near else None


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are: ``a, b, c and 2 more``."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def plain(text: str, *, lines: bool = False) -> str:
    """A text whose control characters (escape sequences, marks that reverse the direction of writing, line breaks
    unless ``lines``) are spelt out, and whose middle is left out where it is longer than `LONGEST`.
    """
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} … {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c in "\n\t") else repr(c)[1:-1] for c in text)
