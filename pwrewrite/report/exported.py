"""What an export is, and its page: every format with its size, time and error beside the model's own."""

from __future__ import annotations

from dataclasses import dataclass

from ..analysis.records import versions
from ..core.numbers import duration, size
from ..core.records import Record, Shown
from .page import Column, Facts, Page, Section, Table, Title, notes_part

SCHEMA = "pwrewrite.export/1"
"""Name and version of the JSON: keys may be added under one version, never renamed or removed."""


@dataclass(frozen=True, slots=True)
class Exported(Record):
    """One format, as it was written and run.

    Attributes:
        format: Its name.
        file: The file to open, inside the folder.
        nbytes: Size of all its files.
        runtime: What ran it: name, version, device, threads.
        error: Largest relative error of an output to the model in float64, over all runs.
        own_error: The same of the model in torch.
        batches: Batch sizes that it ran at and agreed.
        seconds: Median time of a run on the example inputs, in its runtime.
        seconds_before: The same of the model in torch, eager, in the same turns.
    """

    format: str
    file: str
    nbytes: int
    runtime: str
    error: float
    own_error: float
    batches: tuple[int | None, ...]
    seconds: float
    seconds_before: float


@dataclass(frozen=True, repr=False)
class Export(Shown, Record):
    """What was exported.

    Attributes:
        target: The model.
        formats: Each format.
        dynamic: Names of the inputs whose first dim may vary.
        outputs: Names of the outputs.
        weight_bytes: Bytes of the model's parameters and buffers.
        folder: Where the files are.
        notes: What a reader should be told.
    """

    target: str
    formats: tuple[Exported, ...]
    dynamic: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_bytes: int
    folder: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The same as plain JSON data."""
        return {"schema": SCHEMA, "versions": versions(), **super().to_dict()}


def page(export: Export) -> Page:
    """A row for each format, and what they have in common."""
    shown = export.formats
    ratios = [each.seconds / each.seconds_before for each in shown]
    table = Table(
        [
            Column("format", [each.format for each in shown], right=False, style="cyan"),
            Column("file", [each.file for each in shown], right=False, code=True),
            Column("size", [size(each.nbytes) for each in shown]),
            Column("error", [f"{each.error:.1e}" for each in shown], keep=3, long="error to float64"),
            Column("time", [duration(each.seconds) for each in shown]),
            Column("of eager", [f"{ratio:.2f}×" for ratio in ratios], keep=4, long="of torch eager's time"),
            Column("run by", [each.runtime for each in shown], right=False, keep=5, wrap=True),
        ]
    )
    first = shown[0]
    tried = ", ".join(str(batch) for batch in first.batches)
    facts = [
        ("verified", f"outputs, shapes and dtypes agree{f' at batch {tried} and the example' if tried else ''}", ""),
        ("batch", f"varies in {', '.join(export.dynamic)}" if export.dynamic else "fixed", ""),
        ("outputs", ", ".join(export.outputs), ""),
        ("model", f"{size(export.weight_bytes)} of weights; torch, eager: {duration(first.seconds_before)}, error "
                  f"{first.own_error:.1e}", ""),
    ]  # fmt: skip
    title = Title(export.target, [f"exported to {export.folder}"])
    return (title, table, Section("Facts", silent=True), Facts(facts), *notes_part(export.notes))
