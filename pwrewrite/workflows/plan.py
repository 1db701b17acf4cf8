"""Planning without doing: `plan` under a budget, `make_plan` with what it would change, `frontier` over all budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..capturing import Inputs
from ..core.errors import UsageError
from ..core.modes import plain_modes
from ..core.options import Budget
from ..core.plan import Plan
from ..core.records import Shown
from ..core.text import NO_WEIGHTS
from ..planning.allocator import Choice
from ..planning.budget import budgets_of
from ..planning.planner import Planner, costs_of
from ..report.records import BudgetReport, Frontier, Report
from ..targets import LoadedModel, describe_inputs
from .budget import curve_of, metrics_of, not_carried_out, planner_of, point_of, report_of
from .smallest import search
from .steps import Progress, Run, model_facts, silent
from .subject import Subject, check_editable, loaded_of, origin_of, with_notes_of
from .what import What, opened, what_from_keywords


@dataclass(frozen=True, repr=False)
class Planned(Shown):
    """A plan that was not carried out, and what it would change, from shapes alone: no errors, no verification."""

    plan: Plan
    report: Report


@plain_modes()
def make_plan(
    model: Subject,
    example_inputs: Inputs | None = None,
    what: What | None = None,
    *,
    target: str | None = None,
    progress: Progress | None = None,
    **options: object,
) -> Planned:
    """The plan that `rewrite` would carry out, without decomposing weights where no later pass reads them.

    Arguments and errors are those of `rewrite`; with a metric and ``max_drop``, the smallest model that keeps it is
    planned.

    Returns:
        The plan, *from the model as it is*, and what it would change.
    """
    what, _ = what_from_keywords("make_plan", what, options)
    loaded = loaded_of(model, example_inputs)
    target = target or loaded.target or None
    budget_report: BudgetReport | None = None
    notes: tuple[str, ...] = ()
    curve: Callable[[], Frontier] | None = None
    if isinstance(what, Budget):
        what, budget_report, notes, curve = _within(what, loaded, progress)
    run = Run(loaded.model, loaded.example_inputs, progress or silent, fill=False)
    run.all(what)
    if budget_report is not None and isinstance(what, Plan) and (left := not_carried_out(run, what)):
        before, after = costs_of(run.first), costs_of(run.state.captured)
        reached = {kind: after[kind] / before[kind] for kind in budget_report.reached if kind in after}
        budget_report = replace(budget_report, reached={**budget_report.reached, **reached})
        notes += (f"{left}; rewrite plans anew without what cannot be carried out",)
    if not run.state.rows:
        check_editable(loaded.model)
    report = with_notes_of(loaded, run.report(*run.analyses(target), target, None))
    report = replace(report, budget=budget_report, frontier=curve, notes=tuple(dict.fromkeys((*report.notes, *notes))))
    plan = run.finished(target)
    return Planned(replace(plan, model={**plan.model, **origin_of(loaded)}), report)


@plain_modes()
def plan(
    model: Subject,
    example_inputs: Inputs | None,
    budget: object,
    calibration: Iterable[object] | str | None = None,
    *,
    progress: Progress | None = None,
    **options: object,
) -> Plan:
    """Chooses which layers to rewrite, in which form and how wide, so that a budget is met at the least loss.

    Args:
        model: Any module, or what `pwrewrite.load_target` gives; stays as it is.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword ones.
        budget: A `pwrewrite.Budget`, or its limits: ``{"macs": 0.5, "params": "12M"}``; floats up to 1 are ratios of
            the original.
        calibration: A few hundred unlabelled inputs: any iterable of batches (a tensor, a tuple of positional inputs or
            a dict of keyword ones). Without it the weights' own errors count, which is much poorer.
        progress: Called at each step.
        **options: Fields of `pwrewrite.Budget`: ``forms``, ``exclude``, ``sensitivity``, ….

    Returns:
        The plan, for `pwrewrite.rewrite`; ``plan.budget`` holds the predicted loss.

    Raises:
        RefusedError: If the budget cannot be met.
        UsageError: If a setting or the calibration makes no sense.
    """
    if calibration is not None:
        options["calibration"] = calibration
    what, _ = what_from_keywords("plan", None, {"budget": budget, **options})
    if not isinstance(what, Budget):
        raise UsageError("there is no budget", expected='such as {"macs": 0.5}')
    loaded = loaded_of(model, example_inputs)
    run = Run(loaded.model, loaded.example_inputs, progress or silent)
    planner = planner_of(run, opened(what, loaded))
    chosen = run.state.plan + planner.choose(budgets_of(what.limits)).plan
    return replace(chosen, model=model_facts(run.first, inputs=describe_inputs(loaded.example_inputs)))


@plain_modes()
def frontier(
    model: Subject, example_inputs: Inputs | None, budget: Budget, *, points: int = 25, progress: Progress | None = None
) -> Frontier:
    """The least predicted loss at every budget of MACs, at so many points, within limits of other kinds."""
    limits = budgets_of(budget.limits)
    if any(limit.kind == "macs" for limit in limits):
        raise UsageError(
            "--pareto goes through every budget of MACs", hint="leave that --budget out; those of other kinds hold"
        )
    loaded = loaded_of(model, example_inputs)
    planner = planner_of(Run(loaded.model, loaded.example_inputs, progress or silent), opened(budget, loaded))
    choices = planner.frontier("macs", limits, points)
    rows = tuple(map(point_of, choices))
    random = any(note.startswith(NO_WEIGHTS) for note in loaded.notes)
    return Frontier(loaded.target, "macs", dict(planner.original), str(planner.settings.sensitivity), rows, random)


def _within(
    budget: Budget, loaded: LoadedModel, progress: Progress | None
) -> tuple[Plan, BudgetReport | None, tuple[str, ...], Callable[[], Frontier] | None]:
    """The plan within a budget, with what it predicts, what a reader should know, and the frontier that it lies on."""
    if budget.plan is not None:
        return budget.plan, None, (), None
    budget = opened(budget, loaded)
    run, limits = Run(loaded.model, loaded.example_inputs, progress or silent), budgets_of(budget.limits)
    planner = planner_of(run, budget)
    if budget.max_drop is None:
        choice = planner.choose(limits)
        curve = curve_of(planner, choice, limits, loaded.target)
        return run.state.plan + choice.plan, _predicted(planner, choice, {}), tuple(planner.notes), curve
    ((name, metric),) = metrics_of(budget).items()
    result = search(planner, metric, budget.max_drop, budgets=limits)
    tried = ", ".join(f"{share:.1%} of the MACs: {name} {value:.4g}" for share, value in result.tried)
    metrics = {name: (result.before, result.after)}
    whole = run.state.plan + result.choice.plan
    curve = curve_of(planner, result.choice, limits, loaded.target)
    return whole, _predicted(planner, result.choice, metrics), (*planner.notes, f"tried {tried}"), curve


def _predicted(planner: Planner, choice: Choice, metrics: dict[str, tuple[float, float]]) -> BudgetReport:
    limits, statistics = choice.plan.budget.get("limits", {}), planner.statistics
    costs = {kind: cost for kind, cost in choice.costs.items() if kind in limits and planner.original[kind]}
    return replace(
        report_of(planner, limits, choice.loss, choice.gap),
        reached={kind: cost / planner.original[kind] for kind, cost in costs.items()},
        kind="classes" if statistics is None else statistics.outcome or "values",
        metrics=metrics,
    )
