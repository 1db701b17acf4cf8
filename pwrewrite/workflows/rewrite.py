"""The whole way of a rewrite: capture → propose → apply → verify → report, as `rewrite`; `make_plan` only plans it.

Passes run in order, each on the model as the ones before left it, so that later ones see the parts that earlier ones
put in. Their proposals join into one plan from the original model to the result, which `pwrewrite.apply` and
`pwrewrite.load` can carry out again. What the report says of parameters and MACs is counted anew from the rewritten
model, and must equal what the shapes predict (an op's own estimate may be older than its widths, in a plan that a
person edited).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..analysis.records import Analysis
from ..capturing import Inputs
from ..core.errors import UsageError, VerificationError
from ..core.plan import Edit, Plan
from ..core.verification import Verification
from ..passes import Pass
from ..planning.settings import Settings
from ..report.records import Report
from .budget import Ask, Budgeted, BudgetLike, Metric
from .steps import Progress, Run, join_names, propose, silent

__all__ = [
    "Planned",
    "Progress",
    "Rewritten",
    "join_names",
    "make_plan",
    "propose",
    "rewrite",
    "rewrite_asked",
    "unverified_error",
]


@dataclass(frozen=True)
class Rewritten:
    """The result of a rewrite.

    Attributes:
        model: The rewritten copy, in the training mode of the original.
        plan: From the original model to this one.
        report: What changed, and what proves the rest.
        edits: What was done, in order.
        names: Name of a parameter of the original to the names that came in its place, for those that are gone.
    """

    model: nn.Module
    plan: Plan
    report: Report
    edits: tuple[Edit, ...]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def save(self, folder: str | Path, *, force: bool = False, unverified: bool = False) -> Path:
        """Saves the model with its plan, report and a README; see `pwrewrite.load`.

        Args:
            folder: Where to.
            force: Whether a folder that an earlier rewrite was saved in is replaced.
            unverified: Whether to save although the verification failed or was left out; the README says so.

        Returns:
            The folder.

        Raises:
            VerificationError: If the verification failed or was left out, and ``unverified`` is off.
            OutputError: If the folder exists, or cannot be written.
        """
        from ..report.readme import readme
        from ..targets.storage import save

        if not self.report.passed and not unverified:
            raise unverified_error(self.report)
        # What the folder's map of names is made from: all edits in one, since later ones may rename what earlier made.
        edits = [replace(self.edits[0], renamed=self.names)] if self.edits else []
        text = readme(self.report, self.plan, Path(folder).name)
        return save(folder, self.model, self.plan, edits=edits, report=self.report.to_dict(), readme=text, force=force)


@dataclass(frozen=True)
class Planned:
    """A plan that was not carried out.

    Attributes:
        plan: What would be done, and what would not.
        report: What it would change, from shapes alone: no errors, no verification.
    """

    plan: Plan
    report: Report


def unverified_error(report: Report) -> VerificationError:
    """Why a rewritten model is not saved."""
    proof = report.verification
    if proof is None:
        return VerificationError(
            "the rewritten model was not verified", hint="leave the verification on, or save it unverified on purpose"
        )
    failed = proof.failures
    first = failed[0]
    return VerificationError(
        f"verification failed: {len(failed)} of {len(proof.checks)} checks"
        if len(proof.checks) > 1
        else "verification failed",
        where=proof.diverges_at,
        expected=first.name,
        got=first.detail or None,
    )


def rewrite(
    model: nn.Module,
    example_inputs: Inputs,
    passes: Sequence[Pass] | None = None,
    plan: Plan | None = None,
    allow_output_change: bool = False,
    *,
    budget: BudgetLike | None = None,
    calibration: Iterable[Any] | None = None,
    calibration_size: int | None = None,
    forms: Sequence[str] = ("all",),
    sensitivity: str | None = None,
    refit: str = "full",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    multiple: int | None = None,
    max_layer_error: float | None = None,
    gate: str | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    verify: bool = True,
    thorough: bool = True,
    max_error: float | None = None,
    target: str | None = None,
    progress: Progress | None = None,
) -> Rewritten:
    """Rewrites a model, keeps its weights' knowledge, and proves what did not change.

    Either as passes or a plan say, or within a budget at the least loss: ``rewrite(model, inputs, budget={"macs": 0.5},
    calibration=batches)``. With a plan and calibration inputs, the plan's new weights are chosen and fitted by these.

    Args:
        model: Any module; stays as it is.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword ones.
        passes: What proposes, in order; ``InsertBottleneck()`` at 1% of the MACs where neither these nor a plan are
            given.
        plan: Instead of passes: a plan to carry out.
        allow_output_change: Whether an output may change its shape, which the report then tells.
        budget: Instead of passes or a plan: kind to limit, as for `pwrewrite.plan`; so are the next ten.
        calibration: A few hundred unlabelled inputs: any iterable of batches.
        calibration_size: Use at most so many inputs.
        forms: Forms to choose from.
        sensitivity: ``loss``, ``activations`` or ``weights``.
        refit: ``full`` fits the factors, biases and norms to the original on the calibration inputs, ``bias`` the last
            two alone, ``none`` nothing.
        include: Patterns on paths, for a budget; passes have their own.
        exclude: Patterns on paths that stay as they are.
        multiple: What widths are rounded to.
        max_layer_error: Largest relative error of a layer.
        gate: ``latency`` to use only what is measured to be faster than the layer on this device.
        metric: Called with the original and with the result; the report tells both values.
        seed: Of everything that is drawn.
        verify: Whether to verify the result.
        thorough: Whether to verify at several batch and spatial sizes, in train mode, gradients and reloading.
        max_error: Largest relative output error that passes verification; unlimited if None.
        target: Name for the report.
        progress: Called at each step with what is being done and how much of it is done.

    Returns:
        The rewritten copy with its plan and report. Whether verification passed is ``report.passed``.

    Raises:
        UsageError: If both passes and a plan are given, or a pass's setting does not fit the model.
        PlanError: If the plan does not fit the model.
        RefusedError: If a weight holds NaN or Inf, or the model cannot be copied.
        CaptureError: If the model does not run on the inputs.
    """
    ask = None
    if budget is not None or calibration is not None:
        settings = Settings(
            tuple(forms),
            sensitivity,
            refit,
            tuple(include),
            tuple(exclude),
            multiple,
            max_layer_error,
            False,
            seed,
            gate,
        )
        metrics = None if metric is None else {getattr(metric, "__name__", "metric"): metric}
        ask = Ask(budget, calibration, calibration_size, settings, metrics)
        if passes is not None:
            raise UsageError("a budget or calibration inputs and passes exclude each other", hint="give one of them")
    return rewrite_asked(
        model,
        example_inputs,
        ask,
        plan,
        allow_output_change,
        passes=passes,
        verify=verify,
        thorough=thorough,
        max_error=max_error,
        target=target,
        progress=progress,
    )


def rewrite_asked(
    model: nn.Module,
    example_inputs: Inputs,
    ask: Ask | None,
    plan: Plan | None = None,
    allow_output_change: bool = False,
    *,
    passes: Sequence[Pass] | None = None,
    verify: bool = True,
    thorough: bool = True,
    max_error: float | None = None,
    target: str | None = None,
    progress: Progress | None = None,
) -> Rewritten:
    """`rewrite`, with what a budget asks as one; None where passes or a plan decide alone.

    Raises:
        PwrewriteError: As for `rewrite`.
    """
    if ask is not None and ask.budget is not None and plan is not None:
        raise UsageError("a budget and a plan exclude each other", hint="a plan already says what to do")
    if ask is not None and ask.budget is None and plan is None:
        raise UsageError("calibration inputs serve a budget or a plan, and there is neither")
    run = Run(model, example_inputs, progress or silent)
    budgeted = None if ask is None else Budgeted(run, ask)
    if budgeted is None:
        run.all(passes, plan)
    else:
        budgeted.carry_out(plan)
    before, after = run.analyses(target)
    proof = None
    if verify:
        run.say("verifying", None)
        inputs = run.inputs if budgeted is None else budgeted.sample()
        proof = _verify(model, run, inputs, before, allow_output_change, thorough, max_error)
    report = run.report(before, after, target, proof)
    return Rewritten(
        run.model,
        run.finished(target),
        report if budgeted is None else budgeted.complete(report),
        tuple(row.edit for row in run.rows),
        run.names,
    )


def make_plan(
    model: nn.Module,
    example_inputs: Inputs,
    passes: Sequence[Pass] | None = None,
    plan: Plan | None = None,
    *,
    target: str | None = None,
    progress: Progress | None = None,
) -> Planned:
    """The plan that `rewrite` would carry out, without decomposing weights where no later pass reads them.

    Args:
        model: Any module; stays as it is.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword ones.
        passes: What proposes, in order, as for `rewrite`.
        plan: Instead of passes: a plan to look at.
        target: Name for the report.
        progress: As for `rewrite`.

    Raises:
        PwrewriteError: As for `rewrite`.
    """
    run = Run(model, example_inputs, progress or silent, fill=False)
    run.all(passes, plan)
    before, after = run.analyses(target)
    return Planned(run.finished(target), run.report(before, after, target, None))


def _verify(
    model: nn.Module,
    run: Run,
    inputs: Inputs,
    before: Analysis,
    allow_output_change: bool,
    thorough: bool,
    max_error: float | None,
) -> Verification:
    from ..verifying import verify

    return verify(
        model,
        run.model,
        inputs,
        edits=[row.edit for row in run.rows],
        expected=run.expected(before),
        allow_output_change=allow_output_change,
        max_error=max_error,
        thorough=thorough,
        progress=lambda step: run.say(f"verifying: {step}", None),
    )
