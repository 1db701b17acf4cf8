"""The multiple-choice knapsack in numbers: bounds, good answers at once, and what is left for the solver.

For any price per unit of each cost, the options that are best at that price give a lower bound on the least loss
(Lagrangian relaxation; Fisher 1981, *The Lagrangian relaxation method for solving integer programming problems*); at
the right price they are nearly an answer. Two things follow. An option that at some price is further behind than the
best answer known is above the bound is in no better answer (Kellerer, Pferschy & Pisinger 2004, *Knapsack Problems*,
section 11.4) and is left out. And the size of the losses that matter is known, so that they reach the solver as numbers
around `_SCALE`, far above its absolute tolerances, whatever else there is to choose from.

Losses and costs count here from the least of each group, and costs in units of what there is to spend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

_SCALE = 1e3
"""What the best answer known loses, in the solver's numbers."""
_ROUNDING = 1e-9
"""Rounding that is allowed for, as a share, before an option is left out."""
_STEPS = 90
"""How often a price is bisected."""
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


@dataclass(frozen=True)
class Knapsack:
    """The options of all groups, side by side; every group has at least one.

    Attributes:
        losses: Loss of each option, ``(options,)``, at least 0.
        costs: Its cost of each kind, ``(options, kinds)``, at least 0.
        owner: Its group, from 0 and without holes, ascending, ``(options,)``.
        names: Its index in the group as it was given, ``(options,)``.
    """

    losses: Floats
    costs: Floats
    owner: Ints
    names: Ints

    @cached_property
    def starts(self) -> Ints:
        """The first option of each group, ``(groups,)``."""
        return np.searchsorted(self.owner, np.arange(self.owner[-1] + 1))

    def keep(self, mask: NDArray[np.bool_]) -> Knapsack:
        """The same with some of the options."""
        return Knapsack(self.losses[mask], self.costs[mask], self.owner[mask], self.names[mask])

    def at(self, prices: Floats) -> Priced:
        """The best options at some prices, the first among equals."""
        priced = self.losses + self.costs @ prices
        least = np.minimum.reduceat(priced, self.starts)
        behind = priced - least[self.owner]
        best = np.flatnonzero(behind == 0)
        chosen = best[np.searchsorted(self.owner[best], np.arange(len(self.starts)))]
        return Priced(prices, chosen, fsum(least) - float(prices.sum()), behind)

    def loss(self, chosen: Ints) -> float:
        """Total loss of a choice."""
        return fsum(self.losses[chosen])

    def within(self, chosen: Ints) -> bool:
        """Whether a choice stays within the limits, up to rounding."""
        return bool((self.costs[chosen].sum(0) <= 1 + _ROUNDING).all())


@dataclass(frozen=True)
class Priced:
    """What is best at some prices.

    Attributes:
        prices: Loss that a unit of each cost is worth, ``(kinds,)``, at least 0.
        chosen: The best option of each group, ``(groups,)``.
        bound: No choice within the limits loses less.
        behind: How far each option falls behind the best of its group, ``(options,)``.
    """

    prices: Floats
    chosen: Ints
    bound: float
    behind: Floats


@dataclass(frozen=True)
class Answer:
    """The result of a search.

    Attributes:
        chosen: The option of each group by its name; None where there is none.
        bound: No choice within the limits loses less.
        impossible: Where there is none: whether there can be none.
    """

    chosen: tuple[int, ...] | None
    bound: float
    impossible: bool = False


