"""A rewrite under a budget: plan, carry out, fit, measure; `plan` stops after the first.

What `pwrewrite.planning` works out for one model is put to use here on a `pwrewrite.workflows.steps.Run`. `search`
looks for the smallest model that keeps a metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..capturing import Inputs, split_inputs
from ..core.errors import RefusedError, UsageError
from ..core.plan import Plan
from ..edit.apply import carry_out
from ..planning.budget import Budget, budgets_of
from ..planning.latency import time_models
from ..planning.measure import FAR, accuracy, compare
from ..planning.planner import Choice, Planner
from ..planning.settings import Settings
from ..planning.statistics import samples_of
from ..report.records import BudgetReport, Report
from ..targets import describe_inputs
from .steps import Progress, Run, model_facts, silent

Metric = Callable[[nn.Module], float]

BudgetLike = Mapping[str, object] | Sequence[Budget]


@dataclass(frozen=True)
class Ask:
    """What a rewrite under a budget is asked.

    Attributes:
        budget: Limits; None where a plan is at hand and only its weights are to be calibrated.
        calibration: Any iterable of inputs, or `pwrewrite.planning.batches.Batches`.
        size: Use at most so many of them.
        settings: How to plan and to fit.
        metrics: Name to a callable on a model, larger is better; measured before and after.
    """

    budget: BudgetLike | None = None
    calibration: Iterable[Any] | None = None
    size: int | None = None
    settings: Settings = field(default_factory=Settings)
    metrics: Mapping[str, Metric] | None = None

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The limits.

        Raises:
            UsageError: If one makes no sense.
        """
        if self.budget is None:
            return ()
        return budgets_of(self.budget) if isinstance(self.budget, Mapping) else tuple(self.budget)


class Budgeted:
    """A run under a budget.

    Args:
        run: The run; nothing was done on it yet.
        ask: What is asked.

    Raises:
        PwrewriteError: If the budget or the calibration makes no sense, or calibrating fails.
    """

    def __init__(self, run: Run, ask: Ask) -> None:
        self.run, self.ask, self.budgets = run, ask, ask.budgets
        self._before = {name: self._score(name, metric, run.first.model) for name, metric in self._asked()}
        settings = ask.settings
        if not self.budgets:  # a plan has chosen already, and its layers need their statistics
            settings = replace(settings, forms=("all",), include=(), exclude=(), largest_error=None)
        self.planner = Planner(
            run.first.model,
            run.inputs,
            ask.calibration,
            settings,
            size=ask.size,
            say=run.say,
            captured=run.first,
        )

    def carry_out(self, plan: Plan | None) -> None:
        """Plans where there is no plan yet, carries it out and fits the result."""
        if plan is None:
            plan = self.planner.choose(self.budgets).plan
        self.run.decomposer = self.planner.decomposer
        self.run.all(None, plan)
        if self.run.rows:
            self.run.fitted(self.planner.refit(self.run.model, self.run.plan))

    def sample(self) -> Inputs:
        """Held-out inputs as many as the example inputs, to verify on; the example inputs where there are none.

        What a fitted model makes of noise or zeros says little about it.
        """
        batches = self.planner.batches
        if batches is None:
            return self.run.inputs
        wanted = next((spec.shape[0] for _, spec in self.run.first.inputs if spec.shape), 1)
        args, kwargs = next(iter(batches.held_out()))
        there = samples_of(args, kwargs)

        def cut(value: Any) -> Any:
            batched = len(value) == there if isinstance(value, (list, tuple)) else False
            if isinstance(value, Tensor):
                batched = value.dim() > 0 and value.shape[0] == there
            return value[:wanted] if batched else value

        return {name: cut(value) for name, value in kwargs.items()} if kwargs and not args else tuple(map(cut, args))

    def complete(self, report: Report) -> Report:
        """A report with what the budget asked, what was predicted and what was measured."""
        found, notes = self._measured()
        reached = {kind: report.after[kind] / report.before[kind] for kind in found.limits if report.before.get(kind)}
        if found.latency is not None and "latency" in found.limits:
            reached["latency"] = found.latency[1] / found.latency[0]
        return replace(
            report,
            budget=replace(found, reached=reached),
            notes=tuple(dict.fromkeys((*report.notes, *notes))),
        )

    def _measured(self) -> tuple[BudgetReport, list[str]]:
        planner, facts = self.planner, self.run.plan.budget
        settings = planner.settings
        found = BudgetReport(
            facts.get("limits", {str(b.kind): str(b).partition("=")[2] for b in self.budgets}),
            {},
            str(settings.sensitivity),
            settings.refit,
            planner.statistics.samples if planner.statistics is not None else 0,
            facts.get("predicted_loss") if facts.get("sensitivity") == settings.sensitivity else None,
            facts.get("gap", 0.0),
        )
        notes = list(planner.notes)
        if planner.batches is not None:
            self.run.say("measuring on held-out inputs", None)
            measured = compare(planner.model, self.run.model, planner.batches.held_out())
            found = replace(
                found,
                measured=measured.loss,
                agreement=measured.agreement,
                held_out=measured.samples,
                kind=measured.kind,
            )
            notes += _astray(found)
        if "latency" in found.limits or settings.gate == "latency":
            self.run.say("timing both models", None)
            args, kwargs = split_inputs(self.run.inputs)
            before, after = time_models([planner.model, self.run.model], args, kwargs)
            found = replace(found, latency=(before, after))
            if after > before:
                notes.append("the rewritten model is slower than the original: keep the original, or give it more room")
        return replace(found, metrics=self._metrics()), [*notes, *(planner.batches.notes if planner.batches else ())]

    def _metrics(self) -> dict[str, tuple[float, float]]:
        found = {
            name: (self._before[name], self._score(name, metric, self.run.model)) for name, metric in self._asked()
        }
        batches = self.planner.batches
        labels = None if batches is None else batches.labels("held_out")
        if batches is not None and labels is not None:
            models = (self.planner.model, self.run.model)
            before, after = (accuracy(model, batches.held_out(), labels) for model in models)
            found["accuracy on held-out inputs"] = (before, after)
        return found

    def _asked(self) -> Iterable[tuple[str, Metric]]:
        return (self.ask.metrics or {}).items()

    def _score(self, name: str, metric: Metric, model: nn.Module) -> float:
        self.run.say(f"measuring {name}", None)
        return float(metric(model))


