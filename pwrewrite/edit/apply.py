"""The one place that changes a model: `apply` carries out a plan on a copy.

Where a layer is a module, a new module takes its place under every name it has, so the model's class, code and methods
stay (`swap`). Where it is a function call in a module's code, that one submodule becomes a graph (`graph_edit`).

A rewrite that the model's own code does not survive (it reads ``conv.weight.dtype``) is found by a *probe*, which runs
the result in some way. The ops that break it are searched for by halves, each half on a fresh copy, and become skips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..core.errors import PlanError, RefusedError, first_line, shortened
from ..core.modes import plain_modes
from ..core.plan import Edit, Op, Plan, Skip, SkipReason
from ..core.subjects import check_model
from .actions import Bench, Decomposer, Refused, prepare
from .swap import copy_of

Probe = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Applied:
    """A plan carried out: the changed copy, what was done, in order, and what was refused while carrying it out."""

    model: nn.Module
    edits: tuple[Edit, ...]
    skips: tuple[Skip, ...]


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a model with a plan carried out and weights filled in, in the same training mode.

    Args:
        model: The model the plan was made for; stays as it is.
        plan: What to do.

    Raises:
        PlanError: If the plan does not fit the model.
        RefusedError: If an op cannot be carried out.
    """
    check_model(model)
    if not isinstance(plan, Plan):
        hint = "Plan.from_dict makes one of its data" if isinstance(plan, dict) else "Plan.read reads one from a file"
        raise PlanError("this is no plan", got=shortened(repr(plan), 80), hint=hint)
    applied = carry_out(model, plan)
    if applied.skips:
        first = applied.skips[0]
        raise RefusedError(f"an op of the plan was refused: {first.detail}", where=first.path, got=str(first.reason))
    return applied.model


@plain_modes()
def carry_out(
    model: nn.Module,
    plan: Plan,
    *,
    fill: bool = True,
    decomposer: Decomposer | None = None,
    probe: Probe | None = None,
    progress: Callable[[str], None] | None = None,
) -> Applied:
    """Carries out a plan on a copy of a model.

    Args:
        model: Stays as it is.
        plan: What to do.
        fill: Whether to fill in weights; without it the new parameters are unset, for saved ones.
        decomposer: Gives the factors of a layer; the plain decomposition of its weights where None.
        probe: Runs the changed model in some way and raises if it does not survive; ops that break it become skips.
        progress: Called with the path of each layer before it is worked on.

    Raises:
        PlanError: If the plan does not fit the model.
        RefusedError: If the model cannot be copied, or a weight holds NaN or Inf.
    """
    work = _Work(model, fill, decomposer, {id(op): prepare(op) for op in plan.ops})
    changed, edits, skips = work.attempt(plan.ops, progress=progress)
    failure = _failure(probe, changed) if probe is not None and edits else None
    if probe is not None and failure is not None:
        changed, edits, others = _without_culprits(work, [edit.op for edit in edits], probe, failure)
        skips |= others
    return Applied(changed, tuple(edits), tuple(skips[id(op)] for op in plan.ops if id(op) in skips))


_Done = tuple[nn.Module, list[Edit], dict[int, Skip]]
"""A changed copy, what was done to it, and what was refused, by the identity of the op."""


@dataclass
class _Work:
    """Carries out ops on as many copies of a model as it takes; what takes long is computed once."""

    model: nn.Module
    fill: bool
    decomposer: Decomposer | None
    edits: dict[int, Callable[[Bench], Edit]]
    known: dict[int, object] = field(default_factory=dict)

    def attempt(
        self, ops: Sequence[Op], *, progress: Callable[[str], None] | None = None, partial: bool = False
    ) -> _Done:
        """Carries out ops on a fresh copy; where some are missing (``partial``), what builds on them is skipped too."""
        bench = Bench(copy_of(self.model), self.model, self.fill, self.known, self.decomposer)
        edits, skips = list[Edit](), dict[int, Skip]()
        for op in ops:
            if progress is not None:
                progress(op.path)
            try:
                edits.append(self.edits[id(op)](bench))
            except Refused as refused:
                skips[id(op)] = refused.skip
            except PlanError:
                if not partial:
                    raise
                detail = "builds on an edit that was taken back, because the model's own code does not survive it"
                skips[id(op)] = Skip(op.path, SkipReason.BROKE_MODEL, detail)
        return bench.model, edits, skips


def _failure(probe: Probe, model: nn.Module) -> Exception | None:
    try:
        probe(model)
    except Exception as error:
        return error
    return None


def _without_culprits(work: _Work, ops: list[Op], probe: Probe, failure: Exception) -> _Done:
    """Finds the ops that the probe does not survive, and carries out the others."""
    unchanged = _failure(probe, copy_of(work.model))
    if unchanged is not None:
        raise RefusedError(f"the model does not run even as it was: {first_line(unchanged)}") from unchanged
    culprits: dict[int, Skip] = {}

    def keep(good: list[Op], rest: list[Op], failure: Exception | None = None) -> list[Op]:
        """``good`` and those ops of ``rest`` that the probe survives beside them."""
        if failure is None:
            failure = _failure(probe, work.attempt([*good, *rest], partial=True)[0])
        if failure is None:
            return [*good, *rest]
        if len(rest) == 1:
            detail = f"the model's own code does not survive it: {first_line(failure)}"
            culprits[id(rest[0])] = Skip(rest[0].path, SkipReason.BROKE_MODEL, detail)
            return good
        half = len(rest) // 2
        return keep(keep(good, rest[:half]), rest[half:])

    changed, edits, skips = work.attempt(keep([], ops, failure), partial=True)
    return changed, edits, skips | culprits
