"""The whole way of a rewrite: capture → propose → apply → verify → report, as `rewrite`.

Passes run in order, each on the model as the ones before left it, so that later ones see the parts that earlier ones put in.
Their proposals join into one plan from the original model to the result, which `pwrewrite.apply` and `pwrewrite.load` can
carry out again. What the report says of parameters and MACs is counted anew from the rewritten model, and must equal what the
passes predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .analysis import analyze_capture
from .analysis.records import Analysis
from .apply import carry_out
from .capture import Inputs, capture
from .capture.records import Capture, info
from .cost import Cost
from .errors import UsageError
from .passes import InsertBottleneck, Pass
from .plan import Edit, Op, Plan, Skip
from .report.records import EditRow, Report
from .verification import Verification

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Rewritten:
    """The result of a rewrite.

    Attributes:
        model: The rewritten copy, in the training mode of the original.
        plan: From the original model to this one.
        report: What changed, and what proves the rest.
        edits: What was done, in order.
    """

    model: nn.Module
    plan: Plan
    report: Report
    edits: tuple[Edit, ...]


def propose(captured: Capture, passes: Sequence[Pass]) -> Plan:
    """A plan from what several passes propose on one capture; the first to propose for a layer has it.

    Args:
        captured: The model.
        passes: The passes, in order.
    """
    plan = Plan(model=model_facts(captured))
    taken: set[str] = set()
    for one in passes:
        proposals = one.propose(captured)
        ops = tuple(p for p in proposals if isinstance(p, Op) and p.path not in taken)
        taken |= {op.path for op in ops}
        plan = plan + Plan(ops, tuple(p for p in proposals if isinstance(p, Skip)))
    return plan


def rewrite(
    model: nn.Module,
    example_inputs: Inputs,
    passes: Sequence[Pass] | None = None,
    plan: Plan | None = None,
    allow_output_change: bool = False,
    *,
    verify: bool = True,
    thorough: bool = True,
    max_error: float | None = None,
    target: str | None = None,
    progress: Progress | None = None,
) -> Rewritten:
    """Rewrites a model, keeps its weights' knowledge, and proves what did not change.

    Args:
        model: Any module; stays as it is.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword ones.
        passes: What proposes, in order; ``InsertBottleneck()`` at 1% of the MACs where neither these nor a plan are given.
        plan: Instead of passes: a plan to carry out.
        allow_output_change: Whether an output may change its shape, which the report then tells.
        verify: Whether to verify the result.
        thorough: Whether to verify at several batch and spatial sizes, in train mode, gradients and reloading.
        max_error: Largest relative output error that passes verification; unlimited if None.
        target: Name for the report.
        progress: Called with a line about each step.

    Returns:
        The rewritten copy with its plan and report. Whether verification passed is ``report.passed``.

    Raises:
        UsageError: If both passes and a plan are given, or a pass's setting does not fit the model.
        PlanError: If the plan does not fit the model.
        RefusedError: If a weight holds NaN or Inf, or the model cannot be copied.
        CaptureError: If the model does not run on the inputs.
    """
    if passes is not None and plan is not None:
        raise UsageError("passes and a plan exclude each other", hint="a plan already says what to do")
    say = progress or (lambda _: None)
    say("capturing")
    first = capture(model, example_inputs)
    if plan is None and passes is None:
        passes = (InsertBottleneck(min_share=0.01),)
    run = _Run(model, example_inputs, first, say)
    if plan is not None:
        run.step(plan)
    for one in passes or ():
        say(f"{one.name}: proposing")
        run.step(propose(run.captured, [one]))
    before = analyze_capture(first, target=target or "")
    after = analyze_capture(run.captured, target=target or "") if run.rows else before
    expected = Cost(
        params=before.params + sum(e.params_after - e.params_before for e in run.estimates),
        macs=before.macs + sum(e.macs_after - e.macs_before for e in run.estimates),
    )
    proof = None
    if verify:
        say("verifying")
        proof = _verify(model, run, example_inputs, expected, allow_output_change, thorough, max_error, say)
    report = Report(
        target or type(model).__name__,
        totals(before),
        totals(after),
        tuple(run.rows),
        run.plan.skips,
        proof,
        _output_changes(first, run.captured),
        tuple(dict.fromkeys((*first.notes, *run.captured.notes))),
    )
    whole = replace(run.plan, model=model_facts(first, **({"target": target} if target else {})))
    return Rewritten(run.model, whole, report, tuple(row.edit for row in run.rows))


class _Run:
    """A model on its way: as it is now, its capture, and what was done so far."""

    def __init__(self, model: nn.Module, inputs: Inputs, captured: Capture, say: Progress) -> None:
        self.model, self.inputs, self.captured, self.say = model, inputs, captured, say
        self.plan = Plan()
        self.rows: list[EditRow] = []
        self.estimates: list[Any] = []

    def step(self, plan: Plan) -> None:
        """Carries out one plan on the model as it is now."""
        if not plan.ops:
            self.plan = self.plan + plan
            return
        applied = carry_out(
            self.model,
            plan,
            probe=lambda changed: _survives(changed, self.inputs, self.captured.coverage.values),
            progress=lambda path: self.say(f"rewriting {path}"),
        )
        after = capture(applied.model, self.inputs) if applied.edits else self.captured
        macs_before, macs_after = _macs_by_path(self.captured), _macs_by_path(after)
        for edit in applied.edits:
            old = _under(macs_before, (edit.path, *edit.aliases))
            new = _under(macs_after, _places(edit))
            self.rows.append(EditRow(edit, old, new))
            if edit.op.estimate is not None:
                self.estimates.append(edit.op.estimate)
        done = {edit.path for edit in applied.edits}
        self.plan = self.plan + Plan(tuple(op for op in plan.ops if op.path in done), (*plan.skips, *applied.skips))
        if applied.edits:
            self.model, self.captured = applied.model, after


def _survives(changed: nn.Module, inputs: Inputs, values: str) -> None:
    capture(changed, inputs, values=values)


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
    if edit.kind == "graph":
        return tuple({name.rsplit(".", 2)[0] for names in edit.renamed.values() for name in names})
    return (edit.path, *edit.aliases)


def _verify(
    model: nn.Module,
    run: _Run,
    inputs: Inputs,
    expected: Cost,
    allow_output_change: bool,
    thorough: bool,
    max_error: float | None,
    say: Progress,
) -> Verification:
    from .verify import verify

    return verify(
        model,
        run.model,
        inputs,
        edits=[row.edit for row in run.rows],
        expected=expected,
        allow_output_change=allow_output_change,
        max_error=max_error,
        thorough=thorough,
        progress=say,
    )


def _output_changes(before: Capture, after: Capture) -> tuple[str, ...]:
    """Outputs whose static shape changed, as sentences."""
    old, new = (info(next(reversed(c.graph.nodes))).inputs for c in (before, after))
    return tuple(
        f"output {i}: {'×'.join(map(str, a.shape))} → {'×'.join(map(str, b.shape))}"
        for i, (a, b) in enumerate(zip(old, new))
        if a.shape != b.shape and before.coverage.values == "meta"
    )


def totals(analysis: Analysis) -> dict[str, int]:
    """The totals that a report compares."""
    found: dict[str, int] = analysis.to_dict()["totals"]
    return found


def model_facts(captured: Capture, **more: Any) -> dict[str, Any]:
    """What a plan records about the model it was made for."""
    kind = type(captured.model)
    inputs = [
        {"name": name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
        for name, spec in captured.inputs
    ]
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "params": captured.params, "inputs": inputs, **more}
