"""Other ways to plan where more is lost on held-out inputs than was predicted; what loses least there is kept.

Without what the plan does to several layers at once; and in the other norms, where much more is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ..core.options import Budget
from ..core.processes import of_first
from ..planning.allocator import Choice
from ..planning.fitting import Fit
from ..planning.outputs import FAR
from ..planning.planner import Planner
from .steps import Progress, State

Way = Callable[[Planner], Planner]
"""From a planner to one that plans otherwise."""


@dataclass(frozen=True)
class Attempt:
    """A plan carried out and fitted: who planned, what was chosen (None where the plan was given), what came of it."""

    planner: Planner
    choice: Choice | None
    state: State
    fit: Fit

    @property
    def loss(self) -> float:
        """What held-out inputs lose."""
        assert self.fit.held_out is not None
        return of_first(self.fit.held_out.loss)


def other_ways(attempt: Attempt, budget: Budget, *, timed: bool) -> dict[str, Way]:
    """Other ways to plan where more is lost than predicted, by name.

    In the other norms only where the norm, its limits and the plan were not given, nor latencies (``timed``), which are
    those of candidates that would have to be measured anew.
    """
    planner, choice, held_out = attempt.planner, attempt.choice, attempt.fit.held_out
    norm = planner.settings.sensitivity
    if choice is None or held_out is None or norm != "loss" or budget.max_drop is not None:
        return {}
    ways: dict[str, Way] = {}
    own = budget.sensitivity is None and budget.max_layer_error is None
    if of_first(far_above(held_out.loss, choice.loss)) and own and not timed:
        ways = {name: partial(Planner.in_norm, sensitivity=name) for name in ("activations", "weights")}
    offered = tuple(dict.fromkeys(group.action for group in planner.joint))
    used = {op.action for op in choice.plan.ops}.intersection(offered)
    if of_first(held_out.loss > choice.loss) and used and planner.layers:
        fewer = [(action,) for action in offered if action in used]
        for actions in (*fewer, offered) if len(offered) > 1 else fewer:
            ways[f"without {' and '.join(actions)}"] = partial(Planner.without, actions=actions)
    return ways


def best_attempt(
    first: Attempt,
    ways: Mapping[str, Way],
    notes: Sequence[str],
    again: Callable[[Planner], Attempt | None],
    say: Progress,
) -> Attempt:
    """The attempt that loses least on held-out inputs, of the first and those in other ways; a note says so.

    Args:
        first: The first.
        ways: The other ways to plan, by name.
        notes: What the planner of the first had noted before it.
        again: Carries out and fits what another planner chooses; None where that does not meet the limits.
        say: Called at each step.
    """
    tried = {str(first.planner.settings.sensitivity) if "weights" in ways else "the first plan": first}
    for name, way in ways.items():
        say(f"planning {name if ' ' in name else f'by {name}'}", None)
        planner = way(first.planner)
        planner.notes[:] = notes
        if (attempt := again(planner)) is not None:
            tried[name] = attempt
    kept = min(tried, key=lambda name: tried[name].loss)
    names = dict.fromkeys((*tried, *ways))
    losses = ", ".join(
        f"{name} {f'{tried[name].loss:.3g}' if name in tried else 'misses the limits'}" for name in names
    )
    how = ["in every norm"] if "weights" in ways else []
    how += [name for name in ways if name.startswith("without ")]
    plan = f"the plan {kept}" if kept.startswith("without ") else kept
    tried[kept].planner.notes.append(
        f"the loss measured is {'far ' if 'weights' in ways else ''}above the predicted one: planned "
        f"{' and '.join(how)} (held-out loss: {losses}); {plan} is kept"
    )
    return tried[kept]


def far_above(measured: float, predicted: float) -> bool:
    """Whether a loss is far above what was predicted."""
    return measured > FAR * predicted and measured > 1e-3
