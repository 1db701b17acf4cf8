"""The options of a planner, checked: `checked` fills in what was left open, or refuses."""

from __future__ import annotations

from dataclasses import replace

from ..core.errors import UsageError
from ..core.options import Budget
from .candidates import forms_named

SENSITIVITIES = ("loss", "activations", "weights")
REFITS = ("full", "bias", "none")


def checked(budget: Budget, calibrated: bool) -> Budget:
    """The same, with what was left open filled in.

    Args:
        budget: The options.
        calibrated: Whether there are calibration inputs.

    Raises:
        UsageError: If a setting makes no sense.
    """
    chosen = budget.sensitivity or ("loss" if calibrated else "weights")
    if chosen not in SENSITIVITIES:
        raise UsageError(f"unknown sensitivity {chosen!r}", expected=", ".join(SENSITIVITIES))
    if chosen != "weights" and not calibrated:
        raise UsageError(
            f"the sensitivity {chosen} needs calibration inputs", hint="give some, or choose the sensitivity weights"
        )
    refit = budget.refit or "full"
    if refit not in REFITS:
        raise UsageError(f"unknown refit {refit!r}", expected=", ".join(REFITS))
    if budget.max_layer_error is not None and not 0 < budget.max_layer_error <= 1:
        raise UsageError(
            "the largest error of a layer is out of range", expected="above 0, up to 1", got=str(budget.max_layer_error)
        )
    if budget.multiple is not None and budget.multiple < 1:
        raise UsageError("widths are multiples of 1 or more", got=str(budget.multiple))
    if budget.gate not in (None, "latency"):
        raise UsageError(f"unknown gate {budget.gate!r}", expected="latency")
    forms_named(budget.forms)
    return replace(budget, sensitivity=chosen, refit=refit if calibrated else "none")
