"""Plans: what to change in a model, as plain data and JSON.

A `Plan` is an ordered list of `Op` (what to do) beside the `Skip` records (what was refused, and why). An op names a
layer by its absolute path, says what replaces it and how wide, and holds no weights: ``rewrite`` fills in new ones,
``load`` saved ones. A person may edit the file; what does not make sense is refused with the line it stands in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path

from .errors import PlanError
from .files import read_text
from .json_text import JsonText, dumps, line_at, loads
from .records import Json, Record, Shown, as_data

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
    ALREADY_FUSED = "already-fused"
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
    NOT_BEHIND_LAYER = "not-behind-layer"
    SEVERAL_READERS = "several-readers"
    CALLED_TWICE = "called-twice"
    NO_KERNEL = "no-kernel"
    NO_STATISTICS = "no-statistics"
    PADDING = "padding"
    DATA_DEPENDENT = "data-dependent"
    WRITTEN = "written"
    SHARED_CHANNELS = "shared-channels"


@dataclass(frozen=True, slots=True)
class Skip(Record):
    """A layer that is not rewritten: its absolute path, why, and what was found or would change it, in a sentence."""

    path: str
    reason: SkipReason
    detail: str


@dataclass(frozen=True, slots=True)
class Estimate(Record):
    """What an op is predicted to change, from shapes alone: parameters and MACs of the layer before and after."""

    params_before: int
    params_after: int
    macs_before: int
    macs_after: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where an op was read from: a file's name and text, and the offsets of the op's start and end in it."""

    name: str
    text: str = field(repr=False)
    start: int
    end: int

    def line(self, key: str) -> str:
        """The line of a key of the op, or of the op where it has no such key."""
        at = self.text.find(f'"{key}"', self.start, self.end)
        return f"{self.name}, line {line_at(self.text, at if at >= 0 else self.start)}"


@dataclass(frozen=True, slots=True)
class Op(Record):
    """One thing to do to a model.

    Attributes:
        action: ``factorize`` (a layer becomes a chain of smaller ones), ``project`` (a 1×1 after a branch), ``narrow``
            (fewer channels between layers), ``substitute`` (a 1×1 for a module), ``share-reduction`` (a 1×1 before
            several layers), ``fold``, ``fuse``, ``merge``, ``merge-branches``, ``remove`` or ``channels-last``.
        path: Absolute path of the layer or module it is done to.
        pass_name: Name of the pass or planner that proposed it, such as ``insert-bottleneck``.
        settings: What the action needs to know, as JSON data; each action documents its own.
    """

    action: str
    path: str
    pass_name: str
    settings: Mapping[str, Json]
    estimate: Estimate | None = None
    source: Source | None = field(default=None, compare=False, repr=False)

    def where(self, key: str) -> str:
        """Where to look for one of its settings, for an error: the line of a file, or the op's path."""
        where = f"{key} of the op for {self.path or 'the root'}"
        return f"{self.source.line(key)} ({where})" if self.source else where

    def to_dict(self) -> dict[str, Json]:
        """The same as plain JSON data."""
        data = {"action": self.action, "path": self.path, "pass": self.pass_name, "settings": dict(self.settings)}
        return data | ({"estimate": self.estimate.to_dict()} if self.estimate else {})


@dataclass(frozen=True, slots=True)
class Edit:
    """An op carried out.

    Attributes:
        kind: ``module`` (a module took another's place) or ``graph`` (the code of ``graph_module`` was rewritten).
        method: The form, such as ``bottleneck``.
        rank_in: First width between, per group; ``rank_out`` is the last one, the same where there is only one.
        relative_error: ``‖W − Ŵ‖ / ‖W‖`` of the weights; None for fresh ones.
        exact: ``eval``, ``train`` or ``both`` for an edit that changes no output in that mode; else None.
        renamed: Old parameter name to the names that came in its place.
        aliases: Other paths at which the same was replaced.
        adapted: Paths of other layers that changed their shape with it.
    """

    op: Op
    kind: str
    method: str
    rank_in: int | None = None
    rank_out: int | None = None
    params_before: int = 0
    params_after: int = 0
    relative_error: float | None = None
    exact: str | None = None
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    graph_module: str | None = None

    @property
    def path(self) -> str:
        """Path of the layer."""
        return self.op.path


