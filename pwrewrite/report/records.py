"""The report of a rewrite, as plain records: what was saved, what proves it, what was done and what was left.

``Report.to_dict()`` is the JSON of schema ``pwrewrite.report/1``; names in it are stable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..plan import Edit, Skip
from ..verification import Verification

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
    """

    target: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    edits: tuple[EditRow, ...]
    skips: tuple[Skip, ...]
    verification: Verification | None
    output_changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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
        }

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        from .rewrite import render

        return render(self)
