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

_SECONDS = {
    unit: Decimal(1).scaleb(power) for unit, power in (("s", 0), ("ms", -3), ("us", -6), ("µs", -6), ("ns", -9))
}
_UNITS: dict[str, Mapping[str, int | Decimal]] = {
    "macs": COUNTS,
    "flops": COUNTS,
    "params": COUNTS,
    "bytes": BYTES,
    "latency": _SECONDS,
}
_SHOWN: dict[str, str] = {
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
    """One limit.

    Attributes:
        kind: What is limited.
        limit: A ratio of the original in (0, 1], or the most there may be: a count, bytes, or seconds.
        relative: Whether it is a ratio.
    """

    kind: Kind
    limit: float
    relative: bool

    def absolute(self, original: float) -> float:
        """The most there may be.

        Args:
            original: What the original costs.

        Returns:
            The limit in the unit of ``original``; more than that where the budget is.
        """
        return self.limit * original if self.relative else self.limit

    def __str__(self) -> str:
        return f"{self.kind}={repr(self.limit).removesuffix('.0') if self.relative else self._amount()}"

    def _amount(self) -> str:
        """An absolute limit as `parse_budget` reads it."""
        if self.kind == "latency":
            return _in_units(Decimal(repr(self.limit)), [("s", _SECONDS["s"]), ("ms", _SECONDS["ms"])], "us", _SECONDS)
        whole = Decimal(int(self.limit))
        if self.kind == "bytes":
            units = [(f"{p}iB", Decimal(1024**n)) for n, p in ((4, "T"), (3, "G"), (2, "M"), (1, "K"))]
            units += [(f"{p}B", Decimal(1000**n)) for n, p in ((4, "T"), (3, "G"), (2, "M"), (1, "k"))]
            return _in_units(whole, units, "B", {"B": Decimal(1)})
        units = [(p, Decimal(1000**n)) for n, p in ((5, "P"), (4, "T"), (3, "G"), (2, "M"), (1, "k"))]
        return _in_units(whole, units, "", {"": Decimal(1)})


def _in_units(
    value: Decimal, units: Sequence[tuple[str, Decimal]], last: str, scales: Mapping[str, int | Decimal]
) -> str:
    """A value in the first unit in which it has at least 1 and at most four digits, else in the last."""
    for unit, scale in units:
        scaled = (value / scale).normalize()
        if scaled >= 1 and len(scaled.as_tuple().digits) <= 4:
            return f"{scaled:f}{unit}"
    return f"{(value / scales[last]).normalize():f}{last}"


def parse_budget(texts: Sequence[str]) -> tuple[Limit, ...]:
    """Reads budgets as a person types them.

    Args:
        texts: ``KIND=LIMIT``, each: ``macs=0.5``, ``macs=50%``, ``params=12M``, ``flops=8G``, ``bytes=40MiB``,
            ``latency=8ms``.

    Returns:
        The budgets, in order.

    Raises:
        UsageError: A text is malformed, a kind or unit unknown, a ratio not in (0, 1], or a kind given twice.
    """
    pairs: list[tuple[str, object]] = []
    for text in texts:
        kind, equals, value = text.partition("=")
        if not equals:
            raise UsageError(
                f"cannot read the budget {text!r}", expected="KIND=LIMIT", hint="macs=0.5, params=12M or latency=8ms"
            )
        pairs.append((kind.strip(), value.strip()))
    return _unique(pairs)


def budgets_of(limits: object) -> tuple[Limit, ...]:
    """Limits as Python gives them.

    Args:
        limits: Kind to limit, where a float in (0, 1] is a ratio, an integer above 1 absolute, a string as in
            `parse_budget`: ``{"macs": 0.5, "params": 12_000_000, "latency": "8ms"}``. Or such texts as `parse_budget`
            reads, or limits, or a single number or text, which limits the MACs.

    Returns:
        The limits, in order.

    Raises:
        UsageError: As in `parse_budget`, or a limit that is neither a number nor a string.
    """
    if isinstance(limits, Mapping):
        return _unique([(str(kind), value) for kind, value in limits.items()])
    if isinstance(limits, str):
        return parse_budget([limits if "=" in limits else f"macs={limits}"])
    if isinstance(limits, Sequence):
        known = [limit for limit in limits if isinstance(limit, Limit)]
        return tuple(known) if len(known) == len(limits) else parse_budget([str(text) for text in limits])
    return _unique([("macs", limits)])


def _unique(pairs: Sequence[tuple[str, object]]) -> tuple[Limit, ...]:
    """Budgets of kinds and limits, no kind twice."""
    budgets: list[Limit] = []
    for kind, value in pairs:
        budget = _budget(kind, value)
        if any(other.kind == budget.kind for other in budgets):
            also = " (flops are macs, at two each)" if "flops" in (k.lower() for k, _ in pairs) else ""
            raise UsageError(f"the budget limits {budget.kind} more than once{also}", hint="give the tighter one")
        budgets.append(budget)
    return tuple(budgets)


def _budget(kind: str, value: object) -> Limit:
    """One budget of a kind and a limit."""
    name = kind.lower()
    if name not in _UNITS:
        hint = did_you_mean(_UNITS, name)
        raise UsageError(f"no budget of the kind {kind!r}", expected=", ".join(_UNITS), hint=hint)
    number, relative = _read(name, value) if isinstance(value, str) else _take(name, value)
    if not relative and name == "flops":
        number /= 2
    if not relative and name != "latency":
        number = number.to_integral_value(rounding="ROUND_FLOOR")
    if not relative and number <= 0:
        raise _refusal("the budget {} leaves nothing", name, value)
    return Limit(cast(Kind, "macs" if name == "flops" else name), float(number), relative)


def _refusal(message: str, name: str, value: object, hint: str | None = None) -> UsageError:
    """The error for one budget, with what its kind takes."""
    return UsageError(
        message.format(f"{name}={value}"),
        expected=_SHOWN[name],
        got=repr(value) if isinstance(value, str) else str(value),
        hint=hint,
    )


def _read(name: str, text: str) -> tuple[Decimal, bool]:
    """A limit in text, and whether it is a ratio."""
    number, unit = amount(text) or (None, "")
    if number is None:
        raise _refusal("the budget {} is not a number", name, text)
    if unit == "%":
        return _ratio(name, number / 100, text), True
    if not unit:
        return _take(name, float(number) if number.as_tuple().exponent else int(number), text)
    units = {key.replace("μ", "µ"): scale for key, scale in _UNITS[name].items()}
    scale = units.get(unit.lower().replace("μ", "µ"))
    if scale is None:
        of = [kind for kind, known in _UNITS.items() if unit.lower() in known and kind != name]
        hint = f"{unit} is a unit of {' and '.join(of)}" if of else None
        raise _refusal(f"the budget {{}} has an unknown unit {unit!r}", name, text, hint)
    if number <= 0:
        raise _refusal("the budget {} is not above 0", name, text)
    return number * scale, False


def _take(name: str, value: object, shown: object = None) -> tuple[Decimal, bool]:
    """A limit that is a bare number, and whether it is a ratio."""
    shown = value if shown is None else shown
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
    """A ratio, if it is one."""
    if number > 1:
        raise _refusal("the budget {} is a ratio above 1: more than the original", name, shown, hint)
    if number <= 0:
        raise _refusal("the budget {} is not above 0", name, shown)
    return number
