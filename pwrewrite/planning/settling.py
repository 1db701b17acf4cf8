"""Allocations whose changes of several layers at once lose what was measured: `settled`."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from ..core.plan import Op
from .allocator import Choice
from .groups import Candidate, MeasuredGroup
from .measuring import FEW, SAMPLES, LossMeter
from .running import Say

_ROUNDS = 5
"""How often a plan is made anew with what its changes were measured to lose."""


def settled(
    groups: Sequence[MeasuredGroup],
    meter: LossMeter | None,
    choose: Callable[[], list[Choice]],
    say: Say,
    *,
    glance: Callable[[], list[Choice]] | None = None,
) -> list[Choice]:
    """Choices of which every change that is in ``groups`` loses what was measured, not what was predicted.

    What is chosen is measured, and chosen again by that. Where there are several choices one change of each group is
    measured, on few inputs, and speaks for the others.

    Args:
        groups: Whose candidates get the losses that were measured.
        meter: Measures; None where losses are not those of the model.
        choose: Chooses among the candidates as they are.
        say: Called at each measurement.
        glance: Chooses roughly, to see what is worth a measurement; as ``choose`` where None.
    """
    look = glance or choose
    for _ in range(_ROUNDS if meter is not None else 0):
        choices = look()
        assert meter is not None
        one_each, chosen = len(choices) > 1, {id(op) for choice in choices for op in choice.plan.ops}
        if not _measure(groups, meter, chosen, say, one_each=one_each) and look is choose:
            return choices
        if one_each and look is choose:
            break
        look = choose
    return choose()


def _measure(
    groups: Sequence[MeasuredGroup], meter: LossMeter, chosen: Container[int], say: Say, *, one_each: bool
) -> bool:
    """Measures the changes that are chosen, by the identity of the op; whether any was not yet."""
    todo = list[tuple[MeasuredGroup, Candidate, Op]]()
    for group in groups:
        new = [(group, c, c.op) for c in group.candidates if c.op is not None and id(c.op) in chosen]
        new = [each for each in new if not group.prices.knows(each[1])]
        if one_each:
            new = [] if group.prices else new[len(new) // 2 :][:1]
        todo += new
    for i, (group, candidate, op) in enumerate(todo):
        say(f"measuring what the model loses at {group.path}", i / len(todo))
        group.prices.learn(candidate, meter.loss(group, op, FEW if one_each else SAMPLES))
    for group in {id(group): group for group, *_ in todo}.values():
        group.candidates = [group.prices.priced(candidate) for candidate in group.candidates]
    return bool(todo)
