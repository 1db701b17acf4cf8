"""Numbers as people read and type them: the one place where an integer is scaled.

Counts scale by 1000 (``4.09 G``), bytes by 1024 (``97.5 MiB``), both to three significant digits; JSON and CSV hold the
integers. Reading (``4.1G``, ``1%``, ``width=32``) is the reverse, exact for counts.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

from .errors import UsageError

COUNTS = {"": 1, "b": 10**9, **{prefix: 1000**n for n, prefix in enumerate("kmgtp", 1)}}
BYTES = {"": 1, "b": 1, **{p + unit: 1000**n for n, p in enumerate("kmgt", 1) for unit in ("", "b")}}
BYTES |= {p + unit: 1024**n for n, p in enumerate("kmgt", 1) for unit in ("i", "ib")}
"""What the units of counts and of bytes, in lower case, scale by."""


def _scaled(value: int, base: int, units: Sequence[str]) -> str:
    """Three significant digits and a unit; below ``base`` the integer itself."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    if size < base:
        return f"{sign}{size} {units[0]}".rstrip()
    power, scaled = 0, float(size)
    # 999.5 and more would round to 1000: it belongs to the next unit, where it reads 1.00 (or, of bytes, 0.98).
    while scaled >= min(base, 999.5) and power < len(units) - 1:
        scaled /= base
        power += 1
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{sign}{scaled:.{digits}f} {units[power]}"


def count(value: int) -> str:
    """A count to three digits: ``0``, ``999``, ``25.6 M``, ``4.09 G``."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E"))


def size(nbytes: int) -> str:
    """Bytes to three digits, by 1024: ``512 B``, ``97.5 MiB``."""
    return _scaled(nbytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))


def percent(share: float) -> str:
    """A share of 1 with one place: ``5.7%``; what is more than nothing never reads ``0.0%``."""
    return "<0.1%" if 0 < share < 0.0005 else "99.9%" if 0.9995 <= share < 1 else f"{100 * share:.1f}%"


def duration(seconds: float) -> str:
    """A time to three digits: ``14.2 µs``, ``1.60 ms``, ``2.00 s``."""
    return _scaled(round(seconds * 1e9), 1000, ("ns", "µs", "ms", "s", "ks"))


def exact(value: int) -> str:
    """An integer with its digits grouped: ``4,089,184,256``."""
    return f"{value:,}"


def dims(shape: Sequence[int]) -> str:
    """A shape: ``1×3×224×224``; of no dim, ``scalar``."""
    return "×".join(str(n) for n in shape) or "scalar"


def plural(n: int, noun: str, nouns: str = "") -> str:
    """``1 layer``, ``2 layers``; ``nouns`` where the plural is another than with an s."""
    return f"{exact(n)} {noun}" if n == 1 else f"{exact(n)} {nouns or noun + 's'}"


def amount(text: str) -> tuple[Decimal, str] | None:
    """A number as a person types it (``4.1G``, ``25e6``, ``25,557,032``) and its unit as it stands; None for none."""
    number = r"[+-]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:e[+-]?\d{1,2})?"
    match = re.fullmatch(rf"(?i)({number})\s*(%|[^\W\d]*)", text.strip())
    return (Decimal(match[1].replace(",", "").replace("_", "")), match[2]) if match else None


def _parse_whole(text: str, message: str, expected: str, units: Mapping[str, int]) -> int:
    number, unit = amount(text) or (Decimal(-1), "")
    if number < 0 or unit.lower() not in units:
        raise UsageError(message, expected=expected, got=repr(text))
    return int(number * units[unit.lower()])


def parse_count(text: str, what: str = "count") -> int:
    """Reads ``4.1G``, ``25e6`` or ``25,557,032``, rounded down; a `UsageError` says ``what`` is wrong, as all here."""
    return _parse_whole(text, f"{what} is not a number", "a count such as 4.1G, 25M, 500k or 25557032", COUNTS)


def parse_size(text: str, what: str = "size") -> int:
    """Reads bytes: ``20MB``, ``20MiB``, ``512 KiB`` or ``1048576``.

    >>> parse_size("20MB"), parse_size("1KiB")
    (20000000, 1024)
    """
    return _parse_whole(text, f"{what} is no size", "bytes such as 20MB, 20MiB or 1048576", BYTES)


def ratio(text: str) -> float:
    """Reads ``0.5`` or ``50%``; a `ValueError` if it is neither.

    >>> ratio("50%"), ratio("0.5")
    (0.5, 0.5)
    """
    number = text.strip()
    return float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)


def _from_zero(text: str) -> float:
    """A ratio from 0; NaN for anything else."""
    try:
        value = ratio(text)
    except ValueError:
        return math.nan
    return value if 0 <= value < math.inf else math.nan


def parse_share(text: str, what: str = "share") -> float:
    """Reads ``1%`` or ``0.01``; a `UsageError` if it is not between 0 and 1.

    >>> parse_share("1%")
    0.01
    """
    expected = "a part of the whole such as 1% or 0.01"
    if not re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*%?", text.strip()):
        raise UsageError(f"{what} is not a share", expected=expected, got=repr(text))
    share = ratio(text)
    if share > 1:
        hint = None if share > 100 or "%" in text else f"write {text.strip()}%"
        raise UsageError(f"{what} is more than the whole", expected=expected, got=repr(text), hint=hint)
    return share


def parse_error(text: str, what: str = "error") -> float:
    """Reads ``0.1`` or ``10%``; unlike a share it may be above 1. A `UsageError` if it is no number from 0."""
    value = _from_zero(text)
    if math.isnan(value):
        raise UsageError(f"{what} makes no sense", expected="a number from 0 such as 0.1 or 10%", got=repr(text))
    return value


def parse_width(text: str, what: str = "width") -> int | float:
    """Reads ``32`` as a width and ``0.5`` or ``50%`` as a ratio; a `UsageError` if it is neither, or out of range."""
    expected = "a width from 1 such as 32, or a ratio above 0 and up to 1 such as 0.5 or 50%"
    whole = re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip())
    value = int(text) if whole else _from_zero(text)
    if math.isnan(value):
        raise UsageError(f"{what} is neither a width nor a ratio", expected=expected, got=repr(text))
    if not (value >= 1 if whole else 0 < value <= 1):
        raise UsageError(f"{what} is out of range", expected=expected, got=repr(text))
    return value


def parse_arg(text: str, what: str = "--arg") -> tuple[str, object]:
    """Parses one ``--arg name=value`` to ``("num_classes", 10)``: a Python literal, or a bare word (``act=relu``)."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name.isidentifier():
        hint = "--arg num_classes=10, --arg layers=[3,4,6,3], --arg act=relu"
        expected = "NAME=VALUE, the value a Python literal"
        raise UsageError(f"cannot read {what} {text!r}", expected=expected, hint=hint)
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        if re.fullmatch(r"[^\W\d][\w.:/+-]*", value):
            return name, value
        expected = "a Python literal (10, 0.5, True, None, 'text', [1, 2], (3, 4), {'a': 1}) or a bare word"
        got = value or "nothing"
        raise UsageError(f"cannot read the value of {what} {text!r}", expected=expected, got=got) from error


