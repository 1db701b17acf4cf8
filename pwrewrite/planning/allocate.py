"""Which candidate each layer gets: the multiple-choice knapsack, solved to a proven gap.

One option of every group is chosen, with the least total loss among those whose total costs stay within limits
(Kellerer, Pferschy & Pisinger 2004, *Knapsack Problems*, chapter 11). Options that another one beats in loss and every
limited cost are left out first, then those that bounds rule out (`pwrewrite.planning.knapsack`); what remains goes to
HiGHS through `scipy.optimize.milp`, and the answer is checked in exact arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from math import fsum, inf

import numpy as np

from ..core.errors import RefusedError
from .exclusion import Exclusion, Floats
from .knapsack import Answer, Knapsack, Search

_ROUNDING = 1e-12
"""Rounding of a cost that is allowed for, as a share, before an option is left out as too dear."""
_CHEAPEST = 5.0
"""Seconds that the search for a smallest total takes at most."""
_SURE = 1e-7
"""A gap below is none: no more than the solver's tolerances."""
_POINT_GAP, _ROUGH_GAP, _POINT_TIME = 1e-3, 3e-2, 2.0
"""The gap and the seconds of one point of a frontier; the gap of one that only shows what is worth a measurement."""
_IMPOSSIBLE = Answer(None, 0.0, impossible=True)


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that a group could be: what it loses, at least 0, what it costs, by kind, and what it claims.

    Of all options that claim the same thing one is chosen at most. All options of a group that claim anything claim the
    same, and every group has one that claims nothing.
    """

    loss: float
    costs: Mapping[str, float]
    claims: frozenset[str] = frozenset()


Groups = Sequence[Sequence[Option]]


@dataclass(frozen=True)
class Allocation:
    """The index of the option of each group, the total loss and the total costs by kind.

    ``gap``: how far at most the loss is from the least one, as a share of it; 0 where it is the least.
    """

    chosen: tuple[int, ...]
    loss: float
    gap: float
    costs: Mapping[str, float]


class Infeasible(RefusedError):
    """Limits that no choice of options meets.

    ``kind`` is the limit that cannot be met even alone, and ``least`` has the smallest total of that kind. Where only
    all together cannot be met, ``kind`` is None ``least`` has each kind's while the others keep to their limits.
    """

    def __init__(self, kind: str | None, least: Mapping[str, float]) -> None:
        self.kind, self.least = kind, least
        expected = ", or ".join(f"{other} of at least {total:g}" for other, total in least.items())
        what = f"the limit on {kind} cannot be met" if kind else "the limits cannot be met together"
        super().__init__(what, expected=expected or None)


def allocate(
    groups: Groups,
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
    best = [min(range(len(group)), key=[option.loss for option in group].__getitem__) for group in groups]
    if _excess(groups, best, limits) is None and not _conflict(groups, best):
        return _allocation(groups, best, limits, 0.0)
    for kind, limit in limits.items():  # even if nothing excluded anything
        smallest = sum((Fraction(min(option.costs[kind] for option in group)) for group in groups), Fraction(0))
        if smallest > limit:
            claimed = any(option.claims for group in groups for option in group)
            raise Infeasible(kind, {kind: _cheapest(groups, kind, {}).costs[kind] if claimed else float(smallest)})
    binding = {kind: limit for kind, limit in limits.items() if limit != inf}
    answer = _search(groups, binding, gap, time_limit, start)
    if answer.chosen is not None:
        found = _allocation(groups, answer.chosen, limits, 0.0)
        proven = (found.loss - answer.bound) / found.loss if found.loss > 0 else 0.0
        return replace(found, gap=proven) if proven > _SURE else found
    if start is not None and _excess(groups, start, limits) is None:
        return _allocation(groups, start, limits, inf)
    if answer.impossible and len(binding) == 1:
        ((kind, _),) = binding.items()
        raise Infeasible(kind, {kind: _cheapest(groups, kind, {}).costs[kind]})
    if answer.impossible:
        raise Infeasible(None, _together(groups, binding))
    what = f"no choice within the limits was found in {time_limit:g} s"
    raise RefusedError(what, hint="loosen one of the limits, or allow more time")


def frontier(
    groups: Groups, kind: str, *, limits: Mapping[str, float] | None = None, points: int = 25, rough: bool = False
) -> list[Allocation]:
    """The least losses for so many limits on one kind, evenly apart from no limit down to the smallest total.

    ``limits`` are on other kinds, and stay; as in `allocate` they may be `Infeasible`. Each is within a thousandth of
    the least loss, three hundredths where ``rough``, or as near as two seconds bring it.

    Returns:
        Allocations of falling cost and never falling loss; equal ones once.
    """
    fixed = {k: v for k, v in (limits or {}).items() if k != kind}
    allocations = [allocate(groups, {**fixed, kind: inf})]
    most = allocations[0].costs[kind]
    cheapest = _cheapest(groups, kind, fixed)
    least = cheapest.costs[kind]
    for i in range(1, points):
        limit = least if i == points - 1 else max(least, most + (least - most) * i / (points - 1))
        within = {**fixed, kind: limit}
        gap = _ROUGH_GAP if rough else _POINT_GAP
        allocations.append(allocate(groups, within, gap=gap, time_limit=_POINT_TIME, start=cheapest.chosen))
    # A solver's gap may leave some that another one beats in both.
    front: list[Allocation] = []
    for allocation in sorted(allocations, key=lambda a: (-a.costs[kind], a.loss)):
        while front and front[-1].loss >= allocation.loss:
            front.pop()
        front.append(allocation)
    return front


def _search(
    groups: Groups, limits: Mapping[str, float], gap: float, time_limit: float, start: Sequence[int] | None
) -> Answer:
    """The best choice within finite limits that can each be met alone."""
    tables, names, least = [], [], []
    for group in groups:
        table = np.array([[option.loss, *(option.costs[kind] for kind in limits)] for option in group], dtype=float)
        order = np.lexsort(table.T[::-1])
        costs = table[order, 1:]
        claims = np.array([bool(group[i].claims) for i in order])
        beats = np.all(costs[:, None] <= costs[None], axis=-1) & (~claims[:, None] | claims)  # by what claims no more
        beaten = np.triu(beats, 1).any(0)  # or equalled, by an earlier one
        left = order[~beaten & np.isfinite(table[order, 0])]
        if not len(left):
            return _IMPOSSIBLE
        tables.append(table[left])
        names.append(left)
        least.append(table[left].min(0))
    # Only what an option costs above the least of its group matters, in units of what there is to spend.
    spent = [sum(map(Fraction, column), Fraction(0)) for column in np.array(least)[:, 1:].T.tolist()]
    room = np.array([float(Fraction(limit) - total) for limit, total in zip(limits.values(), spent)])
    above = np.concatenate([table - row for table, row in zip(tables, least)])
    owner = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    affordable = np.all(above[:, 1:] <= room * (1 + _ROUNDING), axis=1)
    if (room < 0).any() or len(np.unique(owner[affordable])) < len(tables):
        return _IMPOSSIBLE
    costs, name, claims = above[:, 1:] / np.where(room > 0, room, 1.0), np.concatenate(names), _claims(groups)
    shares = [bool(row.any()) for row in claims]  # what no other group claims is free
    claiming = np.array(
        [shares[group] and bool(groups[group][i].claims) for group, i in zip(owner.tolist(), name.tolist())]
    )
    problem = Knapsack(above[:, 0], costs, owner, name, claiming, claims, Exclusion(claims))
    search = Search(problem.keep(affordable), lambda chosen: _excess(groups, chosen, limits), gap, time_limit, start)
    answer = search.run()
    return answer._replace(bound=answer.bound + fsum(row[0] for row in least))


def _together(groups: Groups, limits: Mapping[str, float]) -> dict[str, float]:
    """The smallest total of each kind while the others stay within their limits, where they can."""
    smallest = {}
    for kind in limits:
        with suppress(RefusedError):
            smallest[kind] = _cheapest(groups, kind, {k: v for k, v in limits.items() if k != kind}).costs[kind]
    return smallest


def _cheapest(groups: Groups, kind: str, limits: Mapping[str, float]) -> Allocation:
    """The choice with the smallest total of a kind within limits on others; its total is rounded up."""
    priced = [[Option(option.costs[kind], option.costs, option.claims) for option in group] for group in groups]
    chosen = allocate(priced, limits, gap=1e-6, time_limit=_CHEAPEST).chosen
    exact = _total(groups, chosen, kind)
    total = float(exact) if float(exact) >= exact else float(np.nextafter(float(exact), inf))
    cheapest = _allocation(groups, chosen, limits, 0.0)
    return replace(cheapest, costs={**cheapest.costs, kind: total})


def _total(groups: Groups, chosen: Sequence[int], kind: str) -> Fraction:
    return sum((Fraction(group[i].costs[kind]) for group, i in zip(groups, chosen)), Fraction(0))


def _claims(groups: Groups) -> Floats:
    """What the options of each group claim, of all that several groups claim: ``(groups, things)``."""
    each = [frozenset[str]().union(*(option.claims for option in group)) for group in groups]
    counts = Counter(claim for claims in each for claim in claims)
    column = {claim: i for i, claim in enumerate(claim for claim, count in counts.items() if count > 1)}
    table = np.zeros((len(groups), len(column)))
    for row, claims in zip(table, each):
        row[[column[claim] for claim in claims if claim in column]] = 1
    return table


def _conflict(groups: Groups, chosen: Sequence[int]) -> bool:
    """Whether a choice claims anything twice."""
    claims = [claim for group, i in zip(groups, chosen) for claim in group[i].claims]
    return len(claims) > len(set(claims))


def _excess(groups: Groups, chosen: Sequence[int], limits: Mapping[str, float]) -> int | None:
    """The number of the first limit that the exact totals exceed; None where they exceed none."""
    over = (number for number, (kind, limit) in enumerate(limits.items()) if _total(groups, chosen, kind) > limit)
    return next(over, None)


def _allocation(groups: Groups, chosen: Sequence[int], kinds: Iterable[str], gap: float) -> Allocation:
    loss = fsum(group[i].loss for group, i in zip(groups, chosen))
    return Allocation(tuple(chosen), loss, gap, {kind: float(_total(groups, chosen, kind)) for kind in kinds})
