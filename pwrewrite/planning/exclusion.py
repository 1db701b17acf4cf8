"""Groups of which not every two may change at once: the cheapest way to decide them all, exactly, at given prices.

Groups are decided one after another; of what was decided only the claims that a later group could make again matter.
So the decisions are paths through a small layered graph, a decision diagram (Bergman, Cire, van Hoeve & Hooker 2016,
*Decision Diagrams for Optimization*, sections 3 and 4), and the cheapest path is the cheapest choice. A layer that
would grow too wide is narrowed by forgetting claims, after which the cheapest path is a bound.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_WIDEST = 256
"""How many states of a layer are told apart."""


class Layer(NamedTuple):
    """One group to decide: where each state leads without its claims and with them (None where one is taken)."""

    group: int
    without: list[int]
    claiming: list[int | None]
    width: int


class Margins(NamedTuple):
    """By how much the least total grows where a group must claim nothing, and where it must claim; ``(groups,)``.

    0 for groups that share no claims, and for all where nothing is possible; infinite where only that is impossible.
    """

    without: Floats
    claiming: Floats


class Exclusion:
    """What groups claim: ``claims (groups, things)`` is 1 where a group that changes claims a thing."""

    def __init__(self, claims: Floats) -> None:
        things = {int(group): np.flatnonzero(claims[group]) for group in np.flatnonzero(claims.any(1))}
        order = sorted(things, key=lambda group: (int(things[group][0]), -int(things[group][-1]), group))
        masks = {group: sum(1 << int(thing) for thing in things[group]) for group in order}
        later = [0]  # what the groups after each may claim
        for group in reversed(order):
            later.append(later[-1] | masks[group])
        self._layers = list[Layer]()
        states = [0]
        for group, open_ in zip(order, reversed(later[:-1])):
            mask, after = masks[group], dict[int, int]()
            kept = [after.setdefault(state & open_, len(after)) for state in states]
            free = [not state & mask for state in states]
            taken = [after.setdefault((s | mask) & open_, len(after)) if ok else None for s, ok in zip(states, free)]
            states = list(after)
            if len(states) > _WIDEST:
                states, joined = _joined(states)
                kept = [joined[i] for i in kept]
                taken = [None if i is None else joined[i] for i in taken]
            self._layers.append(Layer(group, kept, taken, len(states)))

    def cheapest(self, without: Floats, claiming: Floats) -> list[tuple[int, bool]]:
        """Which groups claim, for what each costs either way ``(groups,)``; without where equal, last group last."""
        after = self._after(without.tolist(), claiming.tolist())
        state, choice = 0, list[tuple[int, bool]]()
        for layer, rest in zip(self._layers, after[1:]):
            kept, taken = layer.without[state], layer.claiming[state]
            claims = taken is not None and claiming[layer.group] + rest[taken] < without[layer.group] + rest[kept]
            choice.append((layer.group, claims))
            state = taken if claims and taken is not None else kept
        return choice

    def margins(self, without: Floats, claiming: Floats) -> Margins:
        """What a decision about one group costs above the cheapest, for what each costs either way, ``(groups,)``."""
        free, taking = without.tolist(), claiming.tolist()
        margins = Margins(np.zeros(len(free)), np.zeros(len(free)))
        after, before = self._after(free, taking), [0.0]
        total = after[0][0]
        if total == inf:
            return margins
        for layer, rest in zip(self._layers, after[1:]):
            least, taken_least, reached = inf, inf, [inf] * layer.width
            for so_far, kept, taken in zip(before, layer.without, layer.claiming):
                cost = so_far + free[layer.group]
                least, reached[kept] = min(least, cost + rest[kept]), min(reached[kept], cost)
                if taken is not None:
                    cost = so_far + taking[layer.group]
                    taken_least, reached[taken] = min(taken_least, cost + rest[taken]), min(reached[taken], cost)
            margins.without[layer.group], margins.claiming[layer.group] = least - total, taken_least - total
            before = reached
        return margins

    def _after(self, without: list[float], claiming: list[float]) -> list[list[float]]:
        """The least that deciding the rest costs, by state, before each layer and at the end."""
        rest = [0.0] * (self._layers[-1].width if self._layers else 1)
        after = [rest]
        for layer in reversed(self._layers):
            free, taking = without[layer.group], claiming[layer.group]
            rest = [
                free + rest[kept] if taken is None else min(free + rest[kept], taking + rest[taken])
                for kept, taken in zip(layer.without, layer.claiming)
            ]
            after.append(rest)
        return after[::-1]


def _joined(states: list[int]) -> tuple[list[int], list[int]]:
    """States, those beyond the widest as one that has taken what all of them have; and where each is."""
    rest = states[_WIDEST - 1]
    for state in states[_WIDEST:]:
        rest &= state
    return [*states[: _WIDEST - 1], rest], [min(i, _WIDEST - 1) for i in range(len(states))]