@dataclass(frozen=True, repr=False)
class Plan(Shown, Record):
    """What to do to a model, in order, and what was refused, and why.

    Attributes:
        model: What the plan was made for: ``class`` and, where known, ``target``; ``params`` before.
        budget: For a plan that was made under one: ``limits``, ``predicted_loss``, and how it was predicted.
    """

    ops: tuple[Op, ...] = ()
    skips: tuple[Skip, ...] = ()
    model: Mapping[str, Json] = field(default_factory=dict)
    budget: Mapping[str, Json] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ops)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def __add__(self, other: Plan) -> Plan:
        """One plan after the other, without skips of what either carries out or another reason explains better."""
        done = {op.path for op in (*self.ops, *other.ops)}
        skips = dict.fromkeys(s for s in (*self.skips, *other.skips) if s.path not in done)
        explained = {s.path for s in skips if s.reason is not SkipReason.EXCLUDED}
        kept = tuple(s for s in skips if s.reason is not SkipReason.EXCLUDED or s.path not in explained)
        return Plan(self.ops + other.ops, kept, self.model or other.model, self.budget or other.budget)

    def to_dict(self) -> dict[str, Json]:
        """The same as plain JSON data."""
        facts = {"model": dict(self.model)} | ({"budget": dict(self.budget)} if self.budget else {})
        return {"schema": SCHEMA, **facts, "ops": as_data(self.ops), "skipped": as_data(self.skips)}

    def to_json(self, *, indent: int | None = 2) -> str:
        """JSON text, made to be edited."""
        return dumps(self.to_dict()) if indent == 2 else super().to_json(indent=indent)

    @classmethod
    def from_json(cls, text: str, name: str = "plan") -> Plan:
        """Reads what `to_json` wrote, called ``name`` in errors; a `PlanError` says in which line it makes no sense."""
        return _Reader(text, name).plan(loads(text, name))

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Plan:
        """Reads what `to_dict` gave; a `PlanError` says where it makes no sense."""
        try:
            text = dumps(dict(data))
        except (TypeError, ValueError) as error:
            raise PlanError(f"the plan is no JSON data: {error}") from None
        return cls.from_json(text)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Reads a plan from a file; raises `PlanError` where that cannot be read or is none."""
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PlanError(f"cannot read the plan: {reason}", where=str(path)) from None
        return cls.from_json(text, str(path))


_KINDS: dict[type, str] = {str: "a string", dict: "an object", list: "a list"}


class _Reader(JsonText):
    """Turns JSON data into a plan and knows which line a complaint is about."""

    def check(self, value: Json, kind: type, message: str, at: int, expected: str = "") -> None:
        """Refuses data of another type."""
        if not isinstance(value, kind):
            raise self.error(message, at, expected or _KINDS[kind], value)

    def plan(self, data: Json) -> Plan:
        self.check(data, dict, "a plan is a JSON object", 0, "an object with schema, ops and skipped")
        schema = data.get("schema")
        if schema != SCHEMA:
            raise self.error("not a plan of this version", self.find('"schema"'), f'"schema": "{SCHEMA}"', schema)
        data = {"ops": None, "skipped": [], "model": {}, "budget": {}, **data}
        for key in ("ops", "skipped", "model", "budget"):
            kind = list if key in ("ops", "skipped") else dict
            self.check(data[key], kind, f"{key} is {_KINDS[kind]}", self.find(f'"{key}"'))
        kinds: dict[str, type] = {"class": str, "target": str, "args": dict, "inputs": list}
        for key in [key for key in kinds if key in data["model"]]:
            expected = "a list of objects with shape and dtype" if key == "inputs" else _KINDS[kinds[key]]
            self.check(data["model"][key], kinds[key], f"model.{key} is {expected}", self.find(f'"{key}"'), expected)
        for item in data["model"].get("inputs", []):
            shape = item.get("shape") if isinstance(item, dict) else None
            texts = isinstance(shape, list) and all(isinstance(item.get(k, ""), str) for k in ("dtype", "name"))
            if not texts or "dtype" not in item or any(type(size) is not int or size < 0 for size in shape or ()):
                expected = 'such as {"shape": [1, 3, 224, 224], "dtype": "float32"}'
                raise self.error("the plan's inputs are not shapes", self.find('"inputs"'), expected, item)
        return Plan(
            tuple(self.op(op, *span) for op, span in zip(data["ops"], self.entries("ops"), strict=True)),
            tuple(self.skip(skip, *span) for skip, span in zip(data["skipped"], self.entries("skipped"), strict=True)),
            data["model"],
            data["budget"],
        )

    def op(self, data: Json, start: int, end: int) -> Op:
        self.check(data, dict, "an op is a JSON object", start)
        for key, kind in (("action", str), ("path", str), ("pass", str), ("settings", dict)):
            self.check(data.get(key), kind, f"an op needs {key!r}", self.find(f'"{key}"', start, end))
        for key in sorted(set(data) - {"action", "path", "pass", "settings", "estimate"}):
            at = self.find(f'"{key}"', start, end)
            raise self.error(f"an op has no {key!r}", at, "action, path, pass, settings or estimate", key)
        numbers, names = data.get("estimate"), [f.name for f in fields(Estimate)]
        whole = isinstance(numbers, dict) and all(type(n) is int for n in numbers.values())
        if numbers is not None and (not whole or {*numbers} != {*names}):
            at = self.find('"estimate"', start, end)
            raise self.error("not an estimate", at, f"integers {', '.join(names)}", numbers)
        estimate = None if numbers is None else Estimate(**numbers)
        source = Source(self.name, self.text, start, end)
        return Op(data["action"], data["path"], data["pass"], data["settings"], estimate, source)

    def skip(self, data: Json, start: int, end: int) -> Skip:
        if not isinstance(data, dict) or not all(isinstance(data.get(k), str) for k in ("path", "reason", "detail")):
            raise self.error("a skip needs a path, a reason and a detail", start, "strings path, reason, detail", data)
        try:
            reason = SkipReason(data["reason"])
        except ValueError:
            at = self.find('"reason"', start, end)
            raise self.error("unknown reason", at, f"one of {', '.join(SkipReason)}", data["reason"]) from None
        return Skip(data["path"], reason, data["detail"])
