"""From a model, calibration inputs and a budget to a plan, and to a rewritten model that loses little.

`Planner` takes the steps that all plans for one model share once: capture, calibration
(`pwrewrite.planning.statistics`, cached on disk), candidates (`pwrewrite.planning.candidates`). A budget is then a
question of allocation alone, and the frontier one of many of them. `Planner.decomposer` gives the weights behind a plan
and `Planner.refit` fits them; `Planner.in_norm` plans by another sensitivity from the same calibration.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..capturing import Inputs, capture, split_inputs
from ..capturing.records import Capture, info
from ..core.declaring import typed_fields
from ..core.errors import UsageError
from ..core.nested import Tree
from ..core.options import Budget
from ..core.plan import Op, Plan
from ..decompose import Factors
from ..engines.choosing import choose
from ..engines.engine import Engine, Session
from ..engines.timing import NOISY, time_models
from ..forms import FORMS
from ..layers.factorized import Factorized
from .allocator import Allocator, Choice
from .batches import Batches
from .budget import Limit
from .cache import read_statistics, statistics_file, write_statistics
from .candidates import ReplaceableLayers, make_candidates, timed
from .fitting import fit_steps, kept_channels, shift_biases
from .latency import Conditions, LatencyTable, time_plan
from .latency_search import scale_times, within_latency
from .measuring import LossMeter
from .outputs import Measured, compare, kind_of_outputs, scoring
from .refit import Target, refit
from .regions import RegionCandidates, fitted_map, region_candidates, timed_region
from .room import Room, samples_in_run
from .running import Say, device_of, evaluating, run_seeded
from .settling import settled
from .spill import Spill
from .statistics import Gathering, NoGradientsError, Statistics, gather
from .units import UnitCandidates, timed_unit, unit_candidates

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """What a fit came to.

    Attributes:
        errors: Path to the relative error of the weights of each layer whose factors were fitted.
        held_out: How far the model is from the original now; None where nothing was fitted.
    """

    errors: Mapping[str, float] = field(default_factory=dict)
    held_out: Measured | None = None


class Planner:
    """A model, calibrated; it stays as it is.

    Args:
        calibration: Any iterable of inputs, or `Batches`; None to plan by the weights alone.
        settings: Which limits and forms, and how to fit.
        size: Use at most so many calibration inputs.

    Attributes:
        layers: The layers that may change, with their candidates.
        units: The channels between layers that may become fewer, with theirs.
        regions: The modules that something else may stand for as a whole, with theirs.
        original: What the model costs now, by kind.
        notes: What a reader should know.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        calibration: Iterable[Tree] | None,
        settings: Budget,
        *,
        size: int | None = None,
        say: Say | None = None,
        captured: Capture | None = None,
    ) -> None:
        self.say = say or (lambda what, share: None)
        self._sensitivity_given = settings.sensitivity is not None
        self.settings = _checked(settings, calibration is not None)
        self.model, self.inputs = model, inputs
        self.captured = captured or capture(model, inputs)
        self.notes: list[str] = []
        self.replaceable = ReplaceableLayers(self.captured, self.settings)
        self.batches: Batches | None = None
        if calibration is not None:
            self.batches = batches_of(calibration, inputs, self.settings, size, samples_in_run(self.captured))
        self.outputs = "values"
        self.statistics = self._calibrate()
        self.original = costs_of(self.captured)
        self._weigh()
        if self.settings.gate == "latency":
            self._time()

    def _weigh(self) -> None:
        """Works out the candidates, whose losses are in the norm of the sensitivity."""
        self.layers = make_candidates(self.replaceable, self.statistics, self.say)
        self.units = unit_candidates(self.replaceable, self.statistics, self.say)
        self.regions = region_candidates(self.replaceable, self.statistics, self.say)
        self._offer()

    def _offer(self) -> None:
        """Gives the allocator the candidates."""
        chosen, samples = self.settings, self.statistics.samples if self.statistics is not None else 0
        facts = {"sensitivity": chosen.sensitivity, "refit": chosen.refit, "samples": samples, "seed": chosen.seed}
        self.allocator = Allocator(
            [*self.layers, *self.units, *self.regions], self.original, self.replaceable.skips, facts
        )

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

    def without(self, *actions: str) -> Planner:
        """A planner that does not ``narrow``, or ``substitute``, from the calibration of this one, with its notes."""
        other = copy.copy(self)
        other.notes = list(self.notes)
        other.units = [] if "narrow" in actions else self.units
        other.regions = [] if "substitute" in actions else self.regions
        other._offer()
        return other

    def _kind_of(self, outputs: object, batches: Batches, known: str = "") -> str:
        """What outputs for the first calibration inputs are, unless it is known; notes labels that do not fit."""
        labels = batches.first()[1]
        kind = self.settings.outputs or known or kind_of_outputs(outputs, labels)
        if labels is not None:
            every = batches.labels()
            why = scoring(outputs, labels if every is None else every, kind)
            if isinstance(why, str):
                self._warn(f"no accuracy is measured, since the labels do not fit: {why}")
        return kind

    def _warn(self, note: str) -> None:
        _log.warning(note)
        self.notes.append(note)

    def _calibrate(self) -> Statistics | None:
        batches, settings = self.batches, self.settings
        if batches is None:
            return None
        with torch.no_grad(), evaluating(self.model):
            outputs = run_seeded(self.model, batches.first()[0], settings.seed)
        if settings.sensitivity == "weights":
            self.outputs = self._kind_of(outputs, batches)
            return None
        self.say("reading the calibration inputs", None)
        watched = self.replaceable.watched
        file = statistics_file(self.captured, watched, batches, outputs, settings)
        statistics, complete, damage = read_statistics(file, device_of(self.model), watched)
        self.notes += damage
        self.outputs = self._kind_of(outputs, batches, "" if statistics is None else statistics.outputs)
        if statistics is None or not complete:
            try:
                statistics = self._gather(batches, statistics, file)
            except NoGradientsError as error:
                if self._sensitivity_given:
                    raise
                self.notes.append(f"{error.message}; errors are measured in the layers' outputs (activations) instead")
                self.settings = replace(self.settings, sensitivity="activations")
                return self._calibrate()
            statistics.round()
        self.notes += batches.notes
        self._note_sparse(statistics)
        return statistics

    def _gather(self, batches: Batches, start: Statistics | None, file: Path | None) -> Statistics:
        expected, kind = batches.samples, str(self.settings.sensitivity)
        statistics = start or Statistics(kind=kind, outputs=self.outputs)
        outputs = self.outputs if kind == "loss" else None
        how = Gathering(outputs, self.settings.seed, expected, self.replaceable.functions)
        watched, each = self.replaceable.watched, lambda now: self.say("calibrating", now.samples / expected)
        try:
            gather(self.model, watched, batches.calibration(), how, start=statistics, each=each)
        except BaseException:
            write_statistics(file, statistics, complete=False)
            raise
        self.say("storing the statistics", None)
        write_statistics(file, statistics, complete=True)
        return statistics

    def _note_sparse(self, statistics: Statistics) -> None:
        """Notes where the inputs were too few."""
        layers = {path: statistics.layers[path] for path in self.replaceable.specs}
        sparse = [path for path, sums in layers.items() if sums.rows < 2 * sums.means.shape[1]]
        if sparse:
            self.notes.append(
                f"too few calibration inputs for {_few(sparse)}: fewer than two patches per patch element; their "
                "statistics are drawn to the identity, and more inputs would serve better"
            )
        blind = [path for path, sums in layers.items() if sums.gradients is None]
        if blind and statistics.kind == "loss":
            self.notes.append(f"no gradient reaches {_few(blind)}: their errors count without a weight")

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
        self.say("timing the model", None)
        engine, session = self.engine
        table = LatencyTable(Conditions.of(self.model, self.settings.threads, engine))
        self.notes += table.notes
        small = table.reference()
        unit = replace(session, run=lambda *args, **kwargs: small())
        timing, reference = time_models([session, unit], args, kwargs, threads=self.settings.threads)
        table.unit = reference.seconds
        if timing.spread > NOISY:
            self._warn(
                f"this machine is noisy: times of the same run are {timing.spread:.0%} apart; close what runs "
                "beside, or give it --threads of its own"
            )
        try:
            for i, layer in enumerate(self.layers):
                self.say(f"timing {layer.layer.path}", i / len(self.layers))
                layer.candidates = timed(layer, table)
            for channels in self.units:
                self.say(f"timing the channels of {channels.path}", None)
                channels.candidates = timed_unit(channels, table)
            for whole in self.regions:
                self.say(f"timing what {whole.path} could become", None)
                whole.candidates = timed_region(whole, table)
        finally:
            table.save()
        self.original["latency"] = timing.seconds
        scale_times([*self.layers, *self._several], timing.seconds)

    def choose(self, limits: Sequence[Limit]) -> Choice:
        """The allocation that loses least; where a limit cannot be met, the error says how far, and what was left."""
        if not any(limit.kind == "latency" for limit in limits):
            return self._choose(limits, self.allocator.absolute(limits))
        self._time()
        return self._within_latency(limits)

    def _choose(self, limits: Sequence[Limit], absolute: Mapping[str, float]) -> Choice:
        (choice,) = settled(self._several, self.meter, lambda: [self.allocator.choose(limits, absolute)], self.say)
        return choice

    @property
    def _several(self) -> list[UnitCandidates | RegionCandidates]:
        """What changes several layers at once."""
        return [*self.units, *self.regions]

    @cached_property
    def meter(self) -> LossMeter | None:
        """What measures the loss of single changes; None where losses are not those of the model."""
        if self.statistics is None or self.statistics.kind != "loss" or self.batches is None:
            return None
        return LossMeter(self.model, self.replaceable, self.statistics, self.batches.first()[0])

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

    def frontier(self, kind: str, limits: Sequence[Limit] = (), points: int = 25) -> list[Choice]:
        """The least losses at so many limits of a kind, from the original to the smallest, within those of others."""
        if kind == "latency" or any(limit.kind == "latency" for limit in limits):
            self._time()
        return settled(self._several, self.meter, lambda: self.allocator.frontier(kind, limits, points), self.say)

    def decomposer(self, op: Op, weight: Tensor) -> Factors | None:
        """The factors of an op in the norm of the statistics; None where there are none of its layer."""
        return self._factors(op, weight)

    def _factors(self, op: Op, weight: Tensor, fitted: bool = True) -> Factors | None:
        if self.statistics is None:
            return None
        if op.action == "narrow":
            return self.replaceable.kept(op, op.path, weight, self.statistics)
        if op.action == "substitute":
            return fitted_map(self.replaceable, op.path, self.statistics)
        spec = self.replaceable.specs.get(op.path)
        if spec is None or weight.shape != spec.weight_shape:  # narrowed before
            return None
        weighted = self.replaceable.weighted(op.path, weight, self.statistics, fitted)
        return FORMS[op.settings["form"]].fit(weighted, op.settings["widths"], op.settings.get("axes"))

    def refit(self, rewritten: nn.Module, plan: Plan) -> Fit:
        """Fits the model with a plan carried out to the original on the calibration inputs, in place: as `refit`.

        A fit under which held-out inputs lose more than without one is taken back.
        """
        if self.batches is None or self.settings.refit == "none":
            return Fit()
        functions = sorted(self.replaceable.functions.keys() & {op.path for op in plan.ops})
        if functions:
            self.notes.append(f"called as functions, and therefore not fitted: {_few(functions)}")
        specs = self.replaceable.specs
        repeated = sorted(self.replaceable.repeated & {op.path for op in plan.ops if op.path in specs})
        if repeated:
            if self.statistics is not None:
                shift_biases(self.captured.model, rewritten, repeated, specs, self.statistics)
            self.notes.append(f"called several times, and therefore fitted in their biases only: {_few(repeated)}")
        full = self.settings.refit == "full"
        steps = fit_steps(self.captured, rewritten, plan, specs, self.statistics, factors=full)
        if not steps:
            return Fit()
        room = Room(self.captured, self.batches.samples)
        modules = [rewritten.get_submodule(step if isinstance(step, str) else step.path) for step in steps]
        state = [(t, t.detach().clone()) for module in modules for t in (*module.parameters(), *module.buffers())]
        chunks, spill = room.first(self.batches.calibration()), Spill(room.memory) if room.spilled else None
        errors = refit(
            self.model,
            rewritten,
            steps,
            chunks,
            self.say,
            kept=kept_channels(plan),
            seed=self.settings.seed,
            spill=spill,
        )
        self.notes += room.notes()
        fitted = self.measure(rewritten)
        unfitted = self._without_fit(rewritten, plan, steps, state, fitted.loss)
        return Fit(errors, fitted) if unfitted is None else Fit({}, unfitted)

    def measure(self, rewritten: nn.Module) -> Measured:
        """How far a model is from the original on held-out inputs."""
        assert self.batches is not None
        return compare(self.model, rewritten, self.batches.held_out(), self.outputs)

    def _without_fit(
        self,
        rewritten: nn.Module,
        plan: Plan,
        steps: Sequence[Target | str],
        state: Sequence[tuple[Tensor, Tensor]],
        fitted: float,
    ) -> Measured | None:
        """Makes of a fitted model what it is without a fit, if that loses less; else None, and it stays.

        ``state``: the tensors that were fitted, and what they were.
        """
        after = [tensor.detach().clone() for tensor, _ in state]
        weights = {step.path: step.weight for step in steps if isinstance(step, Target)}
        with torch.no_grad():
            for tensor, before in state:
                tensor.copy_(before)
        for op in plan.ops:  # of which others may have made plain weights of the layer first
            factorized = op.action == "factorize" and op.path in weights
            factors = self._factors(op, weights[op.path], fitted=False) if factorized else None
            if factors is not None:
                cast(Factorized, rewritten.get_submodule(op.path)).load_factors(factors, None)
        unfitted = self.measure(rewritten)
        if unfitted.loss < fitted:
            self.notes.append("fitting made the held-out loss larger, and was taken back")
            return unfitted
        with torch.no_grad():
            for (tensor, _), value in zip(state, after):
                tensor.copy_(value)
        return None


