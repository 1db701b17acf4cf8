"""A model on its way through passes and plans, step by step: `Run`, and what it has come to, a `State`.

Each step carries out ops on the model as the steps before left it, captures the result, and keeps the books: what was
done, what it cost before and after, what was predicted, which parameters went where, which layers were left and why.
A state never changes: a step makes the next one, which a run takes or drops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn

from ..analysis import analyze_capture
from ..analysis.records import Analysis
from ..capturing import Inputs, capture
from ..capturing.records import Capture, info
from ..core.cost import Cost
from ..core.errors import UsageError
from ..core.numbers import dims
from ..core.plan import Edit, Estimate, Op, Plan, Skip, SkipReason
from ..core.verification import Verification
from ..edit.actions import Decomposer
from ..edit.apply import carry_out
from ..edit.survival import probe_for
from ..edit.swap import copy_of
from ..forms import FORMS
from ..layers.factorized import build
from ..passes import Pass
from ..passes.base import estimate_chain, spec_of
from ..report.records import EditRow, Report
from ..targets import describe_inputs

Progress = Callable[[str, float | None], None]
"""Called with what is being done, and with the part of it that is done (0 to 1) where that is known."""

_MILD = frozenset(
    {SkipReason.POINTWISE, SkipReason.DEPTHWISE, SkipReason.WRONG_FORM, SkipReason.EXCLUDED, SkipReason.BELOW_SHARE}
)
"""Reasons that say that a layer is none of a pass's business; another pass's reason tells more."""


def silent(what: str, share: float | None) -> None:
    """Says nothing."""


def propose(captured: Capture, passes: Sequence[Pass]) -> Plan:
    """A plan from what several passes, in order, propose on one capture; the first to propose for a layer has it."""
    plan = Plan(model=model_facts(captured))
    taken: set[str] = set()
    for each in passes:
        proposals: object = each.propose(captured)
        if not isinstance(proposals, (list, tuple)) or not all(isinstance(p, (Op, Skip)) for p in proposals):
            what = f"the pass {each.name} proposes something else than ops and skips"
            raise UsageError(what, expected="a list of Op and Skip", got=repr(proposals)[:60])
        ops = tuple(p for p in proposals if isinstance(p, Op) and p.path not in taken)
        taken |= {op.path for op in ops}
        plan = plan + Plan(ops, tuple(p for p in proposals if isinstance(p, Skip)))
    return plan


@dataclass(frozen=True)
class State:
    """A model after some steps, and what they did.

    Attributes:
        model: The model as it is now.
        captured: Its capture.
        plan: What was carried out, and what was skipped.
        rows: The edits, with what each layer cost before and after.
        estimates: What each op was predicted to cost; None where that cannot be known.
        names: Old parameter names to new ones.
    """

    model: nn.Module
    captured: Capture
    plan: Plan = field(default_factory=Plan)
    rows: tuple[EditRow, ...] = ()
    estimates: tuple[Estimate | None, ...] = ()
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def skipping(self, plan: Plan, reason: SkipReason, detail: str) -> State:
        """The same, with a plan's ops as skips for one reason."""
        skips = tuple(Skip(op.path, reason, detail) for op in plan.ops)
        return replace(self, plan=self.plan + Plan(skips=skips))


