"""From a model, calibration inputs and a budget to a plan, and to a rewritten model that loses little.

`Planner` takes the steps that all plans for one model share once: capture, calibration
(`pwrewrite.planning.statistics`, cached on disk), candidates (`pwrewrite.planning.candidates`). A budget is then a
question of allocation alone, and the frontier one of many of them. `Planner.decomposer` gives the weights behind a plan
and `Planner.refit` fits them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..capturing import Inputs, capture, split_inputs
from ..capturing.records import Capture, info
from ..core.errors import RefusedError
from ..core.files import cache_folder
from ..core.options import Budget
from ..core.plan import Op, Plan, Skip, SkipReason
from ..decompose import Factors
from ..engines.timing import time_models
from ..forms import FORMS
from .allocate import Allocation, Infeasible, Option, allocate, frontier
from .batches import Batches
from .budget import Limit
from .cache import content_key, read_statistics, write_statistics
from .candidates import (
    Candidate,
    LayerCandidates,
    ReplaceableLayers,
    forms_named,
    make_candidates,
    timed,
    weighted_layer,
)
from .fitting import fit_steps, shift_biases
from .latency import LatencyTable, Place, time_plan
from .refit import refit
from .room import Limited, Room, room_in_lockstep, samples_in_run
from .settings import checked
from .spill import Spill
from .statistics import Statistics, gather

Say = Callable[[str, float | None], None]

_ATTEMPTS = 4
"""How often a latency budget is tightened at most."""
_NEAR, _FAR = 1.01, 1.05


@dataclass(frozen=True)
class Choice:
    """One allocation as a plan.

    Attributes:
        plan: What to do.
        loss: Predicted loss, the sum over the layers.
        gap: How far at most the loss is from the least one, as a share, as the solver proved.
        costs: What the whole model then costs, by kind.
    """

    plan: Plan
    loss: float
    gap: float
    costs: Mapping[str, float]


class Planner:
    """A model, calibrated.

    Args:
        model: The model; stays as it is.
        inputs: Example inputs.
        calibration: Any iterable of inputs, or `Batches`; None to plan by the weights alone.
        settings: What is asked.
        size: Use at most so many calibration inputs.
        say: Called at each step.
        captured: The model's capture, where it is at hand.

    Attributes:
        layers: The layers that may change, with their candidates.
        original: What the model costs now, by kind.
        notes: What a reader should be told.

    Raises:
        UsageError: If a setting or the calibration makes no sense.
        RefusedError: If activations are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        calibration: Iterable[Any] | None,
        settings: Budget,
        *,
        size: int | None = None,
        say: Say | None = None,
        captured: Capture | None = None,
    ) -> None:
        self.say = say or (lambda what, share: None)
        self.settings = checked(settings, calibration is not None)
        self.model, self.inputs = model, inputs
        self.captured = captured or capture(model, inputs)
        self.notes: list[str] = []
        forms = forms_named(self.settings.forms)
        self.replaceable = ReplaceableLayers(
            self.captured,
            forms,
            include=self.settings.include,
            exclude=self.settings.exclude,
            replan=self.settings.replan,
        )
        self.batches: Batches | None = None
        if calibration is not None:
            self.batches = _batches(calibration, inputs, size, samples_in_run(self.captured))
        self.statistics = self._calibrate()
        self.layers: list[LayerCandidates] = self._candidates()
        self.original = {
            "params": float(self.captured.params),
            "macs": float(sum(info(node).cost.macs for node in self.captured.graph.nodes)),
            "bytes": float(sum(info(node).cost.bytes for node in self.captured.graph.nodes)),
        }
        self._timed = False
        if self.settings.gate == "latency":
            self._time()

    # ----------------------------------------------------------------------------------------- calibrating

    def _calibrate(self) -> Statistics | None:
        if self.batches is None or self.settings.sensitivity == "weights":
            return None
        import torch.distributed as dist

        batches, settings = self.batches, self.settings
        apart = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        folder = None if apart else cache_folder("statistics")
        specs = self.replaceable.specs()
        facts = {"seed": settings.seed, "kind": settings.sensitivity, "chunk": batches.chunk}
        self.say("reading the calibration inputs", None)
        key = content_key(self.captured, specs, batches.fingerprint(), facts) if folder is not None else ""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        start, complete = read_statistics(folder, key, device)
        if start is None or not complete:
            start = self._gather(start, folder, key, specs)
            start.round()
        start.all_reduce()
        self.notes += batches.notes
        self._tell_sparse(start)
        return start

    def _gather(self, start: Statistics | None, folder: Any, key: str, specs: Mapping[str, Any]) -> Statistics:
        batches = self.batches
        assert batches is not None
        expected = batches.expected or batches.samples or None
        found = start or Statistics(kind=str(self.settings.sensitivity))

        def each(now: Statistics) -> None:
            self.say("calibrating", min(1.0, now.samples / expected) if expected else None)

        try:
            gather(
                self.model,
                specs,
                batches.calibration(),
                gradients=self.settings.sensitivity == "loss",
                seed=self.settings.seed,
                expected=expected,
                start=found,
                functions=self.replaceable.functions(),
                each=each,
            )
        except BaseException:
            write_statistics(folder, key, found, complete=False)
            raise
        self.say("keeping the statistics", None)
        write_statistics(folder, key, found, complete=True)
        return found

    def _tell_sparse(self, found: Statistics) -> None:
        """Says where the inputs were too few."""
        sparse = [path for path, one in found.layers.items() if one.rows < 2 * one.means.shape[1]]
        if sparse:
            self.notes.append(
                f"too few calibration inputs for {_few(sparse)}: fewer than two patches per patch element; their "
                "statistics are drawn to the identity, and more inputs would serve better"
            )
        blind = [path for path, one in found.layers.items() if found.kind == "loss" and one.gradients is None]
        if blind:
            self.notes.append(f"no gradient reaches {', '.join(blind[:3])}: their errors count without a weight")

    def _candidates(self) -> list[LayerCandidates]:
        settings = self.settings
        return make_candidates(
            self.replaceable,
            self.statistics,
            centred=settings.refit != "none",
            multiple=settings.multiple,
            max_layer_error=settings.max_layer_error,
            progress=lambda path, share: self.say(f"looking at {path}", share),
        )

    def _time(self) -> None:
        """Measures the model, its layers and their candidates; those that are not faster are given up."""
        if self._timed:
            return
        place = Place.of(self.model)
        table = LatencyTable(place)
        args, kwargs = split_inputs(self.inputs)
        self.say("timing the model", None)
        (self.original["latency"],) = time_models([self.model], args, kwargs)
        try:
            for i, one in enumerate(self.layers):
                self.say(f"timing {one.layer.path}", i / len(self.layers))
                one.candidates = timed(one, table)
        finally:
            table.save()
        self._timed = True

    # ------------------------------------------------------------------------------------------ allocating

    def choose(self, budgets: Sequence[Limit]) -> Choice:
        """The allocation that loses least within budgets.

        Raises:
            RefusedError: If a budget cannot be met; says what the smallest one is.
        """
        if any(b.kind == "latency" for b in budgets):
            self._time()
        limits: dict[str, float] = {b.kind: b.absolute(self.original[b.kind]) for b in budgets}
        if "latency" not in limits:
            return self._allocated(limits, budgets)
        return self._within_latency(limits, budgets)

    def _allocated(self, limits: Mapping[str, float], budgets: Sequence[Limit]) -> Choice:
        fixed = self._fixed(limits)
        groups = self._options(tuple(limits))
        try:
            found = allocate(groups, {kind: limit - fixed[kind] for kind, limit in limits.items()})
        except Infeasible as error:
            raise self._unmet(error, budgets, fixed) from None
        return self._choice(found, budgets)

    def _within_latency(self, limits: dict[str, float], budgets: Sequence[Limit]) -> Choice:
        """Allocates by the layers' own times, and tightens the limit until the whole model meets it.

        Layers do not add up to the model, and the best of many measured candidates is partly lucky.
        """
        wanted = limits["latency"] / self.original["latency"]
        aim, best = wanted, None
        for attempt in range(_ATTEMPTS):
            try:
                choice = self._allocated({**limits, "latency": aim * self.original["latency"]}, budgets)
            except RefusedError:
                if best is None:
                    raise
                break
            self.say("timing the plan", attempt / _ATTEMPTS)
            reached = time_plan(self.model, self.inputs, choice.plan)
            if best is None or reached < best[0]:
                best = (reached, choice)
            if reached <= wanted * _NEAR:
                break
            aim *= wanted / reached
        assert best is not None
        reached, choice = best
        if reached > wanted * _FAR:
            self.notes.append(
                f"the whole model is expected to take {reached:.2f} of its time, above the budget of {wanted:.2f}: "
                "what is not a convolution or linear map takes the rest"
            )
        return replace(choice, costs={**choice.costs, "latency": reached * self.original["latency"]})

    def frontier(self, kind: str, budgets: Sequence[Limit] = (), points: int = 25) -> list[Choice]:
        """The least losses for budgets of one kind, from the original down to the smallest."""
        if kind == "latency" or any(b.kind == "latency" for b in budgets):
            self._time()
        limits: dict[str, float] = {b.kind: b.absolute(self.original[b.kind]) for b in budgets}
        fixed = self._fixed({**limits, kind: 0.0})
        groups = self._options((*limits, kind))
        left = {k: limit - fixed[k] for k, limit in limits.items()}
        try:
            found = frontier(groups, kind, limits=left, points=points)
        except Infeasible as error:
            raise self._unmet(error, budgets, fixed) from None
        return [self._choice(one, budgets) for one in found]

    def _fixed(self, kinds: Mapping[str, float]) -> dict[str, float]:
        """What the part of the model that cannot change costs."""
        return {kind: self.original[kind] - sum(one.candidates[0].costs[kind] for one in self.layers) for kind in kinds}

    def _options(self, kinds: Sequence[str]) -> list[list[Option]]:
        return [
            [Option(c.loss, {kind: c.costs[kind] for kind in kinds}) for c in one.candidates] for one in self.layers
        ]

    def _choice(self, found: Allocation, budgets: Sequence[Limit]) -> Choice:
        picked: list[Candidate] = [one.candidates[i] for one, i in zip(self.layers, found.chosen)]
        ops = tuple(c.op for c in picked if c.op is not None)
        kept = [
            Skip(one.layer.path, SkipReason.NO_GAIN, "kept: the budget is met at less loss elsewhere")
            for one, c in zip(self.layers, picked)
            if c.op is None
        ]
        costs = {
            kind: before + sum(c.costs[kind] - one.candidates[0].costs[kind] for one, c in zip(self.layers, picked))
            for kind, before in self.original.items()
        }
        samples = self.statistics.samples if self.statistics is not None else 0
        facts: dict[str, Any] = {
            "limits": {b.kind: str(b).partition("=")[2] for b in budgets},
            "predicted_loss": found.loss,
            "gap": found.gap,
            "sensitivity": self.settings.sensitivity,
            "refit": self.settings.refit,
            "samples": samples,
            "seed": self.settings.seed,
        }
        plan = Plan(ops, (*self.replaceable.skips, *kept), {}, facts)
        return Choice(plan, found.loss, found.gap, costs)

    def _unmet(self, error: Infeasible, budgets: Sequence[Limit], fixed: Mapping[str, float]) -> RefusedError:
        kind = error.kind
        if kind is None:
            asked = " and ".join(map(str, budgets))
            each = [f"{k}={_amount(k, least + fixed[k])}" for k, least in error.together.items()]
            return RefusedError(
                f"the budgets {asked} cannot be met together",
                expected=f"within the others, at least {' or '.join(each)}" if each else None,
                hint="loosen one of them, or allow more --forms or layers",
            )
        least = error.smallest + fixed[kind]
        budget = next(b for b in budgets if b.kind == kind)
        share = least / self.original[kind] if self.original[kind] else 1.0
        return RefusedError(
            f"the budget {budget} cannot be met",
            expected=f"at least {kind}={share:.4f}, {_amount(kind, least)} of {_amount(kind, self.original[kind])}",
            got=str(budget),
            hint="allow more --forms or layers, or ask for less",
        )

    # ---------------------------------------------------------------------------------------------- weights

    def decomposer(self, op: Op, weight: Tensor) -> Factors | None:
        """The factors of an op in the norm of the statistics; None where there are none of its layer."""
        spec = self.replaceable.specs().get(op.path)
        if spec is None or self.settings.sensitivity == "weights":
            return None
        centred = self.settings.refit != "none" and self.replaceable.off_mean(op.path)
        weighted = weighted_layer(weight, spec, op.path, self.statistics, centred=centred)
        return FORMS[op.settings["form"]].fit(weighted, op.settings["widths"], op.settings.get("axes"))

    def refit(self, rewritten: nn.Module, plan: Plan) -> dict[str, float]:
        """Fits a rewritten model to the original on the calibration inputs, in place.

        Args:
            rewritten: The model with the plan carried out.
            plan: The plan.

        Returns:
            Path to the relative error of the weights of every layer that was fitted.
        """
        if self.batches is None or self.settings.refit == "none":
            return {}
        functions = sorted(self.replaceable.functions().keys() & {op.path for op in plan.ops})
        if functions:
            self.notes.append(f"called as functions, and therefore not fitted: {_few(functions)}")
        specs = self.replaceable.specs()
        repeated = sorted(self.replaceable.repeated() & {op.path for op in plan.ops if op.path in specs})
        if repeated:
            shift_biases(self.captured.model, rewritten, repeated, specs, self.statistics)
            self.notes.append(f"called several times, and therefore fitted in their biases only: {_few(repeated)}")
        factors = self.settings.refit == "full"
        steps = fit_steps(self.captured, rewritten, plan, specs, self.statistics, factors=factors)
        if not steps:
            return {}
        room = room_in_lockstep(self.captured, self.batches.expected)
        chunks = Limited(self.batches.calibration(), room.samples)
        errors = refit(
            self.model,
            rewritten,
            steps,
            chunks,
            seed=self.settings.seed,
            progress=lambda path, share: self.say(f"fitting {path}", share),
            spill=Spill(room.memory) if room.spilled else None,
        )
        if chunks.cut:
            self.notes.append(_left_out(chunks, self.batches.samples, room))
        return errors


def _batches(calibration: Iterable[Any], inputs: Inputs, size: int | None, chunk: int) -> Batches:
    if isinstance(calibration, Batches):
        return calibration
    return Batches(calibration, inputs, size=size, chunk=chunk)


def _left_out(chunks: Limited, samples: int, room: Room) -> str:
    """That not all inputs were fitted to, and why."""
    told = f"fitted on the first {chunks.samples} of {samples} calibration inputs (held-out ones included)"
    if chunks.many:
        return f"{told}: they come in more batches than run together"
    memory, disk, all_of_them = (n / 1024**3 for n in (room.memory, room.disk, samples * room.each))
    return (
        f"{told}: the activations of all may take {all_of_them:.3g} GiB, and there are {memory:.3g} GiB of memory "
        f"for them and {disk:.3g} GiB of disk ({room.folder}; TMPDIR names another folder)"
    )


def _few(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _amount(kind: str, value: float) -> str:
    return f"{1000 * value:.3g} ms" if kind == "latency" else f"{value:,.0f}"
