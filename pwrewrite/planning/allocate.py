"""Which candidate each layer gets: the multiple-choice knapsack, solved to a proven gap.

One option of every group is chosen, with the least total loss among those whose total costs stay within limits
(Kellerer, Pferschy & Pisinger 2004, *Knapsack Problems*, chapter 11). Options that another one beats in loss and every
limited cost are left out first; what remains goes to HiGHS through `scipy.optimize.milp`, and the answer is checked in
exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from ..errors import RefusedError

_SHRINK = 1e-9
"""By how much a limit is tightened when an answer exceeds it by a rounding."""


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
    """

    def __init__(self, kind: str | None, smallest: float, limit: float) -> None:
        what = f"a total {kind} of {limit:g} cannot be met" if kind else "the limits cannot be met together"
        super().__init__(what, expected=f"at least {smallest:g}" if kind else None)
        self.kind, self.smallest = kind, smallest


def allocate(
    groups: Sequence[Sequence[Option]], limits: Mapping[str, float], *, gap: float = 1e-4, time_limit: float = 30.0
) -> Allocation:
    """The options with the least total loss within limits.

    Args:
        groups: The options of each group; the first is preferred among equals.
        limits: The most that the total of each kind may be; other kinds do not count.
        gap: Relative gap at which the solver may stop.
        time_limit: Seconds after which it stops with the best it has.

    Raises:
        Infeasible: If no choice meets the limits.
    """
    kinds = tuple(limits)
    best = [min(range(len(group)), key=lambda i, group=group: (group[i].loss, i)) for group in groups]  # type: ignore[misc]
    if _within(groups, best, limits):
        return _allocation(groups, best, kinds, 0.0)
    for kind, limit in limits.items():
        smallest = sum((min(Fraction(o.costs[kind]) for o in group) for group in groups), Fraction(0))
        if smallest > Fraction(limit):
            raise Infeasible(kind, float(smallest), limit)
    kept = [_undominated(group, kinds) for group in groups]
    tightened = dict(limits)
    for _ in range(4):
        chosen, found = _solve(groups, kept, tightened, gap, time_limit)
        if chosen is None:
            break
        if _within(groups, chosen, limits):
            return _allocation(groups, chosen, kinds, found)
        tightened = {kind: limit - _SHRINK * max(abs(limits[kind]), 1.0) for kind, limit in tightened.items()}
    if len(kinds) == 1:  # the cheapest of all always does
        cheapest = [min(range(len(g)), key=lambda i, g=g: (g[i].costs[kinds[0]], g[i].loss)) for g in groups]  # type: ignore[misc]
        return _allocation(groups, cheapest, kinds, float("inf"))
    raise Infeasible(None, float("nan"), float("nan"))


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
    most = allocate(groups, {**fixed, kind: float("inf")}, gap=gap).costs[kind]
    least = float(sum((min(Fraction(o.costs[kind]) for o in group) for group in groups), Fraction(0)))
    found: list[Allocation] = []
    for i in range(points):
        limit = most + (least - most) * i / max(points - 1, 1)
        if i == points - 1:
            limit = least * (1 + 1e-12)
        try:
            found.append(allocate(groups, {**fixed, kind: limit}, gap=gap))
        except Infeasible:
            break
    return _monotone(found, kind)


def _monotone(found: Sequence[Allocation], kind: str) -> list[Allocation]:
    """Without allocations that another one beats in both, as a solver's gap may leave some; equal ones once."""
    kept: list[Allocation] = []
    for one in sorted(found, key=lambda a: (-a.costs[kind], a.loss)):
        while kept and kept[-1].loss >= one.loss:
            kept.pop()
        kept.append(one)
    return kept


def _undominated(group: Sequence[Option], kinds: Sequence[str]) -> list[int]:
    """Indices of the options that no other beats, or equals with a lower index."""
    order = sorted(range(len(group)), key=lambda i: (group[i].loss, *(group[i].costs[k] for k in kinds), i))
    kept: list[int] = []
    for i in order:
        costs = group[i].costs
        if not any(all(group[j].costs[k] <= costs[k] for k in kinds) for j in kept):
            kept.append(i)
    return kept


def _solve(
    groups: Sequence[Sequence[Option]],
    kept: Sequence[Sequence[int]],
    limits: Mapping[str, float],
    gap: float,
    time_limit: float,
) -> tuple[list[int] | None, float]:
    """Asks the solver; the indices chosen and the gap it proved."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = np.array([len(options) for options in kept])
    count, owner = int(sizes.sum()), np.repeat(np.arange(len(kept)), sizes)
    losses = np.array([groups[g][i].loss for g, options in enumerate(kept) for i in options], dtype=float)
    one_each = csr_array((np.ones(count), (owner, np.arange(count))), shape=(len(kept), count))
    constraints: list[Any] = [LinearConstraint(one_each, 1, 1)]
    for kind, limit in limits.items():
        if not np.isfinite(limit):
            continue
        costs = np.array([groups[g][i].costs[kind] for g, options in enumerate(kept) for i in options], dtype=float)
        # Only what an option costs above the least of its group matters, in units of what there is to spend.
        least = np.minimum.reduceat(costs, np.concatenate([[0], np.cumsum(sizes)[:-1]]))
        extra, room = costs - least[owner], limit - least.sum()
        unit = max(abs(room), float(extra.max()) * 1e-6, 1e-300)
        constraints.append(LinearConstraint(csr_array(extra[None] / unit), -np.inf, room / unit))
    scale = float(losses[losses > 0].mean()) if (losses > 0).any() else 1.0
    solved = milp(
        losses / scale,
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": gap, "time_limit": time_limit},
    )
    if solved.x is None:
        return None, float("inf")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    chosen = [kept[g][int(np.argmax(solved.x[starts[g] : starts[g + 1]]))] for g in range(len(kept))]
    total = sum(groups[g][i].loss for g, i in enumerate(chosen)) / scale
    bound = float(solved.mip_dual_bound if solved.mip_dual_bound is not None else 0.0)
    return chosen, max(0.0, (total - bound) / total) if total > 0 else 0.0


def _within(groups: Sequence[Sequence[Option]], chosen: Sequence[int], limits: Mapping[str, float]) -> bool:
    """Whether the exact totals stay within the limits."""
    return all(
        limit == float("inf")
        or sum((Fraction(g[i].costs[kind]) for g, i in zip(groups, chosen)), Fraction(0)) <= Fraction(limit)
        for kind, limit in limits.items()
    )


def _allocation(
    groups: Sequence[Sequence[Option]], chosen: Sequence[int], kinds: Sequence[str], gap: float
) -> Allocation:
    picked = [group[i] for group, i in zip(groups, chosen)]
    costs = {kind: float(sum((Fraction(o.costs[kind]) for o in picked), Fraction(0))) for kind in kinds}
    return Allocation(tuple(chosen), sum(option.loss for option in picked), gap, costs)