class Run:
    """A model on its way: what it was, and what it has come to.

    Args:
        model: The model; stays as it is.
        inputs: Example inputs.
        say: Called at each step.
        fill: Whether new layers get their weights from the old ones; without it only shapes are right.

    Attributes:
        first: The capture of the model as it was.
        state: What the steps so far made of it; may be set to an earlier one, or one that was tried.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, say: Progress, *, fill: bool = True) -> None:
        self.inputs, self.say, self.fill = inputs, say, fill
        say("capturing", None)
        self.first = capture(model, inputs)
        self.state = State(model, self.first)

    def result(self) -> nn.Module:
        """The model as it is now; a copy where nothing was done, since the input model is never shared."""
        return copy_of(self.state.model) if self.state.model is self.first.model else self.state.model

    def all(self, what: Sequence[Pass] | Plan, decomposer: Decomposer | None = None) -> None:
        """Carries out passes, or a plan, whose weights a decomposer may give."""
        if isinstance(what, Plan):
            self.state = replace(self.state, plan=replace(self.state.plan, skips=what.skips, budget=what.budget))
            for part in self._parts(what if self._made_for(what) else _without_estimates(what)):
                self.state = self.tried(part, decomposer=decomposer)
            return
        for i, each in enumerate(what):
            self.say(f"{each.name}: proposing", None)
            read_later = any(_reads_weights(later) for later in what[i + 1 :])
            self.step(propose(self.state.captured, [each]), fill=self.fill or read_later)

    def _made_for(self, plan: Plan) -> bool:
        """Whether a plan was made for inputs of these shapes, as far as it says."""
        made, own = plan.model.get("inputs"), describe_inputs(self.inputs)
        if not made:
            return bool(plan.budget)  # just made, under a budget
        return [each.get("shape") for each in made] == [each["shape"] for each in own]

    def _parts(self, plan: Plan) -> list[Plan]:
        """A plan in steps: an op on what an earlier one puts in, or narrows, waits for it; each step has a capture."""
        parts: list[list[Op]] = [[]]
        for op in plan.ops:
            built_on = any(
                op.path == done.path or op.path.startswith(f"{done.path}.") for done in parts[-1] if done.path
            )
            if built_on or (op.action != "narrow" and any(op.path in _narrows(done) for done in parts[-1])):
                parts.append([])
            parts[-1].append(op)
        return [Plan(tuple(ops)) for ops in parts]

    def step(self, plan: Plan, *, fill: bool | None = None) -> None:
        """Carries out one plan on the model as it is now."""
        self.state = self.tried(plan, fill=fill)

    def tried(self, plan: Plan, *, fill: bool | None = None, decomposer: Decomposer | None = None) -> State:
        """What carrying out one plan on the model as it is now would come to; the run stays where it is."""
        state = self.state
        if not plan.ops:
            return replace(state, plan=state.plan + plan)
        names = [op.path for op in plan.ops]
        applied = carry_out(
            state.model,
            plan,
            fill=self.fill if fill is None else fill,
            decomposer=decomposer,
            probe=probe_for(plan, state.captured, self.inputs),
            progress=lambda path: self.say(f"rewriting {path}", names.index(path) / len(names)),
        )
        done = {edit.path for edit in applied.edits}
        whole = state.plan + Plan(tuple(op for op in plan.ops if op.path in done), (*plan.skips, *applied.skips))
        if not applied.edits:
            return replace(state, plan=whole)
        after = capture(applied.model, self.inputs)
        macs_before, macs_after = _macs_by_path(state.captured), _macs_by_path(after)
        rows, estimates, renamed = list(state.rows), list(state.estimates), state.names
        for edit in applied.edits:
            old = _under(macs_before, (edit.path, *edit.aliases, *edit.adapted))
            rows.append(EditRow(edit, old, _under(macs_after, _places(edit))))
            estimates.append(_estimate(edit.op, state.captured) or edit.op.estimate)
            renamed = join_names(renamed, edit.renamed)
        return State(applied.model, after, whole, tuple(rows), tuple(estimates), renamed)

    def fitted(self, errors: Mapping[str, float | None]) -> None:
        """Takes note of the relative errors of weights that were fitted later, by path; None where trained."""
        rows = tuple(
            replace(row, edit=replace(row.edit, relative_error=errors[row.edit.path], exact=None))
            if row.edit.path in errors
            else row
            for row in self.state.rows
        )
        self.state = replace(self.state, rows=rows)

    def analyses(self, target: str | None) -> tuple[Analysis, Analysis]:
        """The model before and after."""
        before = analyze_capture(self.first, target=target or "")
        return before, analyze_capture(self.state.captured, target=target or "") if self.state.rows else before

    def expected(self, before: Analysis) -> Cost | None:
        """What was predicted; None where an op has no estimate."""
        estimates = [e for e in self.state.estimates if e is not None]
        if len(estimates) < len(self.state.estimates):
            return None
        return Cost(
            params=before.params + sum(e.params_after - e.params_before for e in estimates),
            macs=before.macs + sum(e.macs_after - e.macs_before for e in estimates),
        )

    def finished(self, target: str | None) -> Plan:
        """The whole plan, with facts about the model."""
        facts = model_facts(self.first, inputs=describe_inputs(self.inputs))
        return replace(self.state.plan, skips=self.skips(), model=facts | ({"target": target} if target else {}))

    def skips(self) -> tuple[Skip, ...]:
        """One skip a layer, the one that tells most; none for what this run itself put in."""
        inside = tuple(f"{row.edit.path}." if row.edit.path else "" for row in self.state.rows)
        skips: dict[str, Skip] = {}
        for skip in self.state.plan.skips:
            ours = bool(inside) and skip.path.startswith(inside)
            if ours and (skip.reason in _MILD or skip.reason is SkipReason.ALREADY_BOTTLENECK):
                continue
            old = skips.get(skip.path)
            if old is None or skip.reason is old.reason or (old.reason in _MILD and skip.reason not in _MILD):
                skips[skip.path] = skip
        return tuple(skips.values())

    def report(self, before: Analysis, after: Analysis, target: str | None, proof: Verification | None) -> Report:
        """The report."""
        return Report(
            target or type(self.first.model).__name__,
            totals(before),
            totals(after),
            self.state.rows,
            self.skips(),
            proof,
            _output_changes(self.first, self.state.captured),
            tuple(dict.fromkeys((*self.first.notes, *self.state.captured.notes, *_narrowed(self.state.rows)))),
            models=(before, after),
        )


def _without_estimates(plan: Plan) -> Plan:
    """A plan whose ops on more than one layer do not say what they cost: that depends on the inputs."""
    ops = (op if op.action == "factorize" else replace(op, estimate=None) for op in plan.ops)
    return replace(plan, ops=tuple(ops))


def _narrows(op: Op) -> set[str]:
    """Paths of the layers whose channels an op takes."""
    keys = ("producers", "depthwise", "readers") if op.action == "narrow" else ()
    return {each["path"] for key in keys for each in op.settings.get(key, ())}


def _reads_weights(each: Pass) -> bool:
    return getattr(each, "energy", None) is not None or bool(getattr(each, "vbmf", False))


def _estimate(op: Op, captured: Capture) -> Estimate | None:
    """An op's effect from the capture that it is carried out on; None where it is not about a single layer."""
    if op.action != "factorize":
        return None
    layer = next((layer for layer in captured.layers if op.path in (layer.path, *layer.aliases)), None)
    if layer is None or not layer.called:
        return None
    spec, settings = spec_of(layer), op.settings
    axes, norm, activation = (settings.get(name) for name in ("axes", "norm", "activation"))
    estimate = estimate_chain(layer, spec, FORMS[settings["form"]], settings["widths"], axes)
    if norm or activation:  # which may have parameters of their own
        module = build(
            spec, settings["form"], settings["widths"], axes=axes, norm=norm, activation=activation, device="meta"
        )
        estimate = replace(estimate, params_after=sum(p.numel() for p in module.parameters()))
    return estimate


