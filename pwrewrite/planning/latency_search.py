"""The allocation under which the whole model, not its layers one by one, takes no longer than a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter

from ..core.errors import RefusedError
from ..core.plan import Plan
from .allocator import Allocator, Choice
from .budget import Limit
from .groups import Group
from .latency import MEASURED
from .running import Say

_ATTEMPTS = 7
"""How many plans for a latency budget are timed at most."""
_NEAR, _WASTED = 1.01, 0.96
"""How near to its limit, from above and below, a time is near enough."""


def scale_times(groups: Sequence[Group], model: float) -> None:
    """Scales times down, in place, where they add up to more than the model's: alone layers miss caches and fusion."""
    alone = {path: seconds for group in groups for path, seconds in group.alone.items()}
    total = sum(alone.values())
    for group in groups if total > model else ():
        group.scale_latency(model / total)


def within_latency(
    allocator: Allocator,
    limits: Sequence[Limit],
    choose: Callable[[Mapping[str, float]], Choice],
    share_of: Callable[[Plan], float],
    *,
    best_effort: bool,
    say: Say,
    missed: tuple[Choice, float] | None = None,
) -> Choice:
    """Allocates by the layers' own times, and corrects the limit until the whole model meets it.

    Layers do not add up to the model, and the best of many measured candidates is partly lucky: what the whole model
    saves, as a part of what its layers promise, corrects the limit, also upwards where more was given up than had to
    be. Where no allocation is tight enough, the tightest one decides.

    Args:
        allocator: With the times of its candidates and of the model.
        limits: One of which is on latency.
        choose: What allocates within limits by kind, as `Allocator.choose`.
        share_of: What the whole model takes with a plan carried out, as a share of its time before.
        best_effort: Whether the tightest allocation is taken where it is not tight enough.
        say: Called at each step.
        missed: A choice and the share of the time that it turned out to take, which was too much.

    Raises:
        RefusedError: If none is within the limits.
    """
    absolute, original = allocator.absolute(limits), allocator.original["latency"]
    wanted = aim = absolute["latency"] / original
    tried: list[tuple[float, Choice]] = []
    known = {1.0: 1.0}  # what the layers promise, to what the whole model takes
    if missed is not None:
        known[missed[0].promised / original] = missed[1]
        aim = _aim(known, wanted)
    while len(tried) < _ATTEMPTS:
        try:
            choice = choose({**absolute, "latency": aim * original})
        except RefusedError:
            if not tried and missed is None and not best_effort:
                raise
            others = {kind: limit for kind, limit in absolute.items() if kind != "latency"}
            choice = allocator.cheapest("latency", limits, others)
        if any(choice.plan.ops == before.plan.ops for _, before in tried):
            break
        say("timing the plan", len(tried) / _ATTEMPTS)
        reached = share_of(choice.plan)
        tried.append((reached, choice))
        if reached <= wanted * _NEAR and (reached >= wanted * _WASTED or not choice.plan.ops):
            break
        known[choice.costs["latency"] / original] = reached
        aim = _aim(known, wanted)
    met = [each for each in tried if each[0] <= wanted * _NEAR]
    reached, choice = max(met, key=itemgetter(0)) if met else min(tried, key=itemgetter(0))
    if reached > wanted * MEASURED and not best_effort:
        limit = next(limit for limit in limits if limit.kind == "latency")
        raise RefusedError(
            f"the budget {limit} cannot be met: what is not a convolution or linear map takes the rest",
            expected=f"at least latency={reached:.2f}, {1000 * reached * original:.3g} ms of "
            f"{1000 * original:.3g} ms, as measured for the whole model",
            got=str(limit),
            hint="loosen it, allow more --forms or layers, or take the fastest there is with --best-effort",
        )
    promised = choice.costs["latency"]
    return replace(choice, costs={**choice.costs, "latency": reached * original}, promised=promised)


def _aim(known: Mapping[float, float], wanted: float) -> float:
    """What the layers should promise so that the model takes the share ``wanted``, by the nearest plans timed."""
    reached, promised = min((took, share) for share, took in known.items() if took >= wanted)
    below = max(((took, share) for share, took in known.items() if took < wanted), default=None)
    if below is None:  # as much again for each part as the nearest one saved
        return 1 - (1 - wanted) / max(0.1, (1 - reached) / max(1 - promised, 1e-9))
    return below[1] + (promised - below[1]) * (wanted - below[0]) / (reached - below[0])
