"""From a model, calibration inputs and a budget to a plan, and to a rewritten model that loses little.

`Planner` takes the steps that all plans for one model share once: capture and calibration
(`pwrewrite.planning.calibrating`), candidates (`pwrewrite.planning.groups`). A budget is then a question of allocation
alone, and the frontier one of many of them. `Planner.decomposer` gives the weights behind a plan and `Planner.refit`
fits them; `Planner.in_norm` plans by another sensitivity from the same calibration.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

from torch import nn

from ..capturing import split_inputs
from ..capturing.records import Capture, info
from ..core.plan import Op, Plan, Skip
from ..core.text import few
from ..engines.choosing import choose
from ..engines.engine import Engine, Session
from ..engines.timing import NOISY, time_models
from ..passes.plain_layers import BakeWeights
from .allocator import Allocator, Choice
from .budget import Limit
from .calibrating import Calibrated
from .candidates import LayerCandidates, make_candidates
from .fitting import Fit, fit
from .groups import JointGroup, MeasuredGroup
from .joint import JOINT
from .latency import Conditions, LatencyTable, time_plan
from .latency_search import scale_times, within_latency
from .measuring import LossMeter
from .settling import settled

_ROUNDED = 1 + 1e-12
"""By how much a cost may be off by rounding."""


class Planner(Calibrated):
    """A calibrated model with what it could become; the arguments are those of `Calibrated`.

    Attributes:
        layers: The layers that may change, with their candidates.
        joint: What changes several layers at once, with theirs.
        original: What the model costs now, by kind.
    """

    _gone = frozenset[tuple[str, str]]()
    """Actions and paths of ops that could not be carried out; ``_why`` says why."""
    _why: tuple[Skip, ...] = ()

    def _prepare(self) -> None:
        self.original = costs_of(self.captured)
        if self.settings.plan is None:
            self._weigh()
        else:  # which has chosen already
            self.layers, self._skips = list[LayerCandidates](), self.replaceable.skips
            self._offer([])
        if self.settings.gate == "latency":
            self._time()

    def _weigh(self) -> None:
        """Works out the candidates, whose losses are in the norm of the sensitivity."""
        self.layers = make_candidates(self.norm, self.say)
        joint, skips = list[JointGroup](), list[Skip]()
        for kind in JOINT.values():
            groups, refused = kind.all_of(self.norm, self.say)
            joint += groups
            skips += refused
        changing = {layer.path for layer in self.layers}.union(*(c.claims for g in joint for c in g.candidates))
        left = [self.replaceable.alone.get(skip.path, skip) for skip in skips if skip.path not in changing]
        self._skips = [*self.replaceable.skips, *left]
        self.memory.store()
        self._offer(joint)

    def _offer(self, joint: list[JointGroup]) -> None:
        """Gives the allocator the candidates, those of several layers being these."""
        chosen, samples = self.settings, self.statistics.samples if self.statistics is not None else 0
        facts = {"sensitivity": chosen.sensitivity, "refit": chosen.refit, "samples": samples, "seed": chosen.seed}
        self.layers = [group.without(self._gone) for group in self.layers]
        self.joint = [group.without(self._gone) for group in joint]
        groups, skips = [*self.layers, *self.joint], [*self._skips, *self._why]
        self.allocator = Allocator(groups, self.original, skips, facts, self._bakes)

    def _bakes(self) -> bool:
        """Whether baking would make plain weights of any that are computed now."""
        return bool(BakeWeights().propose(self.captured))

    def in_norm(self, sensitivity: str) -> Planner:
        """A planner by ``activations`` or ``weights`` from the calibration of this one, with the notes so far.

        Latencies would have to be measured anew.
        """
        other = copy.copy(self)
        other.__dict__.pop("meter", None)
        other.settings, other.notes = replace(self.settings, sensitivity=sensitivity), list(self.notes)
        other.statistics = self.statistics.without_gradients() if self.statistics and sensitivity != "weights" else None
        other._weigh()
        return other

    def without(self, actions: Container[str]) -> Planner:
        """A planner without some actions on several layers, from the calibration of this one, with its notes."""
        other = copy.copy(self)
        other.notes = list(self.notes)
        other._offer([group for group in self.joint if group.action not in actions])
        return other

    def leaving(self, ops: Sequence[Op], skips: Sequence[Skip]) -> Planner:
        """A planner without ops that could not be carried out, and why, from the calibration of this one."""
        other = copy.copy(self)
        other._gone = self._gone | {(op.action, op.path) for op in ops}
        other._why = (*self._why, *skips)
        paths = list(dict.fromkeys(op.path for op in ops))
        other.notes = [*self.notes, f"planned again without what could not be carried out: {few(paths)}"]
        other._offer(self.joint)
        return other

    @cached_property
    def engine(self) -> tuple[Engine, Session]:
        """Where latencies are measured, and the model there."""
        args, kwargs = split_inputs(self.inputs)
        engine = choose(self.settings.engine, self.model, args, kwargs, self.settings.threads)
        if self.settings.engine == "auto":
            self.notes.append(f"the fastest engine for this model is {engine.name}")
        return engine, engine.session(self.model, args, kwargs, self.settings.threads)

    def _time(self) -> None:
        """Measures the model, its layers and their candidates; those that are not faster are given up."""
        if "latency" in self.original:
            return
        args, kwargs = split_inputs(self.inputs)
        groups = self.allocator.groups
        self.say("timing the model", None)
        engine, session = self.engine
        table = LatencyTable(Conditions.of(self.model, self.settings.threads, engine))
        self.notes += table.notes
        small = table.reference()
        unit = replace(session, run=lambda *args, **kwargs: small())
        timing, reference = time_models([session, unit], args, kwargs, threads=self.settings.threads)
        table.unit = reference.seconds
        if timing.spread > NOISY:
            self.warn(
                f"this machine is noisy: times of the same run are {timing.spread:.0%} apart; close what runs "
                "beside, or give it --threads of its own"
            )
        try:
            for i, group in enumerate(groups):
                self.say(f"timing what {group.path} could become", i / len(groups))
                group.time(table)
        finally:
            table.save()
        self.original["latency"] = timing.seconds
        scale_times(groups, timing.seconds)

    def choose(self, limits: Sequence[Limit]) -> Choice:
        """The allocation that loses least; where a limit cannot be met, the error says how far, and what was left."""
        if not any(limit.kind == "latency" for limit in limits):
            return self._choose(limits, self.allocator.absolute(limits))
        self._time()
        return self._within_latency(limits)

    def _choose(self, limits: Sequence[Limit], absolute: Mapping[str, float]) -> Choice:
        (choice,) = settled(self.measured, self.meter, lambda: [self.allocator.choose(limits, absolute)], self.say)
        self.memory.store()
        return choice

    @property
    def measured(self) -> list[MeasuredGroup]:
        """What loses what is measured."""
        return [group for group in self.joint if isinstance(group, MeasuredGroup)]

    @cached_property
    def meter(self) -> LossMeter | None:
        """What measures the loss of single changes; None where losses are not those of the model."""
        if self.statistics is None or self.statistics.kind != "loss" or self.batches is None:
            return None
        return LossMeter(self.model, self.norm, self.statistics.outputs, self.batches.first()[0])

    def tighter(self, limits: Sequence[Limit], missed: Choice, reached: float) -> Choice:
        """The allocation for limits of which a choice turned out to miss that on latency, at such a share of the time.

        Raises:
            RefusedError: As `choose`.
        """
        return self._within_latency(limits, (missed, reached))

    def _within_latency(self, limits: Sequence[Limit], missed: tuple[Choice, float] | None = None) -> Choice:
        def share_of(plan: Plan) -> float:
            return time_plan(self.model, self.inputs, plan, self.settings.threads, self.engine)

        return within_latency(
            self.allocator,
            limits,
            partial(self._choose, limits),
            share_of,
            best_effort=self.settings.best_effort,
            say=self.say,
            missed=missed,
        )

    def least(self, kind: str, limits: Sequence[Limit] = ()) -> float:
        """The least that the model can cost of a kind, within limits of others."""
        self._time_if(kind, limits)
        others = {k: limit for k, limit in self.allocator.absolute(limits).items() if k != kind}
        return self.allocator.cheapest(kind, limits, others).costs[kind]

    def at(self, kind: str, cost: float, limits: Sequence[Limit] = ()) -> Choice:
        """The least loss at a cost of a kind, at least the least, within limits of others: a point of the frontier."""
        self._time_if(kind, limits)
        absolute = self.allocator.absolute(limits)
        return self._choose(limits, {**absolute, kind: min(cost * _ROUNDED, absolute.get(kind, math.inf))})

    def _time_if(self, kind: str, limits: Sequence[Limit]) -> None:
        if kind == "latency" or any(limit.kind == "latency" for limit in limits):
            self._time()

    def frontier(self, kind: str, limits: Sequence[Limit] = (), points: int = 25) -> list[Choice]:
        """The least losses at so many limits of a kind, from the original to the smallest, within those of others."""
        self._time_if(kind, limits)
        choose = partial(self.allocator.frontier, kind, limits, points)
        choices = settled(self.measured, self.meter, choose, self.say, glance=partial(choose, rough=True))
        self.memory.store()
        return choices

    def refit(self, rewritten: nn.Module, plan: Plan) -> Fit:
        """Fits the model with a plan carried out to the original on the calibration inputs, in place."""
        return fit(self, rewritten, plan)


def costs_of(captured: Capture) -> dict[str, float]:
    """What a model costs, by kind of limit; its latency is measured apart."""
    costs = [info(node).cost for node in captured.graph.nodes]
    macs, nbytes = sum(cost.macs for cost in costs), sum(cost.bytes for cost in costs)
    return {"params": float(captured.params), "macs": float(macs), "bytes": float(nbytes)}
