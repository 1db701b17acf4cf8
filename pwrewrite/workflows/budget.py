"""A rewrite under a budget: plan, carry out, fit, measure.

What `pwrewrite.planning` works out for one model is put to use here on a `pwrewrite.workflows.steps.Run`. Where much
more is lost on held-out inputs than was predicted, the model is planned and fitted in the other norms, too, and where
more is lost by a plan that narrows or substitutes, without that; what loses least there is kept. `search` looks for the
smallest model that keeps a metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..capturing import Inputs, split_inputs
from ..core.errors import RefusedError
from ..core.names import ENGINE_NAMES
from ..core.options import Budget
from ..core.plan import Plan
from ..core.processes import of_first, world
from ..core.recovery import Recovery
from ..edit.apply import carry_out
from ..engines.choosing import time_everywhere
from ..engines.engine import Ran
from ..engines.timing import NOISY, Timing, time_models
from ..passes.plain_layers import BakeWeights, UnfuseLayers
from ..planning.allocator import Allocator, Choice
from ..planning.budget import Limit, budgets_of
from ..planning.latency import MEASURED
from ..planning.outputs import FAR, accuracy
from ..planning.planner import Fit, Planner, costs_of
from ..planning.running import first_samples
from ..report.records import BudgetReport, Frontier, Point, Report
from .recover import trained
from .steps import Run, State

Metric = Callable[[nn.Module], float]

_SECONDS = (4.0, 8.0, 8.0)
"""How long both models are timed, and how long again, and once more, where a limit seems missed."""
_PLANS = 3
"""How many plans are carried out and fitted at most until one meets a limit on latency."""
_POINTS = 11
"""Budgets on the frontier beside a plan; each takes up to a second or two."""


@dataclass(frozen=True)
class _BothTimed:
    """The times of the original and of a model that a plan led to, and what ran it."""

    model: nn.Module
    before: Timing
    after: Timing
    ran: Ran

    @property
    def share(self) -> float:
        """The second time as a share of the first."""
        return self.after.seconds / self.before.seconds

    def meets(self, limit: Limit) -> bool:
        """Whether a limit on latency is met, as far as times can be told apart."""
        return self.after.seconds <= limit.absolute(self.before.seconds) * MEASURED


class Budgeted:
    """A run on which nothing was done yet, under an opened budget."""

    def __init__(self, run: Run, budget: Budget) -> None:
        self.run, self.budget, self.limits = run, budget, budgets_of(budget.limits)
        self.metrics = metrics_of(budget)
        self._before = {name: self._score(name, metric, run.first.model) for name, metric in self.metrics.items()}
        if budget.plan is not None:  # which has chosen already, and its layers need their statistics
            budget = replace(budget, forms=("all",), include=(), exclude=(), max_layer_error=None)
        self.planner, self.fit = planner_of(run, budget), Fit()
        self.recovery: Recovery | None = None
        self.choice: Choice | None = None
        self._times: _BothTimed | None = None

    def carry_out(self) -> None:
        """Plans where there is no plan yet, carries it out and fits the result."""
        plan = self.budget.plan
        if plan is None:
            self.choice = self._chosen()
            plan = self.choice.plan
        start = self.run.state
        self._carry_out(plan)
        for _ in range(_PLANS - 1):
            if self.choice is None or self._in_time():
                break
            tighter = self._tighter(self.choice)
            if tighter is None:
                break
            self.choice, self.run.state = tighter, start
            self._carry_out(tighter.plan)
        if self.run.state.rows:
            self.fit, self.recovery = trained(self.planner, self.run.state.model, self.fit)
            rows = self.run.state.rows if self.recovery is not None and self.recovery.kept > 0 else ()
            self._times = None if rows else self._times
            self.run.fitted({**self.fit.errors, **{row.edit.path: None for row in rows}})

    def _in_time(self) -> bool:
        """Whether the model meets the limit on latency, if there is one, as measured end to end."""
        limit = self._latency_limit
        return limit is None or self._both_timed().meets(limit)

    def _said_in_time(self, choice: Choice) -> bool:
        """Whether a choice meets the limit on latency, if there is one, as timed for its plan."""
        limit, costs = self._latency_limit, choice.costs
        before = self.planner.original.get("latency")
        return limit is None or before is None or costs["latency"] <= limit.absolute(before) * MEASURED

    def _tighter(self, missed: Choice) -> Choice | None:
        """A plan with a smaller promise than one that was carried out and missed its latency, if there is one."""
        reached = self._both_timed().share
        try:
            choice = self.planner.tighter(self.limits, missed, reached)
        except RefusedError:  # the error that says what was reached in the end says more
            return None
        if choice.plan.ops == missed.plan.ops:
            return None
        self.planner.notes.append(f"carried out, a first plan took {reached:.2f} of the time: planned again for less")
        return choice

    def _carry_out(self, plan: Plan) -> None:
        """Carries a plan out and fits the result, or what loses less where others may."""
        start, notes = self.run.state, list(self.planner.notes)
        self.fit = self._fitted(self.planner, plan)
        if others := self._others():
            self._plan_anew(start, notes, others)

    def _fitted(self, planner: Planner, plan: Plan) -> Fit:
        """Carries a plan out on the run and fits the result."""
        self.run.all(Plan.from_json(of_first(plan.to_json())) if world() > 1 else plan, planner.decomposer)
        model = self.run.state.model
        fit = planner.refit(model, self.run.state.plan) if self.run.state.rows else Fit()
        if planner.batches is not None and fit.held_out is None:
            return replace(fit, held_out=planner.measure(model))
        return fit

    def _others(self) -> dict[str, Callable[[Planner], Planner]]:
        """Other ways to plan where more is lost than predicted, by name, and how the planner gets there.

        Without what the plan does to several layers at once; in the other norms, where much more is lost, and the norm,
        its limits and the plan were not given, nor latencies, which are those of candidates that would have to be
        measured anew.
        """
        budget, choice, held_out = self.budget, self.choice, self.fit.held_out
        others: dict[str, Callable[[Planner], Planner]] = {}
        if choice is None or held_out is None or self.planner.settings.sensitivity != "loss":
            return others
        own = budget.sensitivity is None and budget.max_layer_error is None
        timed = budget.gate is not None or any(limit.kind == "latency" for limit in self.limits)
        if of_first(_far_above(held_out.loss, choice.loss)) and own and not timed and budget.max_drop is None:
            others = {name: partial(Planner.in_norm, sensitivity=name) for name in ("activations", "weights")}
        used = {op.action for op in choice.plan.ops}
        if of_first(held_out.loss > choice.loss and bool(self.planner.layers)) and budget.max_drop is None:
            for actions in (("narrow",), ("substitute",), ("narrow", "substitute")):
                if used.intersection(actions) and all(self._offers(action) for action in actions):
                    others[f"without {' and '.join(actions)}"] = partial(_without, actions=actions)
        return others

    def _offers(self, action: str) -> bool:
        """Whether the planner has candidates for what changes several layers at once."""
        return bool(self.planner.units if action == "narrow" else self.planner.regions)

    def _plan_anew(
        self, start: State, notes: Sequence[str], others: Mapping[str, Callable[[Planner], Planner]]
    ) -> None:
        """Plans in other ways, too; what loses least on held-out inputs is kept, with these notes and its own."""
        tried: dict[str, tuple[float, Planner, Choice | None, State, Fit]] = {}

        def keep(name: str, planner: Planner, choice: Choice | None, fit: Fit) -> None:
            assert fit.held_out is not None
            tried[name] = of_first(fit.held_out.loss), planner, choice, self.run.state, fit

        first = str(self.planner.settings.sensitivity)
        keep(first, self.planner, self.choice, self.fit)
        for name, other in others.items():
            self.run.say(f"planning {name if ' ' in name else f'by {name}'}", None)
            planner, self.run.state = other(tried[first][1]), start
            planner.notes[:] = notes
            try:
                choice = planner.choose(self.limits)
            except RefusedError:  # other widths are candidates there, and none meets the limits
                continue
            if self.choice is not None and self._said_in_time(self.choice) and not self._said_in_time(choice):
                continue
            keep(name, planner, choice, self._fitted(planner, choice.plan))
        kept = min(tried, key=lambda name: tried[name][0])
        losses = ", ".join(f"{name} {loss:.3g}" for name, (loss, *_) in tried.items())
        _, self.planner, self.choice, self.run.state, self.fit = tried[kept]
        ways = ["in every norm"] if "weights" in others else []
        ways += [name for name in others if name.startswith("without ")]
        self.planner.notes.append(
            f"the loss measured is {'far ' if 'weights' in others else ''}above the predicted one: planned "
            f"{' and '.join(ways)} (held-out loss: {losses}); {kept} is kept"
        )

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
        missed = self._missed(before, after, f"±{result.spread:.0%}, {result.threads} threads")
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
            result = self._timed(result, notes)
            assert result.latency is not None
            if result.latency[1] > result.latency[0]:
                notes.append("the rewritten model is slower than the original: keep the original, or give it more room")
            if result.spread > NOISY:
                notes.append(
                    f"this machine is noisy: times of one model are {result.spread:.0%} apart; measure again with less "
                    "running beside"
                )
        return replace(result, metrics=self._metrics()), [*notes, *(planner.batches.notes if planner.batches else ())]

    @property
    def _latency_limit(self) -> Limit | None:
        return next((limit for limit in self.limits if limit.kind == "latency"), None)

    def _both_timed(self) -> _BothTimed:
        """Times both models end to end, once for each that is carried out; for longer where a limit seems missed."""
        model, limit = self.run.state.model, self._latency_limit
        if self._times is not None and self._times.model is model:
            return self._times
        args, kwargs = split_inputs(self.run.inputs)
        threads = self.budget.threads
        self.run.say("timing both models", None)
        engine, session = self.planner.engine
        sessions = [
            session if each is self.planner.model else engine.session(each, args, kwargs, threads)
            for each in (self.run.first.model, model)
        ]
        for seconds in _SECONDS:
            before, after = time_models(sessions, args, kwargs, seconds=seconds, threads=threads)
            self._times = _BothTimed(model, before, after, sessions[1].ran)
            if limit is None or self._times.meets(limit):
                break
        assert self._times is not None
        return self._times

    def _timed(self, result: BudgetReport, notes: list[str]) -> BudgetReport:
        """With the times of both models, end to end, and where an engine was asked for in the others."""
        timed, threads = self._both_timed(), self.budget.threads
        result = replace(
            result,
            latency=(timed.before.seconds, timed.after.seconds),
            spread=max(timed.before.spread, timed.after.spread),
            threads=threads or torch.get_num_threads(),
        )
        if self.budget.engine is None:
            return result
        self.run.say("timing both models in the other engines", None)
        args, kwargs = split_inputs(self.run.inputs)
        others = [name for name in ENGINE_NAMES if name != self.planner.engine[0].name]
        beside = time_everywhere((self.run.first.model, timed.model), args, kwargs, others, threads)
        notes += beside.notes
        return replace(result, engine=str(timed.ran), engines=beside.seconds)

    def _missed(self, before: Mapping[str, float], after: Mapping[str, float], timing: str) -> list[RefusedError]:
        """The limits that the result does not meet, each with what was measured."""
        errors = []
        for limit in self.limits:
            old, new = before[limit.kind], after[limit.kind]
            got, tolerance = f"{new:,.0f} of {old:,.0f}", 1 + 1e-9
            if limit.kind == "latency":
                got, tolerance = f"{1000 * new:.3g} ms of {1000 * old:.3g} ms ({timing})", MEASURED
            if new > limit.absolute(old) * tolerance:
                errors.append(
                    RefusedError(
                        f"the budget {limit} is missed: the rewritten model is at {new / old:.2f} of the original as "
                        "measured in the end",
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


def planner_of(run: Run, budget: Budget) -> Planner:
    """A calibrated planner for what a run has come to, after what the budget asks for before anything is planned."""
    run.all([UnfuseLayers(), *([BakeWeights()] if budget.bake else []), *budget.first])
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
    if _far_above(result.measured, result.predicted):
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


def _without(planner: Planner, actions: Sequence[str]) -> Planner:
    return planner.without(*actions)


def _far_above(measured: float, predicted: float) -> bool:
    return measured > FAR * predicted and measured > 1e-3


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
    choices = planner.frontier(kind, budgets, points=2**steps + 1)
    tried: list[tuple[float, float]] = []
    low, high, best = 0 if choices[0].plan.ops else 1, len(choices) - 1, None
    while low <= high and len(tried) < steps:
        middle = (low + high + 1) // 2
        choice = choices[middle]
        planner.say(f"trying {choice.costs[kind] / planner.original[kind]:.1%} of the {kind}", len(tried) / steps)
        rewritten = carry_out(planner.model, choice.plan, decomposer=planner.decomposer).model
        trained(planner, rewritten, planner.refit(rewritten, choice.plan))
        after = of_first(float(metric(rewritten)))
        tried.append((choice.costs[kind] / planner.original[kind], after))
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
