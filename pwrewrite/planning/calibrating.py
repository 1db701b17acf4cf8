"""A model with what calibration inputs say of it: `Calibrated`.

The statistics (`pwrewrite.planning.statistics`) are gathered once and cached on disk. Where the model has no gradients,
and nobody asked for them, errors count in what the layers read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..capturing import Inputs, capture
from ..capturing.records import Capture
from ..core.declaring import typed_fields
from ..core.errors import UsageError
from ..core.nested import Tree
from ..core.options import Budget
from ..core.plan import Op
from ..core.text import few
from ..decompose import Factors
from ..forms import FORMS
from .batches import Batches
from .cache import read_statistics, statistics_file, write_statistics
from .gathering import Gathering, NoGradientsError, gather
from .joint import JOINT
from .memory import Memory
from .norm import Norm
from .outputs import Measured, compare, kind_of_outputs, scoring
from .replaceable import ReplaceableLayers
from .room import samples_in_run
from .running import Say, device_of, evaluating, run_seeded
from .statistics import Statistics

_log = logging.getLogger(__name__)


class Calibrated:
    """A model and what calibration inputs say of the layers that a budget lets change; the model stays as it is.

    Args:
        calibration: Any iterable of inputs, or `Batches`; None to go by the weights alone.
        settings: Which limits and forms, and how to fit.
        size: Use at most so many calibration inputs.

    Attributes:
        replaceable: The layers that may change.
        batches: The calibration inputs; None for none.
        statistics: What was gathered of them; None where only the weights count.
        outputs: What the model's outputs are.
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
        self.memory = Memory()
        self.statistics = self._calibrate()
        self._prepare()

    def _prepare(self) -> None:
        """What a subclass makes of the statistics; comes last when one is made."""

    @property
    def norm(self) -> Norm:
        """The norm in which errors count."""
        return Norm(self.replaceable, self.statistics, self.memory)

    def decomposer(self, op: Op, weight: Tensor, fitted: bool = True) -> Factors | None:
        """The factors of an op in the norm of the statistics; None where there are none of its layer.

        ``fitted``: whether a fit will make up for the mean.
        """
        if self.statistics is None:
            return None
        if op.action in JOINT:
            return JOINT[op.action].factors(self.norm, op, weight)
        spec = self.replaceable.specs.get(op.path)
        if spec is None or weight.shape != spec.weight_shape:  # narrowed before
            return None
        weighted = self.norm.weighted(op.path, weight, fitted)
        return FORMS[op.settings["form"]].fit(weighted, op.settings["widths"], op.settings.get("axes"))

    def measure(self, rewritten: nn.Module) -> Measured:
        """How far a model is from the original on held-out inputs."""
        assert self.batches is not None
        return compare(self.model, rewritten, self.batches.held_out(), self.outputs)

    def _kind_of(self, outputs: object, batches: Batches, known: str = "") -> str:
        """What outputs for the first calibration inputs are, unless it is known; notes labels that do not fit."""
        labels = batches.first()[1]
        kind = self.settings.outputs or known or kind_of_outputs(outputs, labels)
        if labels is not None:
            every = batches.labels()
            why = scoring(outputs, labels if every is None else every, kind)
            if isinstance(why, str):
                self.warn(f"no accuracy is measured, since the labels do not fit: {why}")
        return kind

    def warn(self, note: str) -> None:
        """Notes something, and logs it."""
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
        self.memory = Memory(None if file is None else file.parents[1] / "losses" / file.name, stale=not complete)
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
                f"too few calibration inputs for {few(sparse)}: fewer than two patches per patch element; their "
                "statistics are drawn to the identity, and more inputs would serve better"
            )
        blind = [path for path, sums in layers.items() if sums.gradients is None]
        if blind and statistics.kind == "loss":
            self.notes.append(f"no gradient reaches {few(blind)}: their errors count without a weight")


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


def batches_of(calibration: Iterable[Tree], inputs: Inputs, settings: Budget, size: int | None, chunk: int) -> Batches:
    """Calibration inputs in chunks of so many samples; the same where they are in chunks already."""
    if isinstance(calibration, Batches):
        return calibration
    if isinstance(settings.batch, str):
        raise UsageError(f"batch={settings.batch!r} is a name", hint="give the function itself")
    return Batches(calibration, inputs, size=size, chunk=chunk, batch=settings.batch)
