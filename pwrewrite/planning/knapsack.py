"""The multiple-choice knapsack in numbers: bounds, good answers at once, and what is left for the solver.

For any price per unit of each cost, the options that are best at that price give a lower bound on the least loss
(Lagrangian relaxation; Fisher 1981, *The Lagrangian relaxation method for solving integer programming problems*); at
the right price they are nearly an answer. An option that at some price is further behind than the best answer known is
above the bound is in no better answer (Kellerer, Pferschy & Pisinger 2004, *Knapsack Problems*, section 11.4) and is
left out before HiGHS is asked. Losses then reach it as numbers around `_SCALE`, far above its absolute tolerances.

Losses and costs count here from the least of each group, and costs in units of what there is to spend.

Options of different groups that claim the same thing exclude each other, at every price
(`pwrewrite.planning.exclusion`) and in the solver, which gets a row for each thing that is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum, inf
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.standard_output import descriptor_to_stderr
from .exclusion import Exclusion, Floats

Ints = NDArray[np.intp]
Mask = NDArray[np.bool_]

_SCALE = 1e3
"""What the best answer known loses, in the solver's numbers."""
_ROUNDING = 1e-9
"""Rounding that is allowed for, as a share, before an option is left out."""
_SUMMING = 1e-13
"""Rounding of a sum, as a share of it, that a bound is lowered by."""
_PRICES = 60
"""How many prices are tried at most in search of the highest bound."""
_ROUNDS = 6
"""How often options are left out before the solver is asked."""
_UNSURE = 1e-5
"""How far the solver's bound may be off, in its numbers."""
_NONE = 2
"""The solver's status where there is no answer."""
_CUTS = 20
"""How many answers that are over a limit by the solver's tolerance are forbidden one by one."""
_TIGHTER = 4e-6
"""By how much limits are tightened after that, as a share of what there is to spend."""


class Priced(NamedTuple):
    """The best option of each group at a price, the bound it gives, and its rounding."""

    chosen: Ints
    bound: float
    rounding: float
    price: float


class Side(NamedTuple):
    """The least of each group among some of its options, infinite where it has none, and the first that has it."""

    least: Floats
    first: Ints


class Answer(NamedTuple):
    """The option of each group by its name, a bound that no choice loses less than, whether there can be no choice."""

    chosen: tuple[int, ...] | None
    bound: float
    impossible: bool = False


@dataclass(frozen=True)
class Knapsack:
    """The options of all groups, side by side; every group has at least one.

    Losses ``(options,)`` and costs ``(options, kinds)`` are at least 0. ``owner`` is the group of each, from 0 and
    without holes, ascending, and ``names`` its index in the group as it was given. The options that ``claiming`` is
    true of claim what the row of their group in ``claims (groups, things)`` has 1 for.
    """

    losses: Floats
    costs: Floats
    owner: Ints
    names: Ints
    claiming: Mask
    claims: Floats
    exclusion: Exclusion

    @cached_property
    def starts(self) -> Ints:
        """The first option of each group, ``(groups,)``."""
        return np.searchsorted(self.owner, np.arange(self.owner[-1] + 1))

    def keep(self, mask: Mask) -> Knapsack:
        """The same with some of the options."""
        owner, names, claiming = self.owner[mask], self.names[mask], self.claiming[mask]
        return Knapsack(self.losses[mask], self.costs[mask], owner, names, claiming, self.claims, self.exclusion)

    @cached_property
    def worth(self) -> Floats:
        """What each option costs at a price of 1 for every kind, ``(options,)``."""
        return np.asarray(self.costs.sum(1))

    def at(self, price: float) -> Priced:
        """The best options at one price for a unit of every cost, the first among equals."""
        priced = self.losses + self.worth * price
        free, claiming = self._sides(priced)
        chosen = np.where(free.least <= claiming.least, free.first, claiming.first)
        for group, claims in self.exclusion.cheapest(free.least, claiming.least):
            chosen[group] = (claiming if claims else free).first[group]
        total, spent = fsum(priced[chosen]), price * self.costs.shape[1]
        return Priced(chosen, total * (1 - _SUMMING) - spent, _ROUNDING * spent, price)

    def behind(self, best: Priced) -> Floats:
        """How much more the best choice with each option costs than the best at that price, ``(options,)``."""
        priced = self.losses + self.worth * best.price
        free, claiming = self._sides(priced)
        margins = self.exclusion.margins(free.least, claiming.least)
        least = np.where(self.claiming, claiming.least[self.owner], free.least[self.owner])
        return priced - least + np.where(self.claiming, margins.claiming[self.owner], margins.without[self.owner])

    def _sides(self, priced: Floats) -> tuple[Side, Side]:
        """The best option of each group that claims nothing, and the best that claims."""
        free = self._side(np.where(self.claiming, inf, priced))
        return free, self._side(np.where(self.claiming, priced, inf))

    def _side(self, priced: Floats) -> Side:
        least = np.minimum.reduceat(priced, self.starts)
        best = np.flatnonzero(priced == least[self.owner])
        return Side(least, best[np.searchsorted(self.owner[best], np.arange(len(self.starts)))])

    def within(self, chosen: Ints) -> bool:
        """Whether a choice stays within the limits, up to rounding, and claims nothing twice."""
        return bool((self.costs[chosen].sum(0) <= 1 + _ROUNDING).all() and (self.claimed(chosen) <= 1).all())

    def claimed(self, chosen: Ints) -> Floats:
        """How often a choice claims each thing."""
        return np.asarray(self.claims[self.claiming[chosen]].sum(0))


