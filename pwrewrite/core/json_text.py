"""JSON files that people edit: read strictly, written readably, and with the line that a complaint is about."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator

from .errors import PlanError, shortened
from .records import Json


def line_at(text: str, offset: int) -> int:
    """The number of the line that an offset is in, from 1."""
    return text.count("\n", 0, offset) + 1


def loads(text: str, name: str) -> Json:
    """The data of a file that a person may have edited: JSON whose numbers fit in 64 bits, else a `PlanError`."""

    def number(written: str) -> int | float:
        value = float(written) if any(c in written for c in ".eENI") or len(written) > 20 else int(written)
        if abs(value) < 2**63:  # which NaN is not, either
            return value
        where = f"{name}, line {line_at(text, max(text.find(written), 0))}"
        raise PlanError(f"{name} holds a number that is none or too large", where=where, got=shortened(written, 40))

    try:
        return json.loads(text, parse_int=number, parse_float=number, parse_constant=number)
    except json.JSONDecodeError as error:
        where = f"{name}, line {error.lineno}, column {error.colno}"
        hint = "a comma after the last entry or a missing quote is the usual cause"
        raise PlanError(f"{name} is not JSON: {error.msg}", where=where, hint=hint) from None
    except RecursionError:
        expected = "objects and lists a few levels deep"
        raise PlanError(f"{name} is nested too deeply for a plan", expected=expected) from None


_SHORT_LISTS = (re.compile(r"\[\n([^][{}\"]*?)\n *\]"), re.compile(r"\[\n((?:[^][{}\"]|\[[^][{}\"\n]*\])*?)\n *\]"))
"""A list of numbers over several lines, and a list of those that are in one line already. Text has no line breaks."""


def dumps(data: object) -> str:
    """JSON text with one setting a line; lists of numbers stay in it."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    for pattern in _SHORT_LISTS:
        text = pattern.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    return text + "\n"


class JsonText:
    """A text that is known to be JSON, and where in it things stand; errors call it ``name``."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name

    def _values(self, at: int) -> Iterator[tuple[Json, int, int]]:
        """What the list or object at an offset holds, keys included, and where each of them starts and ends."""
        decoder = json.JSONDecoder()
        at += 1
        while self.text[at] not in "]}":
            if self.text[at] in " \t\r\n,:":
                at += 1
            else:
                start = at
                value, at = decoder.raw_decode(self.text, start)
                yield value, start, at

    def entries(self, key: str) -> list[tuple[int, int]]:
        """Start and end offsets of the entries of one of the plan's lists."""
        at = self.value_of(key)
        return [(start, end) for _, start, end in self._values(at)] if at >= 0 else []

    def value_of(self, wanted: str) -> int:
        """Offset of a value of the outermost object; -1 where it has no such key."""
        values = [*self._values(self.text.index("{"))]
        starts = [start for (key, *_), (_, start, _) in zip(values[::2], values[1::2]) if key == wanted]
        return starts[-1] if starts else -1  # the last one counts, as it does for json.loads

    def find(self, what: str, start: int = 0, end: int | None = None) -> int:
        """Offset of a piece of text, or where the search began."""
        return max(self.text.find(what, start, end), start)

    def error(self, message: str, at: int, expected: str, got: object) -> PlanError:
        """The error for what stands at an offset."""
        where = f"{self.name}, line {line_at(self.text, at)}"
        return PlanError(message, where=where, expected=expected, got=shortened(reprlib.repr(got), 120))
