"""A rewrite under a budget: plan, carry out, fit, measure.

What `pwrewrite.planning` works out for one model is put to use here on a `pwrewrite.workflows.steps.Run`, with other
plans (`other_plans`) where more is lost on held-out inputs than was predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from ..capturing import Inputs
from ..core.errors import RefusedError
from ..core.names import JOINT_FORM_NAMES
from ..core.numbers import plural
from ..core.options import Budget
from ..core.plan import Plan
from ..core.processes import of_first, world
from ..core.recovery import Recovery
from ..core.text import few
from ..passes.plain_layers import BakeWeights, PlainPadding, UnfuseLayers
from ..planning.allocator import Allocator, Choice
from ..planning.budget import Limit, budgets_of
from ..planning.fitting import Fit
from ..planning.latency import MEASURED
from ..planning.outputs import FAR, accuracy
from ..planning.planner import Planner, costs_of
from ..planning.running import first_samples
from ..report.records import BudgetReport, Frontier, Point, Report
from .end_to_end import EndToEnd
from .other_plans import Attempt, best_attempt, far_above, other_ways
from .recover import trained
from .smallest import Metric, search
from .steps import Run, State

_PLANS = 3
"""How many plans are carried out and fitted at most until one meets a limit on latency."""
_POINTS = 11
"""Budgets on the frontier beside a plan; each takes up to a second or two."""


class Budgeted:
    """A run on which nothing was done yet, under an opened budget."""

    def __init__(self, run: Run, budget: Budget) -> None:
        self.run, self.budget, self.limits = run, budget, budgets_of(budget.limits)
        self.metrics = metrics_of(budget)
        self._before = {name: self._score(name, metric, run.first.model) for name, metric in self.metrics.items()}
        if budget.plan is not None:  # which has chosen already, and its layers need their statistics
            budget = replace(budget, forms=("all", *JOINT_FORM_NAMES), include=(), exclude=(), max_layer_error=None)
        self.planner, self.fit = planner_of(run, budget), Fit()
        self.recovery: Recovery | None = None
        self.choice: Choice | None = None
        self._planned = Plan()
        self.times = EndToEnd(run, budget, self.limits)

    def carry_out(self) -> None:
        """Plans where there is no plan yet, carries it out and fits the result."""
        plan = self.budget.plan
        if plan is None:
            self.choice = self._chosen()
            plan = self.choice.plan
        start, self._planned = self.run.state, plan
        self._carry_out(start, plan)
        for _ in range(_PLANS - 1):
            choice = self._other() if self.choice is not None else None
            if choice is None:
                break
            self.choice = choice
            self._carry_out(start, choice.plan)
        if self.run.state.rows:
            self.fit, self.recovery = trained(self.planner, self.run.state.model, self.fit)
            rows = self.run.state.rows if self.recovery is not None and self.recovery.kept > 0 else ()
            if rows:
                self.times.forget()
            self.run.fitted({**self.fit.errors, **{row.edit.path: None for row in rows}})

    def _other(self) -> Choice | None:
        """Another choice where a limit is missed: without what could not be carried out, or for less time."""
        assert self.choice is not None
        done, met = {row.edit.path for row in self.run.state.rows}, self.times.met(self.planner)
        broken = [op for op in self.choice.plan.ops if op.path not in done]
        before, after = costs_of(self.run.first), costs_of(self.run.state.captured)
        over = any(_exceeded(limit, before, after) for limit in self.limits if limit.kind != "latency")
        if not broken or self.budget.max_drop is not None or (met and not over):
            return None if met else self.times.tighter(self.planner, self.choice)
        paths = {op.path for op in broken}
        why = [skip for skip in self.run.state.plan.skips if skip.path in paths]
        self.planner = self.planner.leaving(broken, why)
        try:
            return self.planner.choose(self.limits)
        except RefusedError:  # the error that says what was reached in the end says more
            return None

    def _carry_out(self, start: State, plan: Plan) -> None:
        """Carries a plan out and fits the result, or what loses less where others may."""
        notes = list(self.planner.notes)
        attempt = self._attempt(start, self.planner, self.choice, plan)
        timed = self.budget.gate is not None or self.times.limit is not None
        if ways := other_ways(attempt, self.budget, timed=timed):
            attempt = best_attempt(attempt, ways, notes, partial(self._again, start, self.choice), self.run.say)
        self.planner, self.choice, self.fit = attempt.planner, attempt.choice, attempt.fit
        self.run.state = attempt.state

    def _attempt(self, start: State, planner: Planner, choice: Choice | None, plan: Plan) -> Attempt:
        """Carries a plan out on the run as it was, and fits the result."""
        self.run.state = start
        self.run.all(Plan.from_json(of_first(plan.to_json())) if world() > 1 else plan, planner.decomposer)
        model = self.run.state.model
        fit = planner.refit(model, self.run.state.plan) if self.run.state.rows else Fit()
        if planner.batches is not None and fit.held_out is None:
            fit = replace(fit, held_out=planner.measure(model))
        return Attempt(planner, choice, self.run.state, fit)

    def _again(self, start: State, first: Choice | None, planner: Planner) -> Attempt | None:
        """What another planner chooses, carried out and fitted; None where it is slower than may be."""
        try:
            choice = planner.choose(self.limits)
        except RefusedError:  # other widths are candidates there, and none meets the limits
            return None
        if first is not None and self.times.promised(planner, first) and not self.times.promised(planner, choice):
            return None
        return self._attempt(start, planner, choice, choice.plan)

    def _chosen(self) -> Choice:
        if self.budget.max_drop is None:
            return self.planner.choose(self.limits)
        (metric,) = self.metrics.values()
        return search(self.planner, metric, self.budget.max_drop, budgets=self.limits).choice

    def sample(self) -> Inputs:
        """Held-out inputs to verify on, at most as many as the example inputs, which stand in where there are none."""
        batches = self.planner.batches
        if batches is None:
            return self.run.inputs
        wanted = next((spec.shape[0] for _, spec in self.run.first.inputs if spec.shape), 1)
        args, kwargs = first_samples(next(iter(batches.held_out())), wanted)
        return kwargs if kwargs and not args else args

    def complete(self, report: Report) -> Report:
        """With limits, prediction and measurement; a limit missed is refused, unless the budget is ``best_effort``."""
        result, notes = self._measured()
        before, after = costs_of(self.run.first), costs_of(self.run.state.captured)
        if result.latency is not None:
            before["latency"], after["latency"] = result.latency
        reached = {kind: after[kind] / before[kind] for kind in result.limits if before.get(kind)}
        timing = f"±{result.spread:.0%}, {plural(result.threads, 'thread')}" if result.threads else ""
        missed = self._missed(before, after, timing)
        if missed and not self.budget.best_effort:
            raise missed[0]
        return replace(
            report,
            budget=replace(result, reached=reached),
            frontier=None if self.choice is None else curve_of(self.planner, self.choice, self.limits, report.target),
            notes=tuple(dict.fromkeys((*(error.message for error in missed), *report.notes, *notes))),
        )

    def _measured(self) -> tuple[BudgetReport, list[str]]:
        planner, facts = self.planner, self.run.state.plan.budget
        settings = planner.settings
        limits = facts.get("limits", {str(limit.kind): str(limit).partition("=")[2] for limit in self.limits})
        predicted = facts.get("predicted_loss") if facts.get("sensitivity") == settings.sensitivity else None
        result = report_of(planner, limits, predicted, facts.get("gap", 0.0))
        notes = list(planner.notes)
        if planner.batches is not None:
            self.run.say("measuring on held-out inputs", None)
            measured = self.fit.held_out or planner.measure(self.run.state.model)
            result = replace(
                result,
                measured=measured.loss,
                agreement=measured.agreement,
                held_out=measured.samples,
                kind=measured.kind,
                outputs=planner.outputs,
                recovery=self.recovery,
            )
            notes += _astray(result)
        if "latency" in result.limits or settings.gate == "latency" or settings.engine is not None:
            result = self.times.report(planner, result, notes)
        return replace(result, metrics=self._metrics()), [*notes, *(planner.batches.notes if planner.batches else ())]

    def _missed(self, before: Mapping[str, float], after: Mapping[str, float], timing: str) -> list[RefusedError]:
        """The limits that the result does not meet, each with what was measured."""
        errors, why = [], not_carried_out(self.run, self._planned)
        for limit in self.limits:
            old, new = before[limit.kind], after[limit.kind]
            got = f"{new:,.0f} of {old:,.0f}"
            if limit.kind == "latency":
                got = f"{1000 * new:.3g} ms of {1000 * old:.3g} ms ({timing})"
            if _exceeded(limit, before, after):
                errors.append(
                    RefusedError(
                        f"the budget {limit} is missed: the rewritten model is at {new / old:.2f} of the original as "
                        "measured in the end",
                        where=f"the whole model; {why}" if why else None,
                        expected=str(limit),
                        got=got,
                        hint=f"ask for {limit.kind}={new / old:.2f} or more, allow more --forms or layers, or take "
                        "this result all the same with --best-effort",
                    )
                )
        return errors

    def _metrics(self) -> dict[str, tuple[float, float]]:
        values = {
            name: (self._before[name], self._score(name, m, self.run.state.model)) for name, m in self.metrics.items()
        }
        batches = self.planner.batches
        labels = None if batches is None else batches.labels("held_out")
        if batches is not None and labels is not None:
            models = (self.planner.model, self.run.state.model)
            scored = accuracy(models, batches.held_out(), labels, self.planner.outputs)
            if not isinstance(scored, str):
                name, values[name] = scored
        return values

    def _score(self, name: str, metric: Metric, model: nn.Module) -> float:
        self.run.say(f"measuring {name}", None)
        return float(metric(model))


def not_carried_out(run: Run, plan: Plan) -> str:
    """Which layers of a plan a run has left as they were, with the reason for the first; empty where none was."""
    done = {row.edit.path for row in run.state.rows}
    left = list(dict.fromkeys(op.path for op in plan.ops if op.path not in done))
    why = next((f": {skip.reason}, {skip.detail}" for skip in run.state.plan.skips if skip.path in left[:1]), "")
    return f"not carried out: {few(left)}{why}" if left else ""


def _exceeded(limit: Limit, before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether what a model costs, by kind, is above a limit: exactly, or by more than times are measured to."""
    tolerance = MEASURED if limit.kind == "latency" else 1 + 1e-9
    return after[limit.kind] > limit.absolute(before[limit.kind]) * tolerance


