"""What a model may cost: limits of its own and against a baseline, which layers are to blame, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.options import GateOptions
from ..core.records import Record, Shown
from .costs import NAMES, Costs, Difference, compare
from .records import Analysis

Severity = Literal["passed", "warning", "failed"]

_KINDS = {"params": "params", "macs": "macs", "weights": "weight_bytes", "peak-memory": "peak_bytes"}
_MOST_GUILTY = 5


@dataclass(frozen=True, slots=True)
class Finding(Record):
    """One limit, and what the model costs.

    Attributes:
        kind: What is limited: one of `KINDS`, or ``unpriced``; ``name`` says it in words.
        value: What the model costs, in parameters, MACs, bytes or operations; ``baseline`` what the baseline does.
        severity: ``passed``, ``warning`` or ``failed``.
        layers: The paths that cost or grew most, each with by how much.
    """

    kind: str
    name: str
    value: int
    limit: int
    baseline: int | None
    severity: Severity
    layers: tuple[tuple[str, int], ...]


@dataclass(frozen=True, repr=False)
class GateResult(Shown, Record):
    """What a model costs against its limits, and how it differs from the baseline, where there is one."""

    target: str
    findings: tuple[Finding, ...]
    difference: Difference | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no limit is exceeded."""
        return all(finding.severity != "failed" for finding in self.findings)

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]


def judge(analysis: Analysis, gate: GateOptions, baseline: Costs | None = None) -> GateResult:
    """Holds an analysis against limits; where their baseline is from does not matter here."""
    costs = Costs.of(analysis)
    limits = {
        "params": gate.max_params,
        "macs": gate.max_macs,
        "weight_bytes": gate.max_weights,
        "peak_bytes": gate.max_peak_memory,
    }
    findings = [_finding(costs, kind, most, gate) for kind, most in limits.items() if most is not None]
    difference = None if baseline is None else compare(baseline, costs)
    notes = list(analysis.notes)
    if difference is not None:
        if difference.before.inputs != costs.inputs:
            texts = (", ".join(inputs) for inputs in (difference.before.inputs, costs.inputs))
            notes.insert(0, "the baseline was analysed with other inputs: {}, here {}".format(*texts))
        for name, share in (gate.max_increase or {"params": 0.0, "macs": 0.0}).items():
            kind = _KINDS[name]
            most = int(getattr(difference.before, kind) * (1 + share))
            findings.append(_finding(costs, kind, most, gate, difference))
    if gate.strict:
        calls = sum(n for _, n in analysis.coverage.unpriced)
        verdict: Severity = "failed" if calls else "passed"
        findings.append(
            Finding("unpriced", "operations without a formula", calls, 0, None, verdict, analysis.coverage.unpriced)
        )
    return GateResult(analysis.target, tuple(findings), difference, tuple(notes))


def _finding(costs: Costs, kind: str, most: int, gate: GateOptions, against: Difference | None = None) -> Finding:
    value = int(getattr(costs, kind))
    baseline = None if against is None else int(getattr(against.before, kind))
    room = most if baseline is None else most - baseline
    used = value if baseline is None else value - baseline
    severity: Severity = "failed" if value > most else "passed"
    if severity == "passed" and gate.warn_at is not None and room > 0 and used >= gate.warn_at * room:
        severity = "warning"
    if against is None:
        guilty = sorted(((path, layer.of(kind)) for path, layer in costs.layers.items()), key=lambda g: -g[1])
    else:
        guilty = [(layer.path, layer.growth(kind)) for layer in against.most_grown(kind)]
    layers = tuple(guilty[:_MOST_GUILTY]) if severity != "passed" else ()
    return Finding(kind, NAMES[kind], value, most, baseline, severity, layers)
