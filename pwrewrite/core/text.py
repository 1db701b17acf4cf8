"""Text from models, plans and exceptions made safe to show: no control characters, no endless lines."""

from __future__ import annotations

LONGEST = 2000
"""Characters of one text that a report or a message shows at most."""

NO_WEIGHTS = "no --weights"
"""How the note of a model begins that nobody gave weights: those that its code makes."""


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
