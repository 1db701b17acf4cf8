"""One fallback for everything that is printed: where a stream's encoding lacks a character, ASCII stands in for it.

The command's help, reports and errors hold characters such as × and →. A terminal or pipe in cp1252 or ASCII cannot
show all of them; instead of failing there, each that is lacking is replaced. What programs read (JSON, CSV, Markdown)
is UTF-8 in any case.
"""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

FALLBACK = "pwrewrite.plain"
"""The name of the fallback, as the ``errors`` of a stream."""

_PLAIN = {
    "×": "x", "·": "|", "…": "...", "→": "->", "←": "<-", "–": "-", "—": "-", "−": "-", "≤": "<=", "≥": ">=", "≈": "~",
    "✓": "+", "✗": "x", "‖": "||", "∞": "inf", "√": "sqrt", "µ": "u", "’": "'", "‘": "'", "“": '"', "”": '"', "•": "*",
    "█": "#", "▏": "|", "▎": "|", "▍": "|", "▌": "|", "▋": "#", "▊": "#", "▉": "#",
    "\N{COMBINING CIRCUMFLEX ACCENT}": "^",
}  # fmt: skip


def plain(text: str) -> str:
    """ASCII in the place of characters."""
    return "".join(map(_plain, text))


def _plain(character: str) -> str:
    if character in _PLAIN:
        return _PLAIN[character]
    name = unicodedata.name(character, "")
    if name.startswith("BOX DRAWINGS"):
        return "+" if " AND " in name else "-" if "HORIZONTAL" in name else "|"
    if name.startswith("BRAILLE"):
        return "*"
    decomposed = unicodedata.normalize("NFKD", character).replace("\N{FRACTION SLASH}", "/")
    decomposed = decomposed.encode("ascii", "ignore").decode()
    return decomposed or f"\\u{ord(character):04x}"


def _fall_back(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end


codecs.register_error(FALLBACK, _fall_back)


def fit_streams() -> None:
    """Makes stdout and stderr take any text, whatever their encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=FALLBACK)
