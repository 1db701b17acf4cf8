"""What an export comes to, as plain records. `pwrewrite.export` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .records import Record, Shown

EXPORT_SCHEMA = "pwrewrite.export/1"


@dataclass(frozen=True, slots=True)
class Exported(Record):
    """One format.

    Attributes:
        passed: Whether what was written does what the model does; nothing is left where it does not.
        detail: What was compared, or what differs.
        bytes: Size of the files.
        seconds: The time of the first of the calls compared, in its runtime, ``engine``; None where it did not run.
        error: Largest relative difference of an output, ``‖y − ŷ‖ / ‖y‖``, to the model in float64.
        differs_at: The first layer or node that differs.
        loss: Of what is quantized: its loss on held-out inputs, in the unit in which plans predict it; None else.
        agreement: How often it names the same class; None where no classes are named.
        layers: Of what is quantized: each layer with weights to the precision in which it runs.
    """

    format: str
    passed: bool
    detail: str
    files: tuple[str, ...] = ()
    bytes: int = 0
    seconds: float | None = None
    engine: str = ""
    error: float | None = None
    differs_at: str | None = None
    loss: float | None = None
    agreement: float | None = None
    layers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, repr=False)
class Exports(Shown, Record):
    """An export in all its formats.

    Attributes:
        inputs: Name of an input to its form, such as ``batch×3×224×224 float32``.
        outputs: The same of the outputs, as at the first call.
        bytes: Of the model's weights.
        seconds: The time of the model itself, for the first call.
    """

    target: str
    formats: tuple[Exported, ...]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    schema: str = field(default=EXPORT_SCHEMA)
    also = ("passed",)

    @property
    def passed(self) -> bool:
        """Whether every format does what the model does."""
        return all(each.passed for each in self.formats)
