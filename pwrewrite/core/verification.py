"""What a verification says, as plain records. `pwrewrite.verify` makes them."""

from __future__ import annotations

from dataclasses import dataclass

from .records import Record, Shown


@dataclass(frozen=True, slots=True)
class Check(Record):
    """One thing that was checked, such as ``shapes (eval, batch 2)``; the detail is what was measured or differed."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Verification(Shown, Record):
    """Whether a rewritten model is still the same model.

    Attributes:
        relative_error: ``‖y − ŷ‖ / ‖y‖`` over all floating outputs in eval mode; None where no run was possible.
        agreement: Part of the samples for which a classifier's largest output is the same; None for other models.
        diverges_at: Path of the first layer where the two models differ by more than a check allows; ``(root)`` where
            they differ in the model's own code.
        notes: What was not checked, and why; what was left out of a comparison.
        exact: Whether the outputs had to agree up to rounding, as those of an exact rewrite must.
        max_error: Largest relative error that passes, for a rewrite that is not exact.
    """

    checks: tuple[Check, ...]
    relative_error: float | None = None
    agreement: float | None = None
    diverges_at: str | None = None
    notes: tuple[str, ...] = ()
    samples: int = 0
    exact: bool = False
    max_error: float | None = None
    also = ("passed",)

    @property
    def agreeing(self) -> int:
        """For how many of the samples a classifier's largest output is the same."""
        return round((self.agreement or 0.0) * self.samples)

    @property
    def changed(self) -> bool:
        """Whether the outputs differ by more than rounding: the structure may be verified all the same."""
        return not self.exact and bool(self.relative_error)

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not hold."""
        return tuple(check for check in self.checks if not check.passed)
