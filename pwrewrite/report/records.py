"""The report of a rewrite, as plain records: what was saved, what proves it, what was done and what was left.

``Report.to_dict()`` is the JSON of schema ``pwrewrite.report/1``; names in it are stable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.plan import Edit, Skip
from ..core.verification import Verification

SCHEMA = "pwrewrite.report/1"


@dataclass(frozen=True, slots=True)
class EditRow:
    """An edit with its MACs as recounted from the models before and after it.

    Attributes:
        edit: The edit.
        macs_before: MACs of the layer, all calls.
        macs_after: MACs of what replaced it, all calls.
    """

    edit: Edit
    macs_before: int
    macs_after: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        edit = self.edit
        return {
            "path": edit.path,
            "pass": edit.op.pass_name,
            "method": edit.method,
            "rank_in": edit.rank_in,
            "rank_out": edit.rank_out,
            "params_before": edit.params_before,
            "params_after": edit.params_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "relative_error": edit.relative_error,
            "exact": edit.exact,
            "kind": edit.kind,
            "graph_module": edit.graph_module,
        }


@dataclass(frozen=True)
class BudgetReport:
    """What a budget asked, what was predicted and what was measured.

    Attributes:
        limits: Kind to limit, as a person writes it.
        reached: Kind to what the result costs, as a share of the original; latency only where it was measured.
        sensitivity: In what norm errors counted.
        refit: How the result was fitted.
        samples: Calibration inputs seen.
        predicted: Predicted loss; None for a plan without statistics.
        gap: How far at most the predicted loss is from the least one, as a share of it.
        measured: Loss on held-out inputs, in the unit of the prediction; None where nothing was measured.
        agreement: How often both models name the same class there; None where they name none.
        held_out: How many inputs that was measured on.
        kind: ``classes``, a KL divergence in nats, or ``values``, half the squared relative error of the outputs.
        metrics: Name of a metric to its value before and after.
        latency: Seconds before and after, measured in one run; None where it was not asked for.
    """

    limits: Mapping[str, str]
    reached: Mapping[str, float]
    sensitivity: str
    refit: str
    samples: int
    predicted: float | None = None
    gap: float = 0.0
    measured: float | None = None
    agreement: float | None = None
    held_out: int = 0
    kind: str = "classes"
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    latency: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {
            "limits": dict(self.limits),
            "reached": dict(self.reached),
            "sensitivity": self.sensitivity,
            "refit": self.refit,
            "samples": self.samples,
            "predicted_loss": self.predicted,
            "gap": self.gap,
            "measured_loss": self.measured,
            "agreement": self.agreement,
            "held_out": self.held_out,
            "loss_kind": self.kind,
            "metrics": {name: {"before": before, "after": after} for name, (before, after) in self.metrics.items()},
            "latency": None if self.latency is None else {"before": self.latency[0], "after": self.latency[1]},
        }


@dataclass(frozen=True)
class Report:
    """What a rewrite did.

    Attributes:
        target: What was rewritten, as the user named it, or the class name.
        before: Totals before, as in an analysis: ``params``, ``macs``, ``flops``, ``weight_bytes``, ….
        after: Totals after, recounted from the rewritten model.
        edits: What was done, in order.
        skips: What was left, and why.
        verification: The proof; None where it was not asked for.
        output_changes: Outputs whose shape changed, as sentences; empty unless that was allowed.
        notes: What a reader should be told.
        budget: Where there was one: what it asked, predicted and measured.
    """

    target: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    edits: tuple[EditRow, ...]
    skips: tuple[Skip, ...]
    verification: Verification | None
    output_changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    budget: BudgetReport | None = None

    @property
    def passed(self) -> bool:
        """Whether the verification passed; False where there was none."""
        return self.verification is not None and self.verification.passed

    @property
    def delta(self) -> dict[str, float | int]:
        """After minus before for every total, and in percent of before."""
        changes: dict[str, float | int] = {}
        for name, before in self.before.items():
            change = self.after[name] - before
            changes[name] = change
            changes[f"{name}_pct"] = round(100 * change / before, 4) if before else 0.0
        return changes

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {
            "schema": SCHEMA,
            "target": self.target,
            "before": dict(self.before),
            "after": dict(self.after),
            "delta": self.delta,
            "edits": [row.to_dict() for row in self.edits],
            "skipped": [skip.to_dict() for skip in self.skips],
            "verification": self.verification.to_dict() if self.verification else None,
            "output_changes": list(self.output_changes),
            "notes": list(self.notes),
            **({"budget": self.budget.to_dict()} if self.budget else {}),
        }

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        from .rewrite import render

        return render(self)
