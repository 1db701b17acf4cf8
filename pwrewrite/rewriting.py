"""The whole way of a rewrite: capture → propose → apply → verify → report, as `rewrite`; `make_plan` only plans it.

Passes run in order, each on the model as the ones before left it, so that later ones see the parts that earlier ones
put in. Their proposals join into one plan from the original model to the result, which `pwrewrite.apply` and
`pwrewrite.load` can carry out again. What the report says of parameters and MACs is counted anew from the rewritten
model, and must equal what the shapes predict (an op's own estimate may be older than its widths, in a plan that a
person edited).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from .analysis.records import Analysis
from .capture import Inputs
from .errors import VerificationError
from .passes import Pass
from .plan import Edit, Plan
from .report.records import Report
from .steps import Progress, Run, join_names, propose, silent
from .verification import Verification

__all__ = ["Planned", "Progress", "Rewritten", "join_names", "make_plan", "propose", "rewrite", "unverified_error"]


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
        from .report.readme import readme
        from .storage import save

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
        passes: What proposes, in order; ``InsertBottleneck()`` at 1% of the MACs where neither these nor a plan are
            given.
        plan: Instead of passes: a plan to carry out.
        allow_output_change: Whether an output may change its shape, which the report then tells.
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
    run = Run(model, example_inputs, progress or silent)
    run.all(passes, plan)
    before, after = run.analyses(target)
    proof = None
    if verify:
        run.say("verifying", None)
        proof = _verify(model, run, before, allow_output_change, thorough, max_error)
    return Rewritten(
        run.model,
        run.finished(target),
        run.report(before, after, target, proof),
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
    before: Analysis,
    allow_output_change: bool,
    thorough: bool,
    max_error: float | None,
) -> Verification:
    from .verify import verify

    return verify(
        model,
        run.model,
        run.inputs,
        edits=[row.edit for row in run.rows],
        expected=run.expected(before),
        allow_output_change=allow_output_change,
        max_error=max_error,
        thorough=thorough,
        progress=lambda step: run.say(f"verifying: {step}", None),
    )
