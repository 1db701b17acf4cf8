"""Which candidate each layer gets: the multiple-choice knapsack, solved to a proven gap.

One option of every group is chosen, with the least total loss among those whose total costs stay within limits
(Kellerer, Pferschy & Pisinger 2004, *Knapsack Problems*, chapter 11). Options that another one beats in loss and every
limited cost are left out first, then those that bounds rule out (`pwrewrite.planning.knapsack`); what remains goes to
HiGHS through `scipy.optimize.milp`, and the answer is checked in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import fsum, isfinite

import numpy as np

from ..core.errors import RefusedError
from .knapsack import Answer, Knapsack, Search

_ROUNDING = 1e-12
"""Rounding of a cost that is allowed for, as a share, before an option is left out as too dear."""
_CHEAPEST = 5.0
"""Seconds that the search for a smallest total takes at most."""
_SURE = 1e-7
"""A gap below is none: no more than the solver's tolerances."""


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that a group could be.

    Attributes:
        loss: What it loses, at least 0.
        costs: What it costs, by kind.
    """

    loss: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Allocation:
    """One option of every group.

    Attributes:
        chosen: Index of the option of each group.
        loss: Total loss.
        gap: How far at most the total loss is from the least one, as a share of it; 0 where it is the least.
        costs: Total costs by kind.
    """

    chosen: tuple[int, ...]
    loss: float
    gap: float
    costs: Mapping[str, float] = field(default_factory=dict)


class Infeasible(RefusedError):
    """Limits that no choice of options meets.

    Attributes:
        kind: Which limit cannot be met even alone; None where only all of them together cannot.
        smallest: The smallest total of that kind.
        together: Where they cannot be met together: the smallest total of each kind while the others stay within
            their limits; without kinds where the others cannot be met either.
    """

    def __init__(
        self, kind: str | None, smallest: float, limit: float, together: Mapping[str, float] | None = None
    ) -> None:
        what = f"a total {kind} of {limit:g} cannot be met" if kind else "the limits cannot be met together"
        self.kind, self.smallest, self.together = kind, smallest, dict(together or {})
        expected = [f"{other} of at least {least:g}" for other, least in self.together.items()]
        super().__init__(what, expected=f"at least {smallest:g}" if kind else ", or ".join(expected) or None)


def allocate(
    groups: Sequence[Sequence[Option]],
    limits: Mapping[str, float],
    *,
    gap: float = 1e-4,
    time_limit: float = 30.0,
    start: Sequence[int] | None = None,
) -> Allocation:
    """The options with the least total loss within limits.

    Args:
        groups: The options of each group; the first is preferred among equals.
        limits: The most that the total of each kind may be; other kinds do not count.
        gap: Relative gap at which the solver may stop.
        time_limit: Seconds after which it stops with the best it has.
        start: A choice to begin with: a last resort where no other is found.

    Raises:
        Infeasible: If no choice meets the limits.
        RefusedError: If none that does was found in time, which only several limits can cause.
    """
    kinds = tuple(limits)
    best = [min(range(len(group)), key=[option.loss for option in group].__getitem__) for group in groups]
    if _excess(groups, best, limits) is None:
        return _allocation(groups, best, kinds, 0.0)
    for kind, limit in limits.items():
        smallest = sum((min(Fraction(option.costs[kind]) for option in group) for group in groups), Fraction(0))
        if smallest > limit:
            raise Infeasible(kind, float(smallest), limit)
    binding = {kind: limit for kind, limit in limits.items() if limit != float("inf")}
    answer, least = _search(groups, binding, gap, time_limit, start)
    if answer.chosen is None and start is not None and _excess(groups, start, limits) is None:
        return _allocation(groups, start, kinds, float("inf"))
    if answer.chosen is None and not answer.impossible:
        raise RefusedError(
            f"no choice within the limits was found in {time_limit:g} s",
            hint="loosen one of the limits, or allow more time",
        )
    if answer.chosen is None:
        raise Infeasible(None, float("nan"), float("nan"), _together(groups, binding))
    total = fsum(group[i].loss for group, i in zip(groups, answer.chosen))
    proven = (total - least - answer.bound) / total if total > 0 else 0.0
    return _allocation(groups, answer.chosen, kinds, proven if proven > _SURE else 0.0)


def frontier(
    groups: Sequence[Sequence[Option]],
    kind: str,
    *,
    limits: Mapping[str, float] | None = None,
    points: int = 25,
    gap: float = 1e-4,
) -> list[Allocation]:
    """The least losses for limits on one kind, from no limit down to the smallest total.

    Args:
        groups: The options of each group.
        kind: The kind whose limit varies.
        limits: Limits on other kinds, which stay.
        points: How many limits, evenly apart.
        gap: As for `allocate`.

    Returns:
        Allocations of falling cost and never falling loss; equal ones once.

    Raises:
        Infeasible: If the other limits cannot be met.
    """
    fixed = {k: v for k, v in (limits or {}).items() if k != kind}
    allocations = [allocate(groups, {**fixed, kind: float("inf")}, gap=gap)]
    most = allocations[0].costs[kind]
    cheapest = _cheapest(groups, kind, fixed)
    least = cheapest.costs[kind]
    for i in range(1, points):
        limit = least if i == points - 1 else max(least, most + (least - most) * i / (points - 1))
        allocations.append(allocate(groups, {**fixed, kind: limit}, gap=gap, start=cheapest.chosen))
    # A solver's gap may leave some that another one beats in both.
    front: list[Allocation] = []
    for allocation in sorted(allocations, key=lambda a: (-a.costs[kind], a.loss)):
        while front and front[-1].loss >= allocation.loss:
            front.pop()
        front.append(allocation)
    return front


def _undominated(group: Sequence[Option], kinds: Sequence[str]) -> list[int]:
    """Indices of the options that no other beats, or equals with a lower index."""
    order = sorted(range(len(group)), key=lambda i: (group[i].loss, *(group[i].costs[k] for k in kinds), i))
    costs = np.array([[group[i].costs[k] for k in kinds] for i in order], dtype=float)
    beaten = np.triu(np.all(costs[:, None] <= costs[None], axis=-1), 1).sum(0)
    return [i for i, other in zip(order, beaten) if other == 0 and isfinite(group[i].loss)]


def _search(
    groups: Sequence[Sequence[Option]],
    limits: Mapping[str, float],
    gap: float,
    time_limit: float,
    start: Sequence[int] | None,
) -> tuple[Answer, float]:
    """Looks for the best choice within finite limits, each of which can be met alone.

    Returns:
        The answer, its bound above the second: the sum of the least losses of the groups.
    """
    kinds = tuple(limits)
    left = [_undominated(group, kinds) for group in groups]
    while True:
        if not all(left):
            return Answer(None, 0.0, impossible=True), 0.0
        # Only what an option costs above the least of its group matters, in units of what there is to spend.
        least = [[min(group[i].costs[kind] for i in options) for kind in kinds] for group, options in zip(groups, left)]
        spent = [sum((Fraction(row[k]) for row in least), Fraction(0)) for k in range(len(kinds))]
        room = np.array([float(Fraction(limits[kind]) - total) for kind, total in zip(kinds, spent)])
        if (room < 0).any():
            return Answer(None, 0.0, impossible=True), 0.0
        costs = [
            np.array([[group[i].costs[kind] for kind in kinds] for i in options], dtype=float) - row
            for group, options, row in zip(groups, left, least)
        ]
        affordable = [np.all(part <= room * (1 + _ROUNDING), axis=1) for part in costs]
        if all(np.all(mask) for mask in affordable):
            break
        left = [[i for i, fits in zip(options, mask) if fits] for options, mask in zip(left, affordable)]
    losses = [np.array([group[i].loss for i in options]) for group, options in zip(groups, left)]
    problem = Knapsack(
        np.concatenate([part - part.min() for part in losses]),
        np.concatenate(costs) / np.where(room > 0, room, 1.0),
        np.repeat(np.arange(len(left)), [len(options) for options in left]),
        np.concatenate([np.array(options) for options in left]),
    )
    answer = Search(problem, lambda chosen: _excess(groups, chosen, limits), gap, time_limit, start).run()
    return answer, fsum(float(part.min()) for part in losses)


def _together(groups: Sequence[Sequence[Option]], limits: Mapping[str, float]) -> dict[str, float]:
    """The smallest total of each kind while the others stay within their limits, where they can."""
    smallest = {}
    for kind in limits:
        with suppress(RefusedError):
            smallest[kind] = _cheapest(groups, kind, {k: v for k, v in limits.items() if k != kind}).costs[kind]
    return smallest


def _cheapest(groups: Sequence[Sequence[Option]], kind: str, limits: Mapping[str, float]) -> Allocation:
    """The choice with the smallest total of a kind within limits on others; its total is rounded up."""
    priced = [[Option(option.costs[kind], option.costs) for option in group] for group in groups]
    chosen = allocate(priced, limits, gap=1e-6, time_limit=_CHEAPEST).chosen
    exact = sum((Fraction(group[i].costs[kind]) for group, i in zip(groups, chosen)), Fraction(0))
    total = float(exact) if float(exact) >= exact else float(np.nextafter(float(exact), np.inf))
    cheapest = _allocation(groups, chosen, (*limits, kind), 0.0)
    return replace(cheapest, costs={**cheapest.costs, kind: total})


def _excess(groups: Sequence[Sequence[Option]], chosen: Sequence[int], limits: Mapping[str, float]) -> int | None:
    """The number of the first limit that the exact totals exceed; None where they exceed none."""
    for number, (kind, limit) in enumerate(limits.items()):
        total = sum((Fraction(group[i].costs[kind]) for group, i in zip(groups, chosen)), Fraction(0))
        if total > limit:
            return number
    return None


def _allocation(
    groups: Sequence[Sequence[Option]], chosen: Sequence[int], kinds: Sequence[str], gap: float
) -> Allocation:
    picked = [group[i] for group, i in zip(groups, chosen)]
    costs = {kind: float(sum((Fraction(o.costs[kind]) for o in picked), Fraction(0))) for kind in kinds}
    return Allocation(tuple(chosen), fsum(option.loss for option in picked), gap, costs)
