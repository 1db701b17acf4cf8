"""The report of a rewrite, as plain records: what was saved, what proves it, what was done and what was left.

``Report.to_dict()`` is the JSON of schema ``pwrewrite.report/1``; names in it are stable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..analysis.records import Analysis
from ..core.exports import Exported
from ..core.plan import Edit, Skip
from ..core.records import Record, Shown, as_data, key, named
from ..core.recovery import Recovery
from ..core.verification import Verification

SCHEMA = "pwrewrite.report/1"
COMPRESS_SCHEMA = "pwrewrite.compress/1"


@dataclass(frozen=True, slots=True)
class EditRow(Record):
    """An edit with the MACs of the layer, all calls, as recounted from the models before and after it."""

    edit: Edit
    macs_before: int
    macs_after: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        data = {"path": self.edit.path, "pass": self.edit.op.pass_name}
        data |= named(self.edit, "method rank_in rank_out params_before params_after")
        return data | named(self, "macs_before macs_after") | named(self.edit, "relative_error exact kind graph_module")


@dataclass(frozen=True)
class BudgetReport(Record):
    """What a budget asked, what was predicted and what was measured.

    Attributes:
        limits: Kind to limit, as a person writes it.
        reached: Kind to what the result costs, as a share of the original; latency only where it was measured.
        sensitivity: In what norm errors counted.
        samples: Calibration inputs seen.
        predicted: Predicted loss; None for a plan without statistics.
        gap: How far at most the predicted loss is from the least one, as a share of it.
        measured: Loss on held-out inputs, in the unit of the prediction; None where nothing was measured.
        agreement: How often both models name the same class there; None where they name none.
        held_out: How many inputs that was measured on.
        kind: ``classes``, a KL divergence in nats, or ``values``, half the squared relative error of the outputs.
        metrics: Name of a metric to its value before and after.
        latency: Seconds before and after, measured in one run; None where it was not asked for.
        outputs: What the model's outputs were taken for: ``logits``, ``probabilities`` or ``values``.
        spread: Half the distance between the quartiles of these times, as a share.
        engine: What they ran on, where an engine was asked for; ``engines`` has the times in each other one.
    """

    limits: Mapping[str, str]
    reached: Mapping[str, float]
    sensitivity: str
    refit: str
    samples: int
    predicted: float | None = field(default=None, metadata=key("predicted_loss"))
    gap: float = 0.0
    measured: float | None = field(default=None, metadata=key("measured_loss"))
    agreement: float | None = None
    held_out: int = 0
    kind: str = field(default="classes", metadata=key("loss_kind"))
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    latency: tuple[float, float] | None = None
    outputs: str = ""
    spread: float = 0.0
    threads: int | None = None
    engine: str = ""
    engines: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    recovery: Recovery | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        pairs = {name: dict(zip(("before", "after"), pair, strict=True)) for name, pair in self.metrics.items()}
        latency = None if self.latency is None else dict(zip(("before", "after"), self.latency, strict=True))
        return {**super().to_dict(), "metrics": pairs, "latency": latency}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BudgetReport:
        """The record that `to_dict` gave as data."""
        values = {f.name: data[f.metadata.get("key", f.name)] for f in fields(cls)}
        values["metrics"] = {name: tuple(pair.values()) for name, pair in values["metrics"].items()}
        values["engines"] = {name: tuple(pair) for name, pair in values["engines"].items()}
        values["latency"] = values["latency"] and tuple(values["latency"].values())
        values["recovery"] = values["recovery"] and Recovery.from_dict(values["recovery"])
        return cls(**values)


@dataclass(frozen=True)
class FusingReport(Record):
    """What fusing saves beside parameters and MACs.

    Attributes:
        before: Before: ``nodes``, ``kernels`` and ``bytes_moved``; ``after`` the same.
        seconds_before: Median seconds of one run before; None where not measured.
        seconds_frozen: The same of the fused model under `pwrewrite.freeze`; None where it cannot be frozen.
        not_frozen: Why it cannot be frozen, where that was tried.
        engine: What they ran on, where an engine was asked for; ``engines`` has the times in each other one.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    seconds_before: float | None = None
    seconds_after: float | None = None
    seconds_frozen: float | None = None
    not_frozen: str = ""
    engine: str = ""
    engines: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Point:
    """One budget: what the model then costs, by kind, the least predicted loss, and how many layers are rewritten."""

    costs: Mapping[str, float]
    loss: float
    layers: int

    def to_dict(self) -> dict[str, float]:
        """The same as plain JSON data."""
        return {**self.costs, "loss": self.loss, "layers": self.layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, float]) -> Point:
        """The record that `to_dict` gave as data."""
        costs = {kind: value for kind, value in data.items() if kind not in ("loss", "layers")}
        return cls(costs, data["loss"], int(data["layers"]))


