"""The smallest model that keeps a metric: `search`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..core.errors import RefusedError
from ..core.processes import of_first
from ..edit.apply import carry_out
from ..planning.allocator import Choice
from ..planning.budget import Limit
from ..planning.planner import Planner
from .recover import trained

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Smallest:
    """The smallest model that keeps a metric; ``tried``: each one's share of the cost and metric, in order."""

    choice: Choice
    before: float
    after: float
    tried: tuple[tuple[float, float], ...]


def search(
    planner: Planner,
    metric: Metric,
    max_drop: float,
    *,
    kind: str = "macs",
    budgets: Sequence[Limit] = (),
    steps: int = 7,
) -> Smallest:
    """The smallest model whose metric falls by no more than that, by halving the interval of budgets.

    Args:
        planner: The model, calibrated.
        metric: Of a model; larger is better.
        max_drop: How much it may fall, in its own unit.
        kind: What is to be small.
        budgets: Limits that hold beside it.
        steps: How many models to try.

    Raises:
        RefusedError: If no smaller model keeps the metric.
    """
    before = float(metric(planner.model))
    original, least = planner.original[kind], planner.least(kind, budgets)
    tried: list[tuple[float, float]] = []
    low, high, best = 0, 2**steps, None
    while low <= high and len(tried) < steps:
        middle = (low + high + 1) // 2
        choice = planner.at(kind, max(least, original + (least - original) * middle / 2**steps), budgets)
        if not choice.plan.ops:
            break
        planner.say(f"trying {choice.costs[kind] / original:.1%} of the {kind}", len(tried) / steps)
        rewritten = carry_out(planner.model, choice.plan, decomposer=planner.decomposer).model
        trained(planner, rewritten, planner.refit(rewritten, choice.plan))
        after = of_first(float(metric(rewritten)))
        tried.append((choice.costs[kind] / original, after))
        if after >= before - max_drop:
            best, low = Smallest(choice, before, after, tuple(tried)), middle + 1
        else:
            high = middle - 1
    if best is None:
        raise RefusedError(
            "no smaller model keeps the metric",
            expected=f"at least {before - max_drop:.4g}",
            got=", ".join(f"{value:.4g} at {share:.1%} of the {kind}" for share, value in tried) or None,
        )
    return replace(best, tried=tuple(tried))