class Search:
    """Looks for the options with the least total loss whose total cost of each kind is at most 1; as `allocate`.

    ``excess`` is the number of a kind of which a choice costs too much in exact arithmetic; None where it fits.
    """

    def __init__(
        self,
        problem: Knapsack,
        excess: Callable[[Sequence[int]], int | None],
        gap: float,
        time_limit: float,
        start: Sequence[int] | None = None,
    ) -> None:
        self.view, self.excess, self.gap = problem, excess, gap
        self.end = perf_counter() + time_limit
        self.bound, self.loss = 0.0, inf
        self.chosen: tuple[int, ...] | None = None
        if start is not None:
            started = np.flatnonzero(problem.names == np.array(start)[problem.owner])
            if len(started) == len(problem.starts):
                self._offer(started)

    def run(self) -> Answer:
        """Searches: what bounds leave goes to the solver, again where what matters was far smaller than it was told."""
        while True:
            for _ in range(_ROUNDS):
                before = len(self.view.losses)
                self._narrow()
                if self._done or len(self.view.losses) > 0.8 * before:
                    break
            known = self.loss
            impossible = (self.chosen is None or not self._done) and self._ask_solver()
            if self._done or self.loss > known / 10 or self.loss == inf:
                return Answer(self.chosen, min(self.bound, self.loss), impossible and self.chosen is None)

    @property
    def _done(self) -> bool:
        return self.loss - self.bound <= self.gap * self.loss < inf or perf_counter() > self.end

    def _narrow(self) -> None:
        """Leaves out what the highest bound rules out."""
        best = self._highest()
        if self.chosen is not None and best.bound < inf:
            most = self.loss * (1 + _ROUNDING) + best.rounding
            self.view = self.view.keep((self.view.losses <= most) & (best.bound + self.view.behind(best) <= most))

    def _highest(self) -> Priced:
        """The price of the highest bound; the best options there and at the next price at which they fit are noted.

        Every price gives a line above the bounds of all others, from what its best options lose and cost; the next one
        is where the nearest of them meet (Kelley 1960, *The cutting-plane method for solving convex programs*).
        """
        view = self.view
        dear = self._look(view.at(0.0))
        losses, costs = view.losses[view.losses > 0], view.worth[view.worth > 0]
        if view.within(dear.chosen) or not losses.size or not costs.size:
            return dear
        top = float(losses.max() / costs.min()) * 1e13  # only cost counts there
        best = cheap = self._look(view.at(top))
        for _ in range(_PRICES):
            more, less = fsum(view.worth[dear.chosen]), fsum(view.worth[cheap.chosen])
            lost, saved = fsum(view.losses[cheap.chosen]), fsum(view.losses[dear.chosen])
            price = (lost - saved) / (more - less) if more > less else 0.0
            if not dear.price < price < cheap.price:
                break
            priced = view.at(price)
            best = max(best, priced, key=lambda each: each.bound)
            spent = fsum(view.worth[priced.chosen])
            if not less < spent < more:
                break
            dear, cheap = (priced, cheap) if spent > view.costs.shape[1] else (dear, priced)
        self._look(best)
        while not view.within(cheap.chosen) and cheap.price < top:  # more of one kind than there is
            cheap = view.at(cheap.price * 2)
        self._look(cheap)
        return best

    def _look(self, priced: Priced) -> Priced:
        """Takes note of a bound, and of the answer it may be near."""
        self.bound = max(self.bound, priced.bound)
        if self.view.within(priced.chosen):
            self._offer(priced.chosen)
        return priced

    def _offer(self, chosen: Ints) -> int | None:
        """Takes an answer, as good as it can be made, if it fits and is the best so far.

        Returns the number of a kind of which it costs too much; None where it fits or would be no better.
        """
        over = None
        for answer in (_improved(self.view, chosen), chosen):
            names, loss = tuple(self.view.names[answer].tolist()), fsum(self.view.losses[answer])
            if loss >= self.loss:
                return None
            over = self.excess(names)
            if over is None:
                self.chosen, self.loss = names, loss
                return None
        return over

    def _ask_solver(self) -> bool:
        """Asks the solver for an answer among the options left, for any where none is known; whether there is none."""
        view, cuts = self.view, list[Floats]()
        scale = _SCALE / self.loss  # 0 where no answer is known: any will do
        for attempt in range(_CUTS + 4):
            exact = attempt < _CUTS
            room = 1.0 if exact else 1.0 - _TIGHTER * 4 ** (attempt - _CUTS)
            stop = self.gap, max(0.1, self.end - perf_counter())
            answer, none, bound = _solved(view, view.losses * scale, room, cuts, stop)
            if exact and scale and bound is not None:
                self.bound = max(self.bound, (bound - _UNSURE) / scale)
            if answer is None:
                return exact and none
            chosen = view.starts + np.array([int(np.argmax(part)) for part in np.split(answer, view.starts[1:])])
            over = self._offer(chosen)
            if over is None:
                break
            # No choice that costs at least as much of this kind in every group fits either.
            cuts.append((view.costs[:, over] >= view.costs[chosen, over][view.owner]).astype(float))
        return False