class Search:
    """Looks for the options with the least total loss whose total cost of each kind is at most 1.

    Args:
        problem: The options.
        excess: The number of a kind of which a choice costs too much in exact arithmetic; None where it fits.
        gap: Relative gap that suffices.
        time_limit: Seconds after which the best found until then is taken.
        start: A choice to begin with, by name.
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
        self.bound, self.loss = 0.0, float("inf")
        self.chosen: tuple[int, ...] | None = None
        if start is not None:
            started = np.flatnonzero(problem.names == np.array(start)[problem.owner])
            if len(started) == len(problem.starts):
                self._offer(started)

    def run(self) -> Answer:
        """Searches."""
        self._narrow()
        if self.chosen is None:
            impossible = self._ask_solver(None)
            if self.chosen is None:
                return Answer(None, self.bound, impossible)
            self._narrow()
        while not self._done:
            before = self.loss
            self._ask_solver(_SCALE / before)
            if self._done or self.loss > before / 10:
                break
            self._narrow()  # what matters is far smaller than the solver was told
        return Answer(self.chosen, min(self.bound, self.loss))

    @property
    def _done(self) -> bool:
        return self.loss - self.bound <= self.gap * self.loss or perf_counter() > self.end

    # --------------------------------------------------------------------------------- bounds and first answers

    def _narrow(self) -> None:
        """Finds bounds and answers, and leaves out what they rule out, as long as that is much."""
        for _ in range(_ROUNDS):
            before = len(self.view.losses)
            self._leave_out(self._bisect_price())
            if self._done or len(self.view.losses) > 0.8 * before:
                break

    def _bisect_price(self) -> Priced:
        """Looks where, at growing prices of all kinds alike, the best options begin to fit.

        Returns:
            What gave the highest bound.
        """
        view = self.view
        worth = view.costs.sum(1)
        tall, wide = view.losses[view.losses > 0], worth[worth > 0]
        unit = np.ones(view.costs.shape[1])
        best = self._look(view.at(unit * 0.0))
        if view.within(best.chosen) or not tall.size or not wide.size:
            return best
        # Beyond these prices only loss counts, or only cost.
        low, high = np.log(tall.min() / wide.max()) - 30, np.log(tall.max() / wide.min()) + 30
        fits = view.within(self._look(view.at(unit * np.exp(high))).chosen)
        last = None
        for _ in range(_STEPS):
            middle = (low + high) / 2
            priced = view.at(unit * np.exp(middle))
            if priced.bound > best.bound:
                best = priced
            # Where even the cheapest do not fit in every kind, the price of the highest bound is still looked for.
            if view.within(priced.chosen) if fits else worth[priced.chosen].sum() <= len(unit):
                high, last = middle, priced
            else:
                low = middle
            if high - low < 1e-9:
                break
        for priced in filter(None, (last, best)):
            self._look(priced)
        return best

    def _look(self, priced: Priced) -> Priced:
        """Takes note of a bound, and of the answer it may be near."""
        self.bound = max(self.bound, priced.bound)
        if self.view.within(priced.chosen):
            self._offer(priced.chosen)
        return priced

    def _offer(self, chosen: Ints) -> int | None:
        """Takes an answer, as good as it can be made, if it fits and is the best so far.

        Returns:
            The number of a kind of which it costs too much, None where it fits or would be no better.
        """
        over = None
        for answer in (_improved(self.view, chosen), chosen):
            names, loss = tuple(self.view.names[answer].tolist()), self.view.loss(answer)
            if loss >= self.loss:
                return None
            over = self.excess(names)
            if over is None:
                self.chosen, self.loss = names, loss
                return None
        return over

    def _leave_out(self, priced: Priced) -> None:
        """Leaves out the options that no answer better than the best one known has."""
        if self.chosen is None:
            return
        view, most = self.view, self.loss * (1 + _ROUNDING) + _ROUNDING * float(priced.prices.sum())
        self.view = view.keep((view.losses <= most) & (priced.bound + priced.behind <= most))

    # ------------------------------------------------------------------------------------------------ the solver

    def _ask_solver(self, scale: float | None) -> bool:
        """Asks the solver for an answer among the options that are left.

        Args:
            scale: What makes losses the solver's numbers; None where any answer will do.

        Returns:
            Whether it proved that there is none.
        """
        view, cuts = self.view, list[Floats]()
        losses = view.losses * scale if scale else np.zeros_like(view.losses)
        for attempt in range(_CUTS + 4):
            exact = attempt < _CUTS
            room = 1.0 if exact else 1.0 - _TIGHTER * 4 ** (attempt - _CUTS)
            options = {"mip_rel_gap": self.gap, "time_limit": max(0.1, self.end - perf_counter())}
            solved = _solved(view, losses, room, cuts, options)
            if exact and scale and solved.mip_dual_bound is not None:
                self.bound = max(self.bound, (float(solved.mip_dual_bound) - _UNSURE) / scale)
            if solved.x is None:
                return exact and int(solved.status) == _NONE
            chosen = view.starts + np.array([int(np.argmax(part)) for part in np.split(solved.x, view.starts[1:])])
            over = self._offer(chosen)
            if over is None:
                break
            # No choice that costs at least as much of this kind in every group fits either.
            cuts.append((view.costs[:, over] >= view.costs[chosen, over][view.owner]).astype(float))
        return False


def _improved(view: Knapsack, chosen: Ints) -> Ints:
    """A choice with better options for single groups as long as they fit, the largest gain first."""
    chosen = chosen.copy()
    left = 1.0 - view.costs[chosen].sum(0)
    gains = view.losses[chosen][view.owner] - view.losses
    fitting = (view.costs - view.costs[chosen][view.owner] <= left).all(1)
    useful = np.flatnonzero((gains > 0) & fitting)
    for at in useful[np.argsort(-gains[useful], kind="stable")]:
        now = chosen[view.owner[at]]
        need = view.costs[at] - view.costs[now]
        if view.losses[at] < view.losses[now] and (need <= left).all():
            left, chosen[view.owner[at]] = left - need, at
    return chosen


def _solved(
    view: Knapsack, losses: Floats, room: float, cuts: Sequence[Floats], options: Mapping[str, float | int]
) -> Any:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    count = len(view.owner)
    one_each = csr_array((np.ones(count), (view.owner, np.arange(count))), shape=(len(view.starts), count))
    constraints = [LinearConstraint(one_each, 1, 1)]
    used = view.costs.any(0)
    if used.any():
        constraints.append(LinearConstraint(view.costs[:, used].T, -np.inf, room))
    if cuts:
        constraints.append(LinearConstraint(np.array(cuts), -np.inf, len(view.starts) - 1))
    return milp(losses, integrality=np.ones(len(losses)), bounds=Bounds(0, 1), constraints=constraints, options=options)
