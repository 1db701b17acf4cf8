"""Comparing what two targets lead to: `verify_targets`."""

from __future__ import annotations

from dataclasses import replace

from ..core.errors import UsageError
from ..core.options import Proof, TargetOptions
from ..core.verification import Verification
from ..targets import load, open_target
from ..targets.storage import is_saved, read_plan
from ..verifying import verify
from .steps import Progress, silent


def verify_targets(
    target: TargetOptions, other: str, proof: Proof | None = None, *, progress: Progress | None = None
) -> Verification:
    """Compares what two targets lead to, opened alike; both may be saved folders.

    Where the second is a folder and the first is not, the first is the original of the second.
    """
    say, proof = progress or silent, proof or Proof()
    say("loading", None)
    folders = is_saved(target.target), is_saved(other)
    if target.base is not None and not any(folders):
        raise UsageError("--model is for saved folders", got=f"{target.target} and {other}, which are none")
    if folders == (False, True) and not target.args:
        target = replace(target, args=read_plan(other).model.get("args") or {})
    first = open_target(replace(target, base=target.base if folders[0] else None))
    if folders == (False, True) and target.base is None:
        second = load(other, first.model)
    else:
        base, weights = (target.base, None) if folders[1] else (None, target.weights)
        second = open_target(replace(target, target=other, base=base, weights=weights)).model
    verification = verify(
        first.model,
        second,
        first.example_inputs,
        max_error=proof.max_error,
        allow_output_change=proof.allow_output_change,
        progress=lambda step: say(f"verifying: {step}", None),
    )
    return replace(verification, notes=(*first.notes, *verification.notes))
