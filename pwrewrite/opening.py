"""Opening any target, saved folders included: `open_target`.

A folder that `pwrewrite.storage.save` wrote is a target too, so rewrites compose: it is opened as the rewritten model, together
with the plan that leads to it from the original. The original comes from ``--model``, or from the target that the plan
records when the user says that it is trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .errors import PlanError, UsageError
from .loading import LoadedModel, load_target, resolve_inputs
from .loading.inputs import ExampleInputs
from .plan import Plan
from .storage import is_saved, load, read_plan


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be captured, and where it came from.

    Attributes:
        loaded: The model with its example inputs and notes.
        plan: From the original model to this one; None where this is the original.
        origin: The target of the original model, as a plan should record it.
        args: What the original's constructor was given.
    """

    loaded: LoadedModel
    plan: Plan | None
    origin: str
    args: Mapping[str, Any]

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.loaded.model


def open_target(
    target: str,
    *,
    args: Mapping[str, Any] | None = None,
    weights: Path | None = None,
    weights_lenient: bool = False,
    inputs: Sequence[str] = (),
    base: str | None = None,
    trust_target: bool = False,
) -> Opened:
    """Opens a target, a saved folder included.

    Args:
        target: As for `pwrewrite.loading.load_target`, or a saved folder.
        args: Arguments of what makes the (original) model.
        weights: A checkpoint; not for a folder, which holds its own.
        weights_lenient: Accept a checkpoint that fits in part.
        inputs: Example inputs as text.
        base: For a folder: the target of the original model.
        trust_target: For a folder: whether the recorded target may be imported.

    Raises:
        PwrewriteError: If the target does not lead to a model.
    """
    if not is_saved(target):
        if base is not None:
            raise UsageError(
                "--model is the original of a saved folder", got=target, hint="leave it out, or give the folder"
            )
        loaded = load_target(target, args=args, weights=weights, weights_lenient=weights_lenient, inputs=inputs)
        return Opened(loaded, None, target, dict(args or {}))
    if weights is not None:
        raise UsageError("a saved folder holds its own weights", got=f"--weights {weights}", hint="leave --weights out")
    plan = read_plan(target)
    origin = base if base is not None else str(plan.model.get("target") or "")
    made_with = dict(args or plan.model.get("args") or {})
    original = None
    if base is not None:
        original = load_target(base, args=made_with, need_inputs=False).model
    model = load(target, original, trust_target=trust_target)
    example, notes = _inputs(model, plan, inputs)
    return Opened(LoadedModel(model, example, target, notes), plan, origin, made_with)


def _inputs(model: nn.Module, plan: Plan, specs: Sequence[str]) -> tuple[ExampleInputs, tuple[str, ...]]:
    """Inputs from the command line, else as the plan records them."""
    recorded = plan.model.get("inputs") or []
    if not specs and len(recorded) >= 1:
        try:
            specs = [f"{'x'.join(map(str, item['shape']))}:{item['dtype']}" for item in recorded]
        except (KeyError, TypeError) as error:
            raise PlanError("the plan's inputs are not shapes", where="model.inputs", got=repr(error)) from None
    return resolve_inputs(model, None, specs)