def planner_of(run: Run, budget: Budget) -> Planner:
    """A calibrated planner for what a run has come to, after what the budget asks for before anything is planned."""
    run.all([UnfuseLayers(), PlainPadding(), *([BakeWeights()] if budget.bake else []), *budget.first])
    planner = Planner(
        run.state.model,
        run.inputs,
        budget.calibration,
        budget,
        size=budget.calibration_size,
        say=run.say,
        captured=run.state.captured,
    )
    if any(row.edit.op.action == "unfuse" for row in run.state.rows):
        planner.notes.append(
            "fused layers were taken apart, since no fused one can be made smaller: fuse the result again"
        )
    return planner


def report_of(planner: Planner, limits: Mapping[str, str], predicted: float | None, gap: float) -> BudgetReport:
    """How a plan was made and what it predicts; nothing is measured yet."""
    settings, samples = planner.settings, planner.statistics.samples if planner.statistics is not None else 0
    return BudgetReport(limits, {}, str(settings.sensitivity), str(settings.refit), samples, predicted, gap)


def point_of(choice: Choice) -> Point:
    """A choice as a point of a frontier."""
    return Point(dict(choice.costs), choice.loss, len(choice.plan.ops))


def curve_of(planner: Planner, choice: Choice, limits: Sequence[Limit], target: str) -> Callable[[], Frontier]:
    """What works out the frontier of the first cost that a budget limits, with the plan that was chosen."""
    kind = limits[0].kind if limits else "macs"
    return partial(_curve, planner.allocator, choice, kind, target, str(planner.settings.sensitivity))


