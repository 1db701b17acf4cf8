"""What a verification says, as plain records. `pwrewrite.verify` makes them."""

from __future__ import annotations

from dataclasses import dataclass

from .records import Record, Shown


@dataclass(frozen=True, slots=True)
class Check(Record):
    """One thing that was checked.

    Attributes:
        name: Such as ``shapes (eval, batch 2)``.
        passed: Whether it held.
        detail: What was measured or, where it failed, what differed and where.
    """

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Verification(Shown, Record):
    """Whether a rewritten model is still the same model.

    Attributes:
        checks: What was checked, in order.
        relative_error: ``‖y − ŷ‖ / ‖y‖`` over all floating outputs in eval mode; None where no run was possible.
        agreement: Part of the inputs for which a classifier's largest output is the same; None for other models.
        diverges_at: Path of the first layer where the two models differ by more than a check allows; ``(root)`` where
            they differ in the model's own code, None where no check failed so.
        notes: What was not checked, and why; what was left out of a comparison.
    """

    checks: tuple[Check, ...]
    relative_error: float | None = None
    agreement: float | None = None
    diverges_at: str | None = None
    notes: tuple[str, ...] = ()
    also = ("passed",)

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not hold."""
        return tuple(check for check in self.checks if not check.passed)