def _astray(found: BudgetReport) -> list[str]:
    """Says aloud where the prediction is far from what was measured."""
    if found.predicted is None or found.measured is None or found.sensitivity != "loss":
        return []
    if found.measured > FAR * found.predicted and found.measured > 1e-3:
        return [
            f"the measured loss, {found.measured:.3g}, is far above the predicted one, {found.predicted:.3g}: "
            "errors of different layers add up here, are too large for the prediction, or the calibration inputs are "
            "too few; trust what was measured"
        ]
    if found.predicted > FAR * found.measured and found.predicted > 1e-3:
        return [
            f"the measured loss, {found.measured:.3g}, is far below the predicted one, {found.predicted:.3g}: "
            "the prediction is too dark here, and a smaller budget may do"
        ]
    return []


def plan(
    model: nn.Module,
    example_inputs: Inputs,
    budget: BudgetLike,
    calibration: Iterable[Any] | None = None,
    *,
    calibration_size: int | None = None,
    forms: Sequence[str] = ("all",),
    sensitivity: str | None = None,
    refit: str = "full",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    multiple: int | None = None,
    max_layer_error: float | None = None,
    gate: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Chooses which layers to rewrite, in which form and how wide, so that a budget is met at the least loss.

    Args:
        model: Any module; stays as it is.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword ones.
        budget: Kind to limit: ``{"macs": 0.5, "params": "12M"}``; floats up to 1 are ratios of the original.
        calibration: A few hundred unlabelled inputs: any iterable of batches (a tensor, a tuple of positional inputs or
            a dict of keyword ones). Without it the weights' own errors count, which is much poorer.
        calibration_size: Use at most so many inputs.
        forms: Forms to choose from: ``all``, ``1x1``, or some of `pwrewrite.forms.FORMS`.
        sensitivity: ``loss``, ``activations`` or ``weights``; the best that the calibration allows by default.
        refit: How `pwrewrite.rewrite` will fit the result; the prediction depends on it.
        include: Patterns on paths; all layers where empty.
        exclude: Patterns on paths that stay as they are.
        multiple: What widths are rounded to; 8 where the channels are 64 or more by default.
        max_layer_error: Largest relative error of a layer in the norm of its prediction.
        gate: ``latency`` to use only what is measured to be faster than the layer on this device.
        seed: Of everything that is drawn.
        progress: Called at each step.

    Returns:
        The plan, for `pwrewrite.rewrite`; ``plan.budget`` holds the predicted loss.

    Raises:
        RefusedError: If the budget cannot be met.
        UsageError: If a setting or the calibration makes no sense.
    """
    settings = Settings(
        tuple(forms), sensitivity, refit, tuple(include), tuple(exclude), multiple, max_layer_error, False, seed, gate
    )
    ask = Ask(budget, calibration, calibration_size, settings)
    if not ask.budgets:
        raise UsageError("there is no budget", expected='such as {"macs": 0.5}')
    planner = Planner(model, example_inputs, calibration, settings, size=calibration_size, say=progress or silent)
    found = planner.choose(ask.budgets).plan
    return replace(found, model=model_facts(planner.captured, inputs=describe_inputs(example_inputs)))


@dataclass(frozen=True)
class Found:
    """The smallest model that keeps a metric.

    Attributes:
        choice: Its plan.
        before: The metric of the original.
        after: Its metric, fitted.
        tried: MACs as a share of the original and metric of each model that was tried, in order.
    """

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
    budgets: Sequence[Budget] = (),
    steps: int = 7,
) -> Found:
    """The smallest model whose metric falls by no more than that, by halving the interval of budgets.

    Args:
        planner: The model, calibrated.
        metric: A callable on a model, larger is better.
        max_drop: How much it may fall, in its own unit.
        kind: What is to be small.
        budgets: Limits that hold beside it.
        steps: How many models to try.

    Raises:
        RefusedError: If no smaller model keeps the metric.
    """
    before = float(metric(planner.model))
    choices = planner.frontier(kind, budgets, points=2**steps + 1)
    tried: list[tuple[float, float]] = []
    low, high, best = 0 if choices[0].plan.ops else 1, len(choices) - 1, None
    while low <= high and len(tried) < steps:
        middle = (low + high + 1) // 2
        choice = choices[middle]
        planner.say(f"trying {choice.costs[kind] / planner.original[kind]:.1%} of the {kind}", len(tried) / steps)
        made = carry_out(planner.model, choice.plan, decomposer=planner.decomposer).model
        planner.refit(made, choice.plan)
        after = float(metric(made))
        tried.append((choice.costs[kind] / planner.original[kind], after))
        if after >= before - max_drop:
            best, low = Found(choice, before, after, tuple(tried)), middle + 1
        else:
            high = middle - 1
    if best is None:
        raise RefusedError(
            "no smaller model keeps the metric",
            expected=f"at least {before - max_drop:.4g}",
            got=", ".join(f"{value:.4g} at {share:.1%} of the {kind}" for share, value in tried) or None,
        )
    return replace(best, tried=tuple(tried))
