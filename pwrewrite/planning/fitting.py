"""Fits a model with a plan carried out to the original, and takes that back where held-out inputs lose more by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ..core.plan import Plan
from ..core.text import few
from ..layers.factorized import Factorized
from .calibrating import Calibrated
from .fit_steps import fit_steps, kept_channels, shift_biases
from .outputs import Measured
from .refit import Target, refit
from .room import Room
from .spill import Spill


@dataclass(frozen=True)
class Fit:
    """What a fit came to.

    Attributes:
        errors: Path to the relative error of the weights of each layer whose factors were fitted.
        held_out: How far the model is from the original now; None where nothing was fitted.
    """

    errors: Mapping[str, float] = field(default_factory=dict)
    held_out: Measured | None = None


def fit(calibrated: Calibrated, rewritten: nn.Module, plan: Plan) -> Fit:
    """Fits the model with a plan carried out to the original on the calibration inputs, in place: as `refit`.

    A fit under which held-out inputs lose more than without one is taken back.
    """
    if calibrated.batches is None or calibrated.settings.refit == "none":
        return Fit()
    functions = sorted(calibrated.replaceable.functions.keys() & {op.path for op in plan.ops})
    if functions:
        calibrated.notes.append(f"called as functions, and therefore not fitted: {few(functions)}")
    specs = calibrated.replaceable.specs
    repeated = sorted(calibrated.replaceable.repeated & {op.path for op in plan.ops if op.path in specs})
    if repeated:
        if calibrated.statistics is not None:
            shift_biases(calibrated.captured.model, rewritten, repeated, specs, calibrated.statistics)
        calibrated.notes.append(f"called several times, and therefore fitted in their biases only: {few(repeated)}")
    full = calibrated.settings.refit == "full"
    steps = fit_steps(calibrated.captured, rewritten, plan, specs, calibrated.statistics, factors=full)
    if not steps:
        return Fit()
    room = Room(calibrated.captured, calibrated.batches.samples)
    modules = [rewritten.get_submodule(step if isinstance(step, str) else step.path) for step in steps]
    state = [(t, t.detach().clone()) for module in modules for t in (*module.parameters(), *module.buffers())]
    chunks, spill = room.first(calibrated.batches.calibration()), Spill(room.memory) if room.spilled else None
    errors = refit(
        calibrated.model,
        rewritten,
        steps,
        chunks,
        calibrated.say,
        kept=kept_channels(plan),
        seed=calibrated.settings.seed,
        spill=spill,
    )
    calibrated.notes += room.notes()
    fitted = calibrated.measure(rewritten)
    unfitted = _without_fit(calibrated, rewritten, plan, steps, state, fitted.loss)
    return Fit(errors, fitted) if unfitted is None else Fit({}, unfitted)


def _without_fit(
    calibrated: Calibrated,
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
        factors = calibrated.decomposer(op, weights[op.path], fitted=False) if factorized else None
        if factors is not None:
            cast(Factorized, rewritten.get_submodule(op.path)).load_factors(factors, None)
    unfitted = calibrated.measure(rewritten)
    if unfitted.loss < fitted:
        calibrated.notes.append("fitting made the held-out loss larger, and was taken back")
        return unfitted
    with torch.no_grad():
        for (tensor, _), value in zip(state, after):
            tensor.copy_(value)
    return None