def _improved(view: Knapsack, chosen: Ints) -> Ints:
    """A choice with better options for single groups as long as they fit, the largest gain first."""
    chosen = chosen.copy()
    left, claimed = 1.0 - view.costs[chosen].sum(0), view.claimed(chosen)
    gains = view.losses[chosen][view.owner] - view.losses
    fitting = (view.costs - view.costs[chosen][view.owner] <= left).all(1)
    useful = np.flatnonzero((gains > 0) & fitting)
    for at in useful[np.argsort(-gains[useful], kind="stable")]:
        group = view.owner[at]
        now = chosen[group]
        need, more = view.costs[at] - view.costs[now], int(view.claiming[at]) - int(view.claiming[now])
        free = more <= 0 or (claimed + view.claims[group] <= 1).all()
        if view.losses[at] < view.losses[now] and (need <= left).all() and free:
            left, claimed, chosen[group] = left - need, claimed + more * view.claims[group], at
    return chosen


def _solved(
    view: Knapsack, losses: Floats, room: float, cuts: Sequence[Floats], stop: tuple[float, float]
) -> tuple[Floats | None, bool, float | None]:
    """HiGHS's answer, whether there is none, and its bound; it stops at a relative gap, or after so many seconds."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    count = len(view.owner)
    one_each = csr_array((np.ones(count), (view.owner, np.arange(count))), shape=(len(view.starts), count))
    constraints = [LinearConstraint(one_each, 1, 1)]
    used = view.costs.any(0)
    if used.any():
        constraints.append(LinearConstraint(view.costs[:, used].T, -np.inf, room))
    claiming = np.flatnonzero(view.claiming)
    if len(claiming):
        option, thing = csr_array(view.claims)[view.owner[claiming]].nonzero()
        rows = csr_array((np.ones(len(option)), (thing, claiming[option])), shape=(view.claims.shape[1], count))
        constraints.append(LinearConstraint(rows, -np.inf, 1))
    if cuts:
        constraints.append(LinearConstraint(np.array(cuts), -np.inf, len(view.starts) - 1))
    options = dict(zip(("mip_rel_gap", "time_limit"), stop))
    with descriptor_to_stderr():  # which HiGHS prints past, in C
        result = milp(losses, integrality=np.ones(count), bounds=Bounds(0, 1), constraints=constraints, options=options)
    return result.x, result.status == _NONE, result.mip_dual_bound
