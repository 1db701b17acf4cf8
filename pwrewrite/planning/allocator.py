"""What each layer becomes within limits, as a plan: `Allocator`, between candidates and the knapsack (`allocate`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import RefusedError
from ..core.numbers import plural
from ..core.plan import Plan, Skip, SkipReason
from .allocate import Allocation, Infeasible, allocate, frontier
from .budget import Limit
from .groups import Candidate, Group

_REMEDIES = {
    SkipReason.PARAMETRIZED: "bake the parametrizations into plain weights first (--bake)",
    SkipReason.EXCLUDED: "include more layers",
    SkipReason.ALREADY_BOTTLENECK: "plan from the original model: layers that were rewritten stay as they are",
    SkipReason.HOOKS: "take the hooks off the layers first",
}
"""What helps against a reason for which a layer is left."""


@dataclass(frozen=True)
class Choice:
    """One allocation as a plan: predicted loss and proven gap as in `Allocation`, and what the whole model costs.

    ``promised``: seconds that the layers' own times add up to, where ``costs`` have those of the whole model.
    """

    plan: Plan
    loss: float
    gap: float
    costs: Mapping[str, float]
    promised: float = 0.0


@dataclass(frozen=True)
class Allocator:
    """Chooses among the candidates of the layers that may change.

    Attributes:
        groups: What may change: layers, and several at once, which excludes changes of these alone.
        original: What the model costs now, by kind.
        skips: The layers that may not change, and why.
        facts: What a plan records beside its limits and loss.
        bakes: Whether baking would make plain weights of any that are computed now; asked where a limit is missed.
    """

    groups: Sequence[Group]
    original: Mapping[str, float]
    skips: Sequence[Skip]
    facts: Mapping[str, object]
    bakes: Callable[[], bool]

    def absolute(self, limits: Sequence[Limit]) -> dict[str, float]:
        """Limits in the units of what the model costs, by kind."""
        return {limit.kind: limit.absolute(self.original[limit.kind]) for limit in limits}

    def choose(self, limits: Sequence[Limit], absolute: Mapping[str, float]) -> Choice:
        """The allocation that loses least within limits, given as such for the message and as numbers."""
        try:
            return self._choice(allocate(self._candidates, self._left(absolute)), limits)
        except Infeasible as error:
            raise self._unmet(error, limits) from None

    def cheapest(self, kind: str, limits: Sequence[Limit], others: Mapping[str, float]) -> Choice:
        """The choice that costs least of one kind, within limits of others."""
        try:
            return self._choice(frontier(self._candidates, kind, limits=self._left(others), points=2)[-1], limits)
        except Infeasible as error:
            raise self._unmet(error, limits) from None

    def frontier(
        self, kind: str, limits: Sequence[Limit] = (), points: int = 25, *, rough: bool = False
    ) -> list[Choice]:
        """As `Planner.frontier`, whose work this is; within three hundredths of the least losses where ``rough``."""
        try:
            left = self._left(self.absolute(limits))
            allocations = frontier(self._candidates, kind, limits=left, points=points, rough=rough)
        except Infeasible as error:
            raise self._unmet(error, limits) from None
        return [self._choice(allocation, limits) for allocation in allocations]

    @property
    def _candidates(self) -> list[list[Candidate]]:
        return [group.candidates for group in self.groups]

    def _fixed(self, kind: str) -> float:
        """What the part of the model that cannot change costs."""
        return self.original[kind] - sum(group.candidates[0].costs[kind] for group in self.groups)

    def _left(self, absolute: Mapping[str, float]) -> dict[str, float]:
        """What limits leave to the layers that may change."""
        return {kind: limit - self._fixed(kind) for kind, limit in absolute.items()}

    def _choice(self, allocation: Allocation, limits: Sequence[Limit]) -> Choice:
        picked = [(group, group.candidates[i]) for group, i in zip(self.groups, allocation.chosen)]
        ops = tuple(candidate.op for _, candidate in picked if candidate.op is not None)
        kept = "kept: the budget is met at less loss elsewhere"
        changed = {path for _, candidate in picked for path in candidate.claims}
        paths = dict.fromkeys(group.kept for group, candidate in picked if candidate.op is None)
        unchanged = [Skip(path, SkipReason.NO_GAIN, kept) for path in paths if path is not None and path not in changed]
        costs = {
            kind: before + sum(candidate.costs[kind] - group.candidates[0].costs[kind] for group, candidate in picked)
            for kind, before in self.original.items()
        }
        loss, gap = allocation.loss, allocation.gap
        texts = {limit.kind: str(limit).partition("=")[2] for limit in limits}
        facts = {"limits": texts, "predicted_loss": loss, "gap": gap, **self.facts}
        return Choice(Plan(ops, (*self.skips, *unchanged), {}, facts), loss, gap, costs)

    def _unmet(self, error: Infeasible, limits: Sequence[Limit]) -> RefusedError:
        (left, hint), kind = self._left_out(), error.kind
        totals = {k: least + self._fixed(k) for k, least in error.least.items()}
        if kind is None:
            each = [f"{k}={_amount(k, total)}" for k, total in totals.items()]
            return RefusedError(
                f"the budgets {' and '.join(map(str, limits))} cannot be met together{left}",
                expected=f"within the others, at least {' or '.join(each)}" if each else None,
                hint=f"loosen one of them, {hint}",
            )
        least, limit = totals[kind], next(limit for limit in limits if limit.kind == kind)
        share = least / self.original[kind] if self.original[kind] else 1.0
        return RefusedError(
            f"the budget {limit} cannot be met{left}",
            expected=f"at least {kind}={share:.4f}, {_amount(kind, least)} of {_amount(kind, self.original[kind])}",
            got=str(limit),
            hint=f"loosen it, {hint}",
        )

    def _left_out(self) -> tuple[str, str]:
        """Why layers were left, counted (empty where none was), and what helps against the most frequent reason."""
        counts = Counter(skip.reason for skip in self.skips if skip.reason is not SkipReason.POINTWISE).most_common()
        reasons = [reason for reason, _ in counts if reason in _REMEDIES]
        remedy = _REMEDIES[reasons[0]] if reasons else "allow more --forms or layers"
        if reasons[:1] == [SkipReason.PARAMETRIZED] and not self.bakes():
            remedy = "store the weights that the model's code computes as parameters"
        each = ", ".join(f"{count} {reason}" for reason, count in counts)
        total = sum(count for _, count in counts)
        left = f": {plural(total, 'layer is', 'layers are')} left as {'it is' if total == 1 else 'they are'} ({each})"
        return left if counts else "", f"or {remedy}"


def _amount(kind: str, value: float) -> str:
    return f"{1000 * value:.3g} ms" if kind == "latency" else f"{value:,.0f}"