def parse_increase(text: str, what: str = "--max-increase") -> tuple[str, float]:
    """Reads by how much a cost may grow, ``KIND=SHARE``.

    >>> parse_increase("macs=2%")
    ('macs', 0.02)
    """
    kind, _, share = text.partition("=")
    value = _from_zero(share)
    if kind not in ("params", "macs", "weights", "peak-memory") or math.isnan(value):
        expected = "params, macs, weights or peak-memory, and a share: macs=2%"
        raise UsageError(f"{what} makes no sense", expected=expected, got=repr(text))
    return kind, value


class Time(NamedTuple):
    """A time to train for: passes through the inputs, or seconds."""

    text: str
    epochs: float | None
    seconds: float | None

    def __str__(self) -> str:
        return self.text


def parse_time(text: str, what: str = "time") -> Time:
    """Reads ``5m``, ``90s``, ``1.5h`` or ``3epochs``; a `UsageError` if it is none of them, or 0.

    >>> parse_time("5m").seconds, parse_time("3 epochs").epochs
    (300.0, 3.0)
    """
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*(s|m|min|h|epochs?)", str(text).strip().lower())
    number = float(match[1]) if match else 0.0
    if match is None or not 0 < number < 1e9:
        expected = "minutes, seconds, hours or epochs, such as 5m, 90s, 1h or 3epochs"
        raise UsageError(f"{what} is no time to train for", expected=expected, got=repr(text))
    if match[2].startswith("epoch"):
        return Time(text.strip(), number, None)
    return Time(text.strip(), None, number * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2]])