@dataclass(frozen=True, repr=False)
class Frontier(Shown, Record):
    """The least loss at every budget, from the original down.

    Attributes:
        kind: What the budgets limit.
        original: What the model costs now, by kind.
        sensitivity: In what norm errors count.
        random: Whether the weights are those that the model's code makes.
        chosen: The plan that was made, where one was.
    """

    target: str
    kind: str
    original: Mapping[str, float]
    sensitivity: str
    points: tuple[Point, ...]
    random: bool = False
    chosen: Point | None = None

    def share(self, point: Point, kind: str) -> float:
        """A cost as a share of the original's."""
        return point.costs[kind] / self.original[kind] if self.original[kind] else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        chosen = {} if self.chosen is None else {"chosen": self.chosen.to_dict()}
        points = [point.to_dict() for point in self.points]
        return {**named(self, "target kind sensitivity original"), "points": points, **chosen}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Frontier:
        """The record that `to_dict` gave as data."""
        chosen = Point.from_dict(data["chosen"]) if "chosen" in data else None
        return cls(**{**data, "points": tuple(map(Point.from_dict, data["points"])), "chosen": chosen})


@dataclass(frozen=True, repr=False)
class Report(Shown, Record):
    """What a rewrite did, in order, and what it left.

    Attributes:
        target: What was rewritten, as the user named it, or the class name.
        before: Totals before, as in an analysis: ``params``, ``macs``, ``flops``, ``weight_bytes``, ….
        after: Totals after, recounted from the rewritten model.
        verification: The proof; None where it was not asked for.
        output_changes: Outputs whose shape changed, as sentences; empty unless that was allowed.
        models: The analyses of both models, for pictures; not part of the JSON.
        frontier: Where a plan was chosen within a budget: the least losses at other budgets, for pictures, or what
            works them out; part of the JSON once they are (`with_frontier`).
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
    fusing: FusingReport | None = None
    models: tuple[Analysis, Analysis] | None = None
    frontier: Frontier | Callable[[], Frontier] | None = field(default=None, compare=False)

    def with_frontier(self) -> Report:
        """The same with its frontier worked out, where it has one."""
        return replace(self, frontier=self.frontier()) if callable(self.frontier) else self

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
            **named(self, "target before after delta edits"),
            "skipped": as_data(self.skips),
            **named(self, "verification output_changes notes"),
            **({"budget": self.budget.to_dict()} if self.budget else {}),
            **({"fusing": self._fusing(self.fusing)} if self.fusing else {}),
            **({"frontier": self.frontier.to_dict()} if isinstance(self.frontier, Frontier) else {}),
        }

    def _fusing(self, fusing: FusingReport) -> dict[str, Any]:
        done = Counter(row.edit.method for row in self.edits)
        left = Counter(str(skip.reason) for skip in self.skips)
        return {**fusing.to_dict(), "done": dict(done), "left": dict(left)}


@dataclass(frozen=True, repr=False)
class Compression(Shown, Record):
    """What became of a model that was compressed.

    Attributes:
        target: What was compressed, as the user named it, or the class name.
        engine: What timed it; ``engines`` has the seconds before and after in each other one.
        before: Totals of the original, as in a `Report`.
        seconds: Median seconds of one run, ``before`` and ``after``.
        proofs: The verification, as data, of the rewriting and of the fusing.
        stages: Seconds of each stage; None where it was not done again.
        files: The files in the folder, with their bytes.
        models: The analyses of the original and of the result, for pictures; ``done`` says by path what became of its
            layers, ``frontier`` has the least losses at other budgets. None of them is part of the JSON.
    """

    target: str
    engine: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    seconds: Mapping[str, float]
    budget: BudgetReport
    proofs: Mapping[str, Mapping[str, Any]]
    exports: tuple[Exported, ...]
    stages: Mapping[str, float | None]
    engines: Mapping[str, tuple[float, float]]
    notes: tuple[str, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)
    schema: str = field(default=COMPRESS_SCHEMA)
    models: tuple[Analysis, Analysis] | None = None
    done: Mapping[str, str] = field(default_factory=dict)
    frontier: Frontier | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        if self.models is not None:
            return replace(self, models=None).to_dict()
        return {n: value for n, value in super().to_dict().items() if n not in ("models", "done", "frontier")}
