"""Plans: what to change in a model, as plain data and JSON.

Passes and planners *propose*; a plan records what they proposed; `pwrewrite.apply` alone carries it out.

A `Plan` is an ordered list of `Op` (what to do) beside the `Skip` records (what was refused, and why). An op names a layer by
its absolute path, says what replaces it and how wide, and holds no weights: a dry run prints the plan, ``rewrite`` applies
it and fills in weights, ``load`` applies it and fills in saved ones. The file is JSON that a person may edit; what does not
make sense is refused with the line it stands in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from .errors import PlanError

SCHEMA = "pwrewrite.plan/1"


class SkipReason(StrEnum):
    """Why a convolution is left as it is."""

    OVERRIDDEN_FORWARD = "overridden-forward"
    PARAMETRIZED = "parametrized"
    HOOKS = "hooks"
    SHARED_WEIGHT = "shared-weight"
    WEIGHT_READ = "weight-read"
    LAZY = "lazy"
    QUANTIZED = "quantized"
    COMPLEX = "complex"
    ALREADY_BOTTLENECK = "already-bottleneck"
    POINTWISE = "pointwise"
    DEPTHWISE = "depthwise"
    TOO_SMALL = "too-small"
    NO_GAIN = "no-gain"
    BELOW_SHARE = "below-share"
    EXCLUDED = "excluded"
    NOT_CALLED = "not-called"
    FUNCTIONAL = "functional"
    HELD_ELSEWHERE = "held-elsewhere"
    NOT_TRACED = "not-traced"
    NOT_LINEAR = "not-linear"
    WRONG_FORM = "wrong-form"
    BROKE_MODEL = "broke-model"


@dataclass(frozen=True, slots=True)
class Skip:
    """A layer that is not rewritten.

    Attributes:
        path: The layer's absolute path.
        reason: Why, as one of `SkipReason`.
        detail: A sentence that helps: what was found, and what would change it.
    """

    path: str
    reason: SkipReason
    detail: str

    def to_dict(self) -> dict[str, str]:
        """The same as plain JSON data."""
        return {"path": self.path, "reason": str(self.reason), "detail": self.detail}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an op is predicted to change, from shapes alone: parameters and MACs of the layer before and after."""

    params_before: int
    params_after: int
    macs_before: int
    macs_after: int

    def to_dict(self) -> dict[str, int]:
        """The same as plain JSON data."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class Op:
    """One thing to do to a model.

    Attributes:
        action: What is done: ``factorize`` (a layer becomes a chain of smaller ones) or ``project`` (a 1×1 after a branch).
        path: Absolute path of the layer or module it is done to.
        pass_name: Name of the pass or planner that proposed it, such as ``insert-bottleneck``.
        settings: What the action needs to know, as JSON data; each action documents its own.
        estimate: Predicted change; None where not worked out yet.
    """

    action: str
    path: str
    pass_name: str
    settings: Mapping[str, Any]
    estimate: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        data = {"action": self.action, "path": self.path, "pass": self.pass_name, "settings": dict(self.settings)}
        return data | ({"estimate": self.estimate.to_dict()} if self.estimate else {})


@dataclass(frozen=True, slots=True)
class Edit:
    """An op carried out.

    Attributes:
        op: The op.
        kind: ``module`` (a module took another's place) or ``graph`` (the code of ``graph_module`` was rewritten).
        method: The form, such as ``bottleneck`` or ``spatial``.
        rank_in: First width between, per group.
        rank_out: Last width between, per group; equal to ``rank_in`` where there is only one.
        params_before: Parameters of the layer before.
        params_after: Parameters of what replaced it.
        relative_error: ``‖W − Ŵ‖ / ‖W‖`` of the weights; None for fresh ones.
        exact: ``eval``, ``train`` or ``both`` for an edit that changes no output in that mode; None for an approximate one.
        renamed: Old parameter name to the names that came in its place.
        aliases: Other paths at which the same was replaced.
        graph_module: Path of the submodule whose code became a graph; ``None`` for a plain swap.
    """

    op: Op
    kind: str
    method: str
    rank_in: int | None
    rank_out: int | None
    params_before: int
    params_after: int
    relative_error: float | None
    exact: str | None = None
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    graph_module: str | None = None

    @property
    def path(self) -> str:
        """Path of the layer."""
        return self.op.path


@dataclass(frozen=True)
class Plan:
    """What to do to a model, in order.

    Attributes:
        ops: What to do.
        skips: What was refused, and why.
        model: What the plan was made for: ``class`` and, where known, ``target``; ``params`` before.
    """

    ops: tuple[Op, ...] = ()
    skips: tuple[Skip, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ops)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def __add__(self, other: Plan) -> Plan:
        """One plan after the other; skips of the first that the second carried out are dropped."""
        done = {op.path for op in (*self.ops, *other.ops)}
        skips = tuple(s for s in (*self.skips, *other.skips) if s.path not in done)
        return replace(self, ops=self.ops + other.ops, skips=tuple(dict.fromkeys(skips)))

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {
            "schema": SCHEMA,
            "model": dict(self.model),
            "ops": [op.to_dict() for op in self.ops],
            "skipped": [skip.to_dict() for skip in self.skips],
        }

    def to_json(self) -> str:
        """JSON text, one value a line, made to be edited."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "plan") -> Plan:
        """Reads a plan.

        Args:
            text: JSON as `to_json` writes it.
            name: What to call it in an error, such as the file's name.

        Raises:
            PlanError: If it is not JSON or not a plan; says in which line.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(
                f"{name} is not JSON: {error.msg}",
                where=f"{name}, line {error.lineno}, column {error.colno}",
                hint="a comma after the last entry or a missing quote is the usual cause",
            ) from None
        return _Reader(text, name).plan(data)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Reads a plan from a file.

        Raises:
            PlanError: If the file cannot be read or is not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan: {error}", where=str(path)) from None
        return cls.from_json(text, str(path))


class _Reader:
    """Turns JSON data into a plan and knows which line a complaint is about."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name

    def plan(self, data: Any) -> Plan:
        if not isinstance(data, dict):
            raise self.error("a plan is a JSON object", 0, "an object with schema, ops and skipped", data)
        schema = data.get("schema")
        if schema != SCHEMA:
            raise self.error("not a plan of this version", self.find('"schema"'), f'"schema": "{SCHEMA}"', schema)
        ops, skipped = data.get("ops"), data.get("skipped", [])
        if not isinstance(ops, list) or not isinstance(skipped, list):
            raise self.error("ops and skipped are lists", self.find('"ops"'), "a list", ops)
        starts = self.starts()
        return Plan(
            tuple(self.op(op, starts[i] if i < len(starts) else 0) for i, op in enumerate(ops)),
            tuple(self.skip(skip) for skip in skipped),
            data.get("model") or {},
        )

    def op(self, data: Any, start: int) -> Op:
        if not isinstance(data, dict):
            raise self.error("an op is a JSON object", start, "an object", data)
        for key, kind in (("action", str), ("path", str), ("pass", str), ("settings", dict)):
            if not isinstance(data.get(key), kind):
                at = self.find(f'"{key}"', start)
                raise self.error(f"an op needs {key!r}", at, kind.__name__, data.get(key))
        unknown = set(data) - {"action", "path", "pass", "settings", "estimate"}
        if unknown:
            key = sorted(unknown)[0]
            raise self.error(f"an op has no {key!r}", self.find(f'"{key}"', start), "action, path, pass, settings", key)
        estimate = data.get("estimate")
        try:
            worked_out = Estimate(**estimate) if estimate else None
        except TypeError:
            at = self.find('"estimate"', start)
            raise self.error("not an estimate", at, "params_before … macs_after", estimate) from None
        return Op(data["action"], data["path"], data["pass"], data["settings"], worked_out)

    def skip(self, data: Any) -> Skip:
        try:
            return Skip(str(data["path"]), SkipReason(data["reason"]), str(data["detail"]))
        except (TypeError, KeyError, ValueError):
            at = self.find('"skipped"')
            raise self.error(
                "a skip needs a path, a known reason and a detail", at, "path, reason, detail", data
            ) from None

    def starts(self) -> list[int]:
        """Offsets of the ops in the text."""
        at = self.text.find("[", self.find('"ops"'))
        decoder, starts = json.JSONDecoder(), []
        while at >= 0 and at + 1 < len(self.text):
            at += 1
            while at < len(self.text) and self.text[at] in " \t\r\n,":
                at += 1
            if at >= len(self.text) or self.text[at] == "]":
                break
            starts.append(at)
            _, at = decoder.raw_decode(self.text, at)
            at -= 1
        return starts

    def find(self, what: str, start: int = 0) -> int:
        return max(self.text.find(what, start), start)

    def error(self, message: str, at: int, expected: str, got: Any) -> PlanError:
        line = self.text.count("\n", 0, at) + 1
        return PlanError(message, where=f"{self.name}, line {line}", expected=expected, got=repr(got)[:120])