def _macs_by_path(captured: Capture) -> dict[str, int]:
    sums: dict[str, int] = {}
    for node in captured.graph.nodes:
        facts = info(node)
        if facts.cost.macs:
            sums[facts.path] = sums.get(facts.path, 0) + facts.cost.macs
    for layer in captured.layers:
        if layer.functional:
            sums[layer.path] = layer.macs
    return sums


def _under(sums: dict[str, int], places: Sequence[str]) -> int:
    return sum(
        macs for path, macs in sums.items() if any(path == p or path.startswith(f"{p}." if p else "") for p in places)
    )


def _places(edit: Edit) -> tuple[str, ...]:
    """Where the MACs of what an edit put in are found: its module, under its names."""
    if edit.kind == "graph" and edit.op.action == "factorize":
        return tuple({name.rsplit(".", 2)[0] for names in edit.renamed.values() for name in names})
    return (edit.path, *edit.aliases, *edit.adapted)


def _output_changes(before: Capture, after: Capture) -> tuple[str, ...]:
    """Outputs whose static shape changed, as sentences."""
    old, new = (info(next(reversed(c.graph.nodes))).inputs for c in (before, after))
    return tuple(
        f"output {i}: {dims(a.shape)} → {dims(b.shape)}"
        for i, (a, b) in enumerate(zip(old, new))
        if a.shape != b.shape and before.coverage.values == "meta"
    )


def _narrowed(rows: Sequence[EditRow]) -> list[str]:
    """What else became narrower with projections, as sentences."""
    sentences = []
    for edit in (row.edit for row in rows if row.edit.op.action == "project"):
        settings = edit.op.settings
        sentences += [
            f"the concatenation behind {edit.path} is narrower: {out['before']} → {out['after']} channels"
            for out in settings.get("outputs", ())
        ]
        gone = settings["branch_channels"] - settings["channels"]
        for reader in settings.get("consumers", ()):
            before = reader["layer"]["in_channels"]
            after = before - gone * reader["repeat"]
            sentences.append(f"{reader['path']}, behind {edit.path}, takes fewer channels: {before} → {after}")
    return sentences


def join_names(first: Mapping[str, tuple[str, ...]], then: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Two maps from old parameter names to new ones; the second may rename what the first made."""
    renamed = {name for names in first.values() for name in names}
    joined = {old: tuple(n for name in names for n in then.get(name, (name,))) for old, names in first.items()}
    return joined | {old: tuple(names) for old, names in then.items() if old not in renamed}


def totals(analysis: Analysis) -> dict[str, int]:
    """The totals that a report compares."""
    return cast("dict[str, int]", analysis.to_dict()["totals"])


def model_facts(captured: Capture, **more: object) -> dict[str, Any]:
    """What a plan records about the model it was made for."""
    kind = type(captured.model)
    inputs = [
        {"name": name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
        for name, spec in captured.inputs
    ]
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "params": captured.params, "inputs": inputs, **more}
