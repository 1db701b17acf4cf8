"""From a model, calibration inputs and a budget to a plan, and to a rewritten model that loses little.

`Planner` takes the steps that all plans for one model share once: capture, calibration
(`pwrewrite.planning.statistics`, cached on disk), candidates (`pwrewrite.planning.candidates`). A budget is then a
question of allocation alone, and the frontier one of many of them. `Planner.decomposer` gives the weights behind a plan
and `Planner.refit` fits them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..capture import Inputs, capture
from ..capture.records import Capture
from ..decompose import Factors
from ..errors import RefusedError, UsageError
from ..modules import Factorized
from ..plan import Op, Plan, Skip, SkipReason
from .allocate import Allocation, Infeasible, Option, allocate, frontier
from .batches import Batches
from .budget import Budget
from .cache import cache_folder, content_key, read_statistics, write_statistics
from .candidates import Candidate, LayerCandidates, Meant, forms_named, make_candidates, weighted_layer
from .refit import Target, refit
from .residuals import residuals
from .statistics import Statistics, gather
from .weighted import WeightedLayer

Say = Callable[[str, float | None], None]

SENSITIVITIES = ("loss", "activations", "weights")
REFITS = ("full", "bias", "none")

_CHUNK = 32
_RUN_BYTES = 1024**3
"""About how many bytes of activations one calibration run may hold."""
_FRONTIER_BYTES = 5 * 1024**3 // 2
"""About how many bytes of live activations refitting may hold."""


@dataclass(frozen=True)
class Settings:
    """What a planner is asked.

    Attributes:
        forms: Names of forms or of sets of them.
        sensitivity: In what norm a layer's error counts: ``loss``, ``activations`` or ``weights``; the best that the
            calibration allows where None.
        refit: ``full``, ``bias`` or ``none``.
        include: Patterns on paths; all layers where empty.
        exclude: Patterns on paths that stay as they are.
        multiple: What widths are rounded to; None for 8 where the channels are 64 or more.
        largest_error: Largest relative error of a single layer, in the norm of its prediction.
        replan: Whether parts of earlier rewrites are looked at.
        seed: Of everything that is drawn.
    """

    forms: tuple[str, ...] = ("all",)
    sensitivity: str | None = None
    refit: str = "full"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    multiple: int | None = None
    largest_error: float | None = None
    replan: bool = False
    seed: int = 0

    def check(self, calibrated: bool) -> Settings:
        """The same, with what was left open filled in.

        Args:
            calibrated: Whether there are calibration inputs.

        Raises:
            UsageError: If a setting makes no sense.
        """
        chosen = self.sensitivity or ("loss" if calibrated else "weights")
        if chosen not in SENSITIVITIES:
            raise UsageError(f"unknown sensitivity {chosen!r}", expected=", ".join(SENSITIVITIES))
        if chosen != "weights" and not calibrated:
            raise UsageError(
                f"the sensitivity {chosen} needs calibration inputs",
                hint="give some, or choose the sensitivity weights",
            )
        if self.refit not in REFITS:
            raise UsageError(f"unknown refit {self.refit!r}", expected=", ".join(REFITS))
        if self.largest_error is not None and not 0 < self.largest_error <= 1:
            raise UsageError(
                "the largest error of a layer is out of range", expected="above 0, up to 1", got=str(self.largest_error)
            )
        if self.multiple is not None and self.multiple < 1:
            raise UsageError("widths are multiples of 1 or more", got=str(self.multiple))
        forms_named(self.forms)
        return replace(self, sensitivity=chosen, refit=self.refit if calibrated else "none")


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
        settings: Settings,
        *,
        size: int | None = None,
        say: Say | None = None,
        captured: Capture | None = None,
    ) -> None:
        self.say = say or (lambda what, share: None)
        self.settings = settings.check(calibration is not None)
        self.model = model
        self.captured = captured or capture(model, inputs)
        self.notes: list[str] = []
        forms = forms_named(self.settings.forms)
        self.meant = Meant(
            self.captured,
            forms,
            include=self.settings.include,
            exclude=self.settings.exclude,
            replan=self.settings.replan,
        )
        self.batches: Batches | None = None
        if calibration is not None:
            self.batches = _batches(calibration, inputs, size, self._run_size())
        self.statistics = self._calibrate()
        self.layers: list[LayerCandidates] = self._candidates()
        self.original = {
            "params": float(self.captured.params),
            "macs": float(sum(node.meta["info"].cost.macs for node in self.captured.graph.nodes)),
        }

    # ----------------------------------------------------------------------------------------- calibrating

    def _run_size(self) -> int:
        """Samples that one calibration run may hold."""
        return int(min(_CHUNK, max(1, _RUN_BYTES // max(1, self._bytes_per_sample()))))

    def _bytes_per_sample(self) -> int:
        made = sum(
            tensor.nbytes
            for node in self.captured.graph.nodes
            if node.meta["info"].alias_of is None and node.op not in ("placeholder", "get_attr", "output")
            for tensor in node.meta["info"].outputs
        )
        return int(made) // self._example_samples()

    def _example_samples(self) -> int:
        for node in self.captured.graph.nodes:
            if node.op == "placeholder" and node.meta["info"].outputs and node.meta["info"].outputs[0].shape:
                return max(1, int(node.meta["info"].outputs[0].shape[0]))
        return 1

    def _calibrate(self) -> Statistics | None:
        if self.batches is None or self.settings.sensitivity == "weights":
            return None
        import torch.distributed as dist

        batches, settings = self.batches, self.settings
        apart = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        folder = None if apart else cache_folder("statistics")
        specs = self.meant.specs()
        facts = {"seed": settings.seed, "kind": settings.sensitivity, "chunk": batches.chunk}
        self.say("reading the calibration inputs", None)
        key = content_key(self.captured, specs, batches.fingerprint(), facts) if folder is not None else ""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        start, complete = read_statistics(folder, key, device)
        if start is None or not complete:
            start = self._gather(start, folder, key, specs)
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
            shown = ", ".join(sparse[:3]) + (f" and {len(sparse) - 3} more" if len(sparse) > 3 else "")
            self.notes.append(
                f"too few calibration inputs for {shown}: fewer than two patches per patch element; their "
                "statistics are drawn to the identity, and more inputs would serve better"
            )
        blind = [path for path, one in found.layers.items() if found.kind == "loss" and one.gradients is None]
        if blind:
            self.notes.append(f"no gradient reaches {', '.join(blind[:3])}: their errors count without a weight")

    def _candidates(self) -> list[LayerCandidates]:
        settings = self.settings
        return make_candidates(
            self.meant,
            self.statistics,
            centred=settings.refit != "none",
            multiple=settings.multiple,
            largest_error=settings.largest_error,
            progress=lambda path, share: self.say(f"looking at {path}", share),
        )

    # ------------------------------------------------------------------------------------------ allocating

    def choose(self, budgets: Sequence[Budget]) -> Choice:
        """The allocation that loses least within budgets.

        Raises:
            RefusedError: If a budget cannot be met; says what the smallest one is.
        """
        limits: dict[str, float] = {b.kind: b.absolute(self.original[b.kind]) for b in budgets}
        fixed = self._fixed(limits)
        groups = self._options(tuple(limits))
        try:
            found = allocate(groups, {kind: limit - fixed[kind] for kind, limit in limits.items()})
        except Infeasible as error:
            raise self._unmet(error, budgets, fixed) from None
        return self._choice(found, budgets)

    def frontier(self, kind: str, budgets: Sequence[Budget] = (), points: int = 25) -> list[Choice]:
        """The least losses for budgets of one kind, from the original down to the smallest."""
        limits: dict[str, float] = {b.kind: b.absolute(self.original[b.kind]) for b in budgets}
        fixed = self._fixed({**limits, kind: 0.0})
        groups = self._options((*limits, kind))
        found = frontier(groups, kind, limits={k: limit - fixed[k] for k, limit in limits.items()}, points=points)
        return [self._choice(one, budgets) for one in found]

    def _fixed(self, kinds: Mapping[str, float]) -> dict[str, float]:
        """What the part of the model that cannot change costs."""
        return {kind: self.original[kind] - sum(one.candidates[0].costs[kind] for one in self.layers) for kind in kinds}

    def _options(self, kinds: Sequence[str]) -> list[list[Option]]:
        return [
            [Option(c.loss, {kind: c.costs[kind] for kind in kinds}) for c in one.candidates] for one in self.layers
        ]

    def _choice(self, found: Allocation, budgets: Sequence[Budget]) -> Choice:
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
        plan = Plan(ops, (*self.meant.skips, *kept), {}, facts)
        return Choice(plan, found.loss, found.gap, costs)

    def _unmet(self, error: Infeasible, budgets: Sequence[Budget], fixed: Mapping[str, float]) -> RefusedError:
        kind = error.kind
        if kind is None:
            asked = " and ".join(map(str, budgets))
            return RefusedError(
                f"the budgets {asked} cannot be met together",
                hint="loosen one of them, or allow more --forms or layers",
            )
        least = error.smallest + fixed[kind]
        budget = next(b for b in budgets if b.kind == kind)
        share = least / self.original[kind] if self.original[kind] else 1.0
        return RefusedError(
            f"the budget {budget} cannot be met",
            expected=f"at least {kind}={share:.4f}, {least:,.0f} of {self.original[kind]:,.0f}",
            got=str(budget),
            hint="allow more --forms or layers, or ask for less",
        )

    # ---------------------------------------------------------------------------------------------- weights

    def decomposer(self, op: Op, weight: Tensor) -> Factors | None:
        """The factors of an op in the norm of the statistics; None where there are none of its layer."""
        one = self._weighted(op.path, weight)
        if one is None or self.settings.sensitivity == "weights":
            return None
        return one.factors(op.settings["form"], op.settings["widths"], op.settings.get("axes"))

    def _weighted(self, path: str, weight: Tensor) -> WeightedLayer | None:
        spec = self.meant.specs().get(path)
        if spec is None:
            return None
        return weighted_layer(weight, spec, path, self.statistics, centred=self.settings.refit != "none")

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
        targets = self._targets(rewritten, plan)
        if not targets:
            return {}
        order, norms = self._order({target.path for target in targets})
        chunks = islice(self.batches.calibration(), self._frontier_chunks())
        return refit(
            self.model,
            rewritten,
            targets,
            norms,
            order,
            chunks,
            factors=self.settings.refit == "full",
            seed=self.settings.seed,
            progress=lambda path, share: self.say(f"fitting {path}", share),
        )

    def _targets(self, rewritten: nn.Module, plan: Plan) -> list[Target]:
        calls = {layer.path: len(layer.calls) for layer in self.captured.layers}
        specs = self.meant.specs()
        paths = []
        for op in plan.ops:
            once = calls.get(op.path) == 1 and op.path in specs and op.action == "factorize"
            if once and isinstance(_module(rewritten, op.path), Factorized):
                paths.append(op.path)
        where = residuals(self.captured, paths)
        found = []
        for path in paths:
            one = self.statistics.layers.get(path) if self.statistics is not None else None
            weight: Any = self.model.get_submodule(path).weight
            gradients = one.gradient_moment() if one is not None else None
            found.append(Target(path, specs[path], weight.detach(), gradients, where.get(path)))
        return found

    def _order(self, paths: set[str]) -> tuple[list[str], list[str]]:
        """Layers to fit and batch norms behind the first of them, as they run; and the norms alone."""
        called: dict[str, int] = {}
        order: list[str] = []
        for node in self.captured.graph.nodes:
            info = node.meta["info"]
            path = str(node.target) if node.op == "call_module" else info.path
            if (node.op == "call_module" and path in paths) or info.op == "batch_norm":
                called[path] = called.get(path, 0) + 1
                order.append(path)
        first = next((i for i, path in enumerate(order) if path in paths), len(order))
        found, norms = [], []
        for path in order[first:]:
            if path not in paths:
                module = _module(self.model, path)
                if called[path] > 1 or not isinstance(module, _BatchNorm) or module.running_mean is None:
                    continue
                norms.append(path)
            found.append(path)
        return found, norms

    def _frontier_chunks(self) -> int:
        """How many chunks may move through both models together."""
        assert self.batches is not None
        live = peak = 0
        for event in self.captured.memory:
            live += event.nbytes
            peak = max(peak, live)
        per_chunk = 2 * max(1, peak // self._example_samples()) * self.batches.chunk
        chunks = int(max(1, _FRONTIER_BYTES // per_chunk))
        expected = self.batches.expected or self.batches.samples
        if expected and chunks * self.batches.chunk < 0.8 * expected:
            self.notes.append(
                f"fitted on {chunks * self.batches.chunk} of {expected} calibration inputs: more of their activations "
                "would not fit into memory at once"
            )
        return chunks


def _batches(calibration: Iterable[Any], inputs: Inputs, size: int | None, chunk: int) -> Batches:
    if isinstance(calibration, Batches):
        return calibration
    return Batches(calibration, inputs, size=size, chunk=chunk)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