def _curve(allocator: Allocator, choice: Choice, kind: str, target: str, sensitivity: str) -> Frontier:
    points = tuple(map(point_of, allocator.frontier(kind, points=_POINTS)))
    return Frontier(target, kind, dict(allocator.original), sensitivity, points, chosen=point_of(choice))


def metrics_of(budget: Budget) -> dict[str, Metric]:
    """The budget's metric under the name that reports give it."""
    if budget.metric is None or isinstance(budget.metric, str):
        return {}
    return {budget.metric_name or getattr(budget.metric, "__name__", "metric"): budget.metric}


def _astray(result: BudgetReport) -> list[str]:
    """A note where the prediction is far from what was measured."""
    if result.predicted is None or result.measured is None or result.sensitivity != "loss":
        return []
    if far_above(result.measured, result.predicted):
        return [
            f"the measured loss, {result.measured:.3g}, is far above the predicted one, {result.predicted:.3g}: "
            "errors of different layers add up here, are too large for the prediction, or the calibration inputs are "
            "too few; trust what was measured"
        ]
    if result.predicted > FAR * result.measured and result.predicted > 1e-3:
        return [
            f"the measured loss, {result.measured:.3g}, is far below the predicted one, {result.predicted:.3g}: "
            "the prediction is too dark here, and a smaller budget may do"
        ]
    return []
