"""Planning under a budget for what a person types: `plan_budget`, `rewrite_budget`, `frontier_of`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import RefusedError, UsageError
from ..core.plan import Plan
from ..planning.budget import Budget
from ..planning.planner import Choice, Planner
from ..planning.settings import Settings
from ..report.frontier import Frontier, Point
from ..report.records import BudgetReport
from ..targets.calibration import open_calibration, open_labels, open_metric
from ..targets.opening import LoadedModel, TargetOptions, open_target
from .budget import Ask, Metric, search
from .by_target import origin_of, told, whole_plan
from .choices import Choices
from .rewrite import Planned, Progress, Rewritten, make_plan, rewrite_asked

_OF_CHOICES = ("include", "exclude", "multiple", "replan", "allow_output_change")


@dataclass(frozen=True)
class BudgetRequest:
    """What is asked of a plan under a budget, as a person types it.

    Attributes:
        budgets: Limits; none where a plan or a metric decides.
        calibration: A file, a folder or ``file.py:NAME``.
        preprocess: ``file.py:NAME``.
        size: Use at most so many calibration inputs.
        forms: Names of forms or sets of them.
        sensitivity: In what norm an error counts.
        refit: What is fitted.
        largest_error: Largest relative error of one layer.
        metric: ``file.py:NAME``.
        labels: File with the class of each calibration input.
        max_drop: How much the metric may fall.
        gate: ``latency`` to use only what is measured to be faster.
    """

    budgets: tuple[Budget, ...] = ()
    calibration: str | None = None
    preprocess: str | None = None
    size: int | None = None
    forms: tuple[str, ...] = ("all",)
    sensitivity: str | None = None
    refit: str = "full"
    largest_error: float | None = None
    metric: str | None = None
    labels: Path | None = None
    max_drop: float | None = None
    gate: str | None = None

    def ask(self, opened: LoadedModel, choices: Choices, seed: int) -> Ask:
        """The same with everything opened.

        Raises:
            PwrewriteError: If a name leads to nothing usable.
        """
        data: Iterable[Any] | None = None
        if self.calibration is not None:
            data = open_calibration(
                self.calibration,
                example_inputs=opened.example_inputs,
                preprocess=self.preprocess,
                size=self.size,
                labels=open_labels(self.labels) if self.labels is not None else None,
                model=opened.model,
            )
        metrics: dict[str, Metric] | None = None
        if self.metric is not None:
            metrics = {self.metric.rpartition(":")[2]: open_metric(self.metric)}
        settings = Settings(
            self.forms,
            self.sensitivity,
            self.refit,
            choices.include,
            choices.exclude,
            choices.multiple,
            self.largest_error,
            choices.replan,
            seed,
            self.gate,
        )
        return Ask(self.budgets or None, data, self.size, settings, metrics)


def rewrite_budget(
    request: TargetOptions,
    choices: Choices,
    asked: BudgetRequest,
    plan: Plan | None = None,
    *,
    verify: bool = True,
    max_error: float | None = None,
    progress: Progress | None = None,
) -> Rewritten:
    """Rewrites what a target leads to within a budget, or by a plan with calibrated weights.

    Args:
        request: The target.
        choices: Which layers are meant; what belongs to passes is refused.
        asked: The budget and what goes with it.
        plan: Instead of a budget: a plan to carry out.
        verify: Whether to verify the result.
        max_error: Largest relative output error that passes.
        progress: Called at each step.

    Raises:
        PwrewriteError: If something that was typed leads to nothing usable, or the budget cannot be met.
    """
    _check(choices, asked, plan)
    opened = _opened(request, progress)
    result = rewrite_asked(
        opened.model,
        opened.example_inputs,
        asked.ask(opened, choices, request.seed),
        plan,
        choices.allow_output_change,
        verify=verify,
        max_error=max_error,
        target=request.target,
        progress=progress,
    )
    if not result.edits:
        raise RefusedError(
            "there is nothing to rewrite: the model is within the budget as it is",
            where=request.target,
            got=", ".join(map(str, asked.budgets)) or "a plan without ops that can be carried out",
        )
    return replace(result, plan=whole_plan(opened, result.plan), report=told(result.report, opened))


def plan_budget(
    request: TargetOptions, choices: Choices, asked: BudgetRequest, *, progress: Progress | None = None
) -> Planned:
    """The plan that `rewrite_budget` would carry out; with ``max_drop``, of the smallest model that keeps the metric.

    Raises:
        PwrewriteError: As for `rewrite_budget`.
    """
    _check(choices, asked, None)
    opened, planner, ask = _planner(request, choices, asked, progress)
    metrics: dict[str, tuple[float, float]] = {}
    notes = list(planner.notes)
    if asked.max_drop is not None:
        assert ask.metrics is not None
        ((name, metric),) = ask.metrics.items()
        found = search(planner, metric, asked.max_drop, budgets=asked.budgets)
        choice, metrics[name] = found.choice, (found.before, found.after)
        notes.append(
            "tried " + ", ".join(f"{share:.1%} of the MACs: {name} {value:.4g}" for share, value in found.tried)
        )
    else:
        choice = planner.choose(asked.budgets)
    planned = make_plan(
        opened.model, opened.example_inputs, None, choice.plan, target=request.target, progress=progress
    )
    report = replace(told(planned.report, opened), budget=_predicted(planner, choice, metrics))
    report = replace(report, notes=tuple(dict.fromkeys((*report.notes, *notes))))
    return Planned(replace(planned.plan, model={**planned.plan.model, **origin_of(opened)}), report)


def frontier_of(
    request: TargetOptions,
    choices: Choices,
    asked: BudgetRequest,
    *,
    points: int = 25,
    progress: Progress | None = None,
) -> Frontier:
    """The least predicted loss at every budget of MACs, within budgets of other kinds.

    Raises:
        PwrewriteError: As for `rewrite_budget`.
    """
    if any(b.kind == "macs" for b in asked.budgets):
        raise UsageError(
            "--pareto goes through every budget of MACs", hint="leave that --budget out; those of other kinds hold"
        )
    _check(choices, replace(asked, max_drop=None), None, pareto=True)
    _, planner, _ = _planner(request, choices, asked, progress)
    found = planner.frontier("macs", asked.budgets, points)
    rows = tuple(Point(dict(one.costs), one.loss, len(one.plan.ops)) for one in found)
    return Frontier(request.target, "macs", dict(planner.original), str(planner.settings.sensitivity), rows)


def parse_drop(text: str) -> float:
    """Reads ``--max-drop``: ``1%`` is 0.01.

    Raises:
        UsageError: If it is no number, or below 0.
    """
    stripped = text.strip()
    try:
        value = float(stripped[:-1]) / 100 if stripped.endswith("%") else float(stripped)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError("--max-drop is not a drop", expected="a number from 0 such as 0.01 or 1%", got=repr(text))
    return value


def _check(choices: Choices, asked: BudgetRequest, plan: Plan | None, *, pareto: bool = False) -> None:
    wrong = [name for name in choices.given if name not in _OF_CHOICES]
    if wrong:
        named = {"passes": "pass", "settings": "set"}.get(wrong[0], wrong[0].replace("_", "-"))
        raise UsageError(
            f"--{named} goes with passes, not with --budget or --calibration",
            hint="a budget chooses layers, forms and widths; --forms, --include and --exclude restrict it",
        )
    if plan is not None and asked.budgets:
        raise UsageError("--plan and --budget exclude each other", hint="a plan already says what to do")
    if plan is not None:
        chooses = {
            "--forms": asked.forms != ("all",),
            "--max-layer-error": asked.largest_error is not None,
            "--gate": asked.gate is not None,
            **{f"--{name.replace('_', '-')}": True for name in choices.given if name != "allow_output_change"},
        }
        for name in (name for name, given in chooses.items() if given):
            raise UsageError(f"--plan and {name} exclude each other", hint="a plan already says what to do")
    if asked.max_drop is not None and asked.metric is None:
        raise UsageError("--max-drop needs a --metric", hint="--metric eval.py:accuracy")
    if plan is None and not asked.budgets and asked.max_drop is None and not pareto:
        raise UsageError("there is no budget", expected="--budget macs=0.5, for example")


def _planner(
    request: TargetOptions, choices: Choices, asked: BudgetRequest, progress: Progress | None
) -> tuple[LoadedModel, Planner, Ask]:
    opened = _opened(request, progress)
    ask = asked.ask(opened, choices, request.seed)
    inputs = opened.example_inputs
    return opened, Planner(opened.model, inputs, ask.calibration, ask.settings, size=ask.size, say=progress), ask


def _opened(request: TargetOptions, progress: Progress | None) -> LoadedModel:
    if progress is not None:
        progress("loading", None)
    return open_target(request)


def _predicted(planner: Planner, choice: Choice, metrics: dict[str, tuple[float, float]]) -> BudgetReport:
    limits = choice.plan.budget.get("limits", {})
    reached = {
        kind: cost / planner.original[kind]
        for kind, cost in choice.costs.items()
        if kind in limits and planner.original[kind]
    }
    samples = planner.statistics.samples if planner.statistics is not None else 0
    settings = planner.settings
    return BudgetReport(
        limits,
        reached,
        str(settings.sensitivity),
        settings.refit,
        samples,
        choice.loss,
        choice.gap,
        kind="classes" if planner.statistics is None else planner.statistics.outcome or "values",
        metrics=metrics,
    )
