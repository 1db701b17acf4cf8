"""What training a rewritten model to its original came to, as a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .records import Record, Shown


@dataclass(frozen=True, repr=False)
class Recovery(Record, Shown):
    """How a rewritten model was trained, with its original as the teacher.

    Attributes:
        time: What was asked for: ``5m``, ``3epochs``.
        before: Held-out loss before, in the unit of ``measured_loss``; ``after`` that of what was kept.
        kept: Steps after which the kept state was reached; 0 where that is the state before.
        epochs: Passes through the inputs that the steps are.
        seconds: Wall time, that of an interrupted run's earlier parts included.
        batch: Inputs in a step, at most.
        rate: Largest learning rate.
        blocks: How many blocks' outputs were compared in the first steps.
        norms: Batch norms: ``frozen``, ``folded`` or ``none``.
        precision: What the steps were computed in.
    """

    time: str
    before: float
    after: float
    kept: int
    steps: int
    epochs: float
    seconds: float
    samples: int
    batch: int
    rate: float
    blocks: int
    norms: str
    augment: str
    labelled: bool
    precision: str
    processes: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recovery:
        """The record that `to_dict` gave as data."""
        return cls(**{each.name: data[each.name] for each in fields(cls)})
