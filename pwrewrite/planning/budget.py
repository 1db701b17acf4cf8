"""What a rewritten model may cost: a limit on MACs, parameters, bytes or latency.

A limit is a ratio of the original (``macs=0.5``, ``macs=50%``) or absolute (``params=12M``, ``bytes=40MiB``,
``latency=8ms``). A bare number up to 1 is a ratio, a whole one above it a count; a latency above 1 needs its unit.
Counts scale by 1000 (k, M, G or B, T, P), bytes by 1000 or 1024 as their unit says. ``flops`` is ``macs``, at two
operations each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Literal, cast

from ..core.errors import UsageError
from ..core.numbers import BYTES, COUNTS, amount
from ..core.text import did_you_mean

Kind = Literal["macs", "params", "bytes", "latency"]

_SECONDS = {"s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6"), "ns": Decimal("1e-9")}
_UNITS: Mapping[str, Mapping[str, int | Decimal]] = {
    **dict.fromkeys(("macs", "flops", "params"), COUNTS),
    "bytes": BYTES,
    "latency": _SECONDS,
}
_SHOWN = {"bytes": ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "kB", "B"), "latency": ("s", "ms", "us")}
_SHOWN_COUNTS = ("P", "T", "G", "M", "k", "")
"""Units in which a limit is shown: the first in which it is at least 1 and has at most four digits, else the last."""
_TAKES = {
    "macs": "a ratio such as 0.5 or 50%, or a count such as 2.1G",
    "flops": "a ratio such as 0.5 or 50%, or a count such as 4.2G",
    "params": "a ratio such as 0.5 or 50%, or a count such as 12M",
    "bytes": "a ratio such as 0.5 or 50%, or a size such as 40MiB or 40MB",
    "latency": "a ratio such as 0.6 or 60%, or a time such as 8ms",
}
_LEAST_COUNT = 1000
"""A float above 1 is a count only from here on, and when it is whole; 1.5 and 2.0 are ratios gone wrong."""


@dataclass(frozen=True)
class Limit:
    """One limit; as text it is what `budgets_of` reads.

    Attributes:
        kind: What is limited.
        limit: A ratio of the original in (0, 1], or the most there may be: a count, bytes, or seconds.
        relative: Whether it is a ratio.
    """

    kind: Kind
    limit: float
    relative: bool

    def absolute(self, original: float) -> float:
        """The most there may be where the original costs so much, in its unit."""
        return self.limit * original if self.relative else self.limit

    def __str__(self) -> str:
        if self.relative:
            return f"{self.kind}={repr(self.limit).removesuffix('.0')}"
        value = Decimal(repr(self.limit)) if self.kind == "latency" else Decimal(int(self.limit))
        units = _SHOWN.get(self.kind, _SHOWN_COUNTS)
        scaled = {unit: (value / _UNITS[self.kind][unit.lower()]).normalize() for unit in units}
        short = (unit for unit, number in scaled.items() if number >= 1 and len(number.as_tuple().digits) <= 4)
        unit = next(short, units[-1])
        return f"{self.kind}={scaled[unit]:f}{unit}"


def budgets_of(limits: object) -> tuple[Limit, ...]:
    """Limits as Python or a person gives them.

    Args:
        limits: Kind to limit, where a float in (0, 1] is a ratio, an integer above 1 absolute, a string any of them
            with its unit: ``{"macs": 0.5, "params": 12_000_000, "latency": "8ms"}``. Or texts ``KIND=LIMIT``
            (``macs=50%``, ``flops=8G``, ``bytes=40MiB``), or limits, or a single number or text, which limits the MACs.

    Returns:
        The limits, in order.

    Raises:
        UsageError: A text is malformed, a kind or unit unknown, a ratio not in (0, 1], a kind given twice, or a limit
            neither a number nor a string.
    """
    pairs: list[tuple[str, object]] = []
    if isinstance(limits, Mapping):
        pairs = [(str(kind), value) for kind, value in limits.items()]
    elif not isinstance(limits, Sequence):
        pairs = [("macs", limits)]
    else:
        texts = [limits if "=" in limits else f"macs={limits}"] if isinstance(limits, str) else limits
        known = [limit for limit in texts if isinstance(limit, Limit)]
        if len(known) == len(texts):
            return tuple(known)
        pairs = [_pair(str(text)) for text in texts]
    budgets: dict[str, Limit] = {}
    for kind, value in pairs:
        budget = _budget(kind, value)
        if budget.kind in budgets:
            also = " (flops are macs, at two each)" if "flops" in (k.lower() for k, _ in pairs) else ""
            raise UsageError(f"the budget limits {budget.kind} more than once{also}", hint="give the tighter one")
        budgets[budget.kind] = budget
    return tuple(budgets.values())


def _pair(text: str) -> tuple[str, str]:
    kind, equals, value = text.partition("=")
    if not equals:
        hint = "macs=0.5, params=12M or latency=8ms"
        raise UsageError(f"cannot read the budget {text!r}", expected="KIND=LIMIT", hint=hint)
    return kind.strip(), value.strip()


def _budget(kind: str, value: object) -> Limit:
    name = kind.lower()
    if name not in _UNITS:
        hint = did_you_mean(_UNITS, name)
        raise UsageError(f"no budget of the kind {kind!r}", expected=", ".join(_UNITS), hint=hint)
    number, relative = _read(name, value) if isinstance(value, str) else _take(name, value, value)
    if not relative and name == "flops":
        number /= 2
    if not relative and name != "latency":
        number = number.to_integral_value(rounding="ROUND_FLOOR")
    if not relative and number <= 0:
        raise _refusal("the budget {} leaves nothing", name, value)
    return Limit(cast(Kind, "macs" if name == "flops" else name), float(number), relative)


def _refusal(message: str, name: str, value: object, hint: str | None = None) -> UsageError:
    """The error for one budget, with what its kind takes."""
    got = repr(value) if isinstance(value, str) else str(value)
    return UsageError(message.format(f"{name}={value}"), expected=_TAKES[name], got=got, hint=hint)


def _read(name: str, text: str) -> tuple[Decimal, bool]:
    """A limit in text, and whether it is a ratio."""
    number, unit = amount(text) or (None, "")
    if number is None:
        parts = [part.strip() for part in f"{name}={text}".split(",")]
        several = len(parts) > 1 and all("=" in part for part in parts)
        hint = f"give each limit by itself: {' and '.join(parts)}" if several else None
        raise _refusal("the budget {} is not a number", name, text, hint)
    if unit == "%":
        return _ratio(name, number / 100, text), True
    if not unit:
        return _take(name, float(number) if number.as_tuple().exponent else int(number), text)
    plain = unit.lower().replace("µ", "u").replace("μ", "u")
    if plain not in _UNITS[name]:
        of = [kind for kind, units in _UNITS.items() if plain in units]
        hint = f"{unit} is a unit of {' and '.join(of)}" if of else None
        raise _refusal(f"the budget {{}} has an unknown unit {unit!r}", name, text, hint)
    if number <= 0:
        raise _refusal("the budget {} is not above 0", name, text)
    return number * _UNITS[name][plain], False


def _take(name: str, value: object, shown: object) -> tuple[Decimal, bool]:
    """A limit that is a bare number, and whether it is a ratio."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refusal("the budget {} is neither a number nor text", name, shown)
    if not math.isfinite(value):
        raise _refusal("the budget {} is not finite", name, shown)
    number = Decimal(int(value)) if isinstance(value, Integral) else Decimal(repr(float(value)))
    whole = isinstance(value, Integral) or (number == int(number) and number >= _LEAST_COUNT)
    if number <= 1 or not whole:
        hint = f"latency={shown}ms, if that is a time" if name == "latency" and number > 1 else None
        return _ratio(name, number, shown, hint), True
    if name == "latency":
        raise _refusal("the budget {} has no unit", name, shown, f"{name}={shown}ms")
    return number, False


def _ratio(name: str, number: Decimal, shown: object, hint: str | None = None) -> Decimal:
    if number > 1:
        raise _refusal("the budget {} is a ratio above 1: more than the original", name, shown, hint)
    if number <= 0:
        raise _refusal("the budget {} is not above 0", name, shown)
    return number
