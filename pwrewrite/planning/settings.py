"""What a planner is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.errors import UsageError
from .candidates import forms_named

SENSITIVITIES = ("loss", "activations", "weights")
REFITS = ("full", "bias", "none")


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
        gate: ``latency`` to use only candidates that are measured to be faster than the layer.
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
    gate: str | None = None

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
        if self.gate not in (None, "latency"):
            raise UsageError(f"unknown gate {self.gate!r}", expected="latency")
        forms_named(self.forms)
        return replace(self, sensitivity=chosen, refit=self.refit if calibrated else "none")