def _checked(budget: Budget, calibrated: bool) -> Budget:
    """The same, with what was left open filled in."""
    sensitivity = budget.sensitivity or ("loss" if calibrated else "weights")
    for option, typed in typed_fields(Budget):
        value = getattr(budget, option.name)
        if typed.choices and value is not None and value not in typed.choices:
            raise UsageError(f"unknown {option.name} {value!r}", expected=", ".join(typed.choices))
    if sensitivity != "weights" and not calibrated:
        hint = "give some, or choose the sensitivity weights"
        raise UsageError(f"the sensitivity {sensitivity} needs calibration inputs", hint=hint)
    error = budget.max_layer_error
    if error is not None and not 0 < error <= 1:
        raise UsageError("the largest error of a layer is out of range", expected="above 0, up to 1", got=str(error))
    if budget.multiple is not None and budget.multiple < 1:
        raise UsageError("widths are multiples of 1 or more", got=str(budget.multiple))
    return replace(budget, sensitivity=sensitivity, refit=budget.refit or "full" if calibrated else "none")


def costs_of(captured: Capture) -> dict[str, float]:
    """What a model costs, by kind of limit; its latency is measured apart."""
    costs = [info(node).cost for node in captured.graph.nodes]
    macs, nbytes = sum(cost.macs for cost in costs), sum(cost.bytes for cost in costs)
    return {"params": float(captured.params), "macs": float(macs), "bytes": float(nbytes)}


def batches_of(calibration: Iterable[Tree], inputs: Inputs, settings: Budget, size: int | None, chunk: int) -> Batches:
    """Calibration inputs in chunks of so many samples; the same where they are in chunks already."""
    if isinstance(calibration, Batches):
        return calibration
    if isinstance(settings.batch, str):
        raise UsageError(f"batch={settings.batch!r} is a name", hint="give the function itself")
    return Batches(calibration, inputs, size=size, chunk=chunk, batch=settings.batch)


def _few(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
