"""Rewriting a model: capture → propose → apply → verify → report, as `rewrite`.

Passes run in order, each on the model as the ones before left it, so that later ones see the parts that earlier ones
put in. Their proposals join into one plan from the original model to the result, which `pwrewrite.apply` and
`pwrewrite.load` can carry out again. What the report says of parameters and MACs is counted anew from the rewritten
model, and must equal what the shapes predict (an op's own estimate may be older than its widths, in a plan that a
person edited).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from ..analysis.records import Analysis
from ..capturing import Inputs
from ..core.errors import RefusedError, VerificationError
from ..core.modes import plain_modes
from ..core.options import Budget, Proof
from ..core.plan import Edit, Plan
from ..core.records import Shown
from ..core.verification import Verification
from ..report.readme import readme
from ..report.records import Report
from ..report.rewrite_rows import counts_text
from ..targets.storage import save
from ..verifying import verify
from .budget import Budgeted
from .pass_names import check_forms
from .steps import Progress, Run, join_names, silent
from .subject import Subject, check_editable, loaded_of, plan_from_original, with_notes_of
from .what import What, opened, what_from_keywords


@dataclass(frozen=True, repr=False)
class Rewritten(Shown):
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

        Raises:
            VerificationError: If the verification failed or was left out, and ``unverified`` is off.
            OutputError: If the folder exists, or cannot be written.
        """
        if not self.report.passed and not unverified:
            raise unverified_error(self.report)
        # What the folder's map of names is made from: all edits in one, since later ones may rename what earlier made.
        edits = [replace(self.edits[0], renamed=self.names)] if self.edits else []
        text = readme(self.report, self.plan, folder)
        return save(folder, self.model, self.plan, edits=edits, report=self.report.to_dict(), readme=text, force=force)


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


@plain_modes()
def rewrite(
    model: Subject,
    example_inputs: Inputs | None = None,
    what: What | None = None,
    *,
    proof: Proof | None = None,
    target: str | None = None,
    progress: Progress | None = None,
    **options: object,
) -> Rewritten:
    """Rewrites a model, keeps its weights' knowledge, and proves what did not change.

    Either as passes or a plan say, or within a budget at the least loss::

        rewrite(model, inputs, [passes.InsertBottleneck(0.5)])
        rewrite(model, inputs, passes=["insert-bottleneck"], rank=0.5, include=["layer4.*"])
        rewrite(model, inputs, Plan.read("plan.json"))
        rewrite(model, inputs, budget={"macs": 0.5}, calibration=batches)

    With a plan and calibration inputs, the plan's new weights are chosen and fitted by these.

    Args:
        model: Any module, or what `pwrewrite.load_target` gives; stays as it is.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword ones; a loaded model has its own.
        what: Passes (or their names) in order, a plan, or a `pwrewrite.Budget`; a bottleneck in place of every layer
            with at least 1% of the MACs where neither this nor options say anything else.
        proof: Whether and how the result is verified; its fields can be given as keywords too.
        target: Name for the report.
        progress: Called at each step with what is being done and how much of it is done.
        **options: ``passes``, ``plan`` or ``budget`` in place of ``what``; fields of `pwrewrite.core.options`:
            `PassOptions` for passes by name, `Budget` for a budget, `Proof` for the verification.

    Returns:
        The rewritten copy with its plan and report. Whether verification passed is ``report.passed``.

    Raises:
        UsageError: If options make no sense together, or a pass's setting does not fit the model.
        PlanError: If the plan does not fit the model.
        RefusedError: If a weight holds NaN or Inf, or the model cannot be copied.
        CaptureError: If the model does not run on the inputs.

    >>> import torch
    >>> from torch import nn
    >>> from pwrewrite.passes import InsertBottleneck
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    >>> result = rewrite(model, torch.randn(1, 3, 16, 16), [InsertBottleneck(rank=0.25, include=["2"])])
    >>> result.report.passed, [stage for stage, _ in result.model[2].named_children()]
    (True, ['reduce', 'core', 'expand'])
    """
    what, own = what_from_keywords("rewrite", what, options)
    proof = proof or own
    loaded = loaded_of(model, example_inputs)
    run = Run(loaded.model, loaded.example_inputs, progress or silent)
    budgeted = Budgeted(run, opened(what, loaded)) if isinstance(what, Budget) else None
    if budgeted is not None:
        budgeted.carry_out()
    elif not isinstance(what, Budget):
        run.all(what)
    if not run.state.rows:
        check_editable(loaded.model)
    target = target or loaded.target or None
    before, after = run.analyses(target)
    verification = None
    if proof.verify:
        verification = verified(run, before, proof, None if budgeted is None else budgeted.sample())
    report = run.report(before, after, target, verification)
    return Rewritten(
        run.result(),
        plan_from_original(loaded, run.finished(target)),
        with_notes_of(loaded, report if budgeted is None else budgeted.complete(report)),
        tuple(row.edit for row in run.state.rows),
        join_names(loaded.names, run.state.names),
    )


def check_rewritten(result: Rewritten, what: What, target: str) -> None:
    """Raises `RefusedError` for a result without edits, or in which what was named layer by layer was not done."""
    if isinstance(what, Budget):
        if not result.edits:
            budget = result.report.budget
            limits = ", ".join(f"{kind}={limit}" for kind, limit in budget.limits.items()) if budget else ""
            raise RefusedError(
                "there is nothing to rewrite: the model is within the budget as it is",
                where=target,
                got=limits or "a plan without ops that can be carried out",
            )
        return
    if not isinstance(what, Plan):
        check_forms(what, result.edits, result.report.skips)
    if not result.edits:
        raise RefusedError(
            "there is nothing to rewrite",
            where=target,
            got=counts_text(result.report.skips) or "no layer that these passes are about",
            hint="--dry-run --all says why for each layer",
        )


def verified(run: Run, before: Analysis, proof: Proof, inputs: Inputs | None = None) -> Verification:
    """What proves the result of a run, at its own inputs or at others."""
    run.say("verifying", None)
    inputs = run.inputs if inputs is None else inputs
    return verify(
        run.first.model,
        run.state.model,
        inputs,
        edits=[row.edit for row in run.state.rows],
        expected=run.expected(before),
        expected_at=None if inputs is run.inputs else run.inputs,
        allow_output_change=proof.allow_output_change,
        max_error=proof.max_error,
        captured=run.first if inputs is run.inputs else None,
        thorough=proof.thorough,
        progress=lambda step: run.say(f"verifying: {step}", None),
    )
