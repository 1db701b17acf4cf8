"""The whole way from what a person types: `rewrite_target`, `plan_target`, `verify_targets`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..core.errors import RefusedError, UsageError
from ..core.plan import Plan
from ..core.verification import Verification
from ..passes import Pass
from ..report.records import Report
from ..report.rewrite_rows import counts_text
from ..targets import LoadedModel, TargetOptions, class_name, load, open_target
from ..targets.storage import is_saved, read_plan
from ..verifying import verify
from .choices import Choices, check_settings
from .rewrite import Planned, Progress, Rewritten, join_names, make_plan, rewrite


def rewrite_target(
    request: TargetOptions,
    choices: Choices,
    plan: Plan | None = None,
    *,
    verify: bool = True,
    max_error: float | None = None,
    progress: Progress | None = None,
) -> Rewritten:
    """Rewrites what a target leads to.

    Args:
        request: The target.
        choices: What is asked of the passes.
        plan: Instead of passes: a plan to carry out.
        verify: Whether to verify the result.
        max_error: Largest relative output error that passes.
        progress: Called at each step.

    Returns:
        The result; its plan leads from the *original* model, over an earlier rewrite where the target is a saved
        folder.

    Raises:
        RefusedError: If nothing could be rewritten, or nothing of what was asked for single layers.
        PwrewriteError: If the target, the choices or the plan do not lead to a result.
    """
    passes = _passes(choices, plan)
    opened = _opened(request, progress)
    result = rewrite(
        opened.model,
        opened.example_inputs,
        passes,
        plan,
        choices.allow_output_change,
        verify=verify,
        max_error=max_error,
        target=request.target,
        progress=progress,
    )
    check_settings(choices.settings, result.edits, result.report.skips)
    if not result.edits:
        raise RefusedError(
            "there is nothing to rewrite",
            where=request.target,
            got=counts_text(result.report.skips) or "no layer that these passes are about",
            hint="--dry-run --all says why for each layer",
        )
    whole = whole_plan(opened, result.plan)
    names = join_names(opened.names, result.names)
    return replace(result, plan=whole, names=names, report=told(result.report, opened))


def plan_target(
    request: TargetOptions, choices: Choices, plan: Plan | None = None, *, progress: Progress | None = None
) -> Planned:
    """The plan that `rewrite_target` would carry out on what a target leads to.

    Args:
        request: The target.
        choices: What is asked of the passes.
        plan: Instead of passes: a plan to look at.
        progress: Called at each step.

    Returns:
        The plan, *from the target as it is*, and what it would change.

    Raises:
        PwrewriteError: If the target, the choices or the plan do not lead to one.
    """
    passes = _passes(choices, plan)
    opened = _opened(request, progress)
    planned = make_plan(opened.model, opened.example_inputs, passes, plan, target=request.target, progress=progress)
    facts = {**planned.plan.model, **origin_of(opened)}
    return Planned(replace(planned.plan, model=facts), told(planned.report, opened))


def verify_targets(
    request: TargetOptions,
    other: str,
    *,
    max_error: float | None = None,
    allow_output_change: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Compares what two targets lead to; both may be saved folders.

    Where the second is a folder and the first is not, the first is the original of the second.

    Args:
        request: The first target, with what both are opened with.
        other: The second target.
        max_error: Largest relative output error that passes.
        allow_output_change: Whether outputs may differ in shape.
        progress: Called at each step.

    Raises:
        PwrewriteError: If a target does not lead to a model, or the first does not run.
    """
    say = progress or (lambda what, share: None)
    say("loading", None)
    folders = is_saved(request.target), is_saved(other)
    if request.base is not None and not any(folders):
        raise UsageError("--model is for saved folders", got=f"{request.target} and {other}, which are none")
    if folders == (False, True) and not request.args:
        request = replace(request, args=read_plan(other).model.get("args") or {})
    first = open_target(replace(request, base=request.base if folders[0] else None))
    second: nn.Module
    if folders == (False, True) and request.base is None:
        second = load(other, first.model)
    else:
        base = request.base if folders[1] else None
        weights = None if folders[1] else request.weights
        second = open_target(replace(request, target=other, base=base, weights=weights)).model
    found = verify(
        first.model,
        second,
        first.example_inputs,
        max_error=max_error,
        allow_output_change=allow_output_change,
        progress=lambda step: say(f"verifying: {step}", None),
    )
    return replace(found, notes=(*first.notes, *found.notes))


def _passes(choices: Choices, plan: Plan | None) -> list[Pass] | None:
    if plan is None:
        return choices.build()
    given = [name for name in choices.given if name != "allow_output_change"]
    if given:
        named = {"passes": "pass", "settings": "set"}.get(given[0], given[0].replace("_", "-"))
        raise UsageError(
            f"--plan and --{named} exclude each other",
            hint="a plan already says what to do; it is JSON made to be edited",
        )
    return None


def _opened(request: TargetOptions, progress: Progress | None) -> LoadedModel:
    if progress is not None:
        progress("loading", None)
    return open_target(request)


def origin_of(opened: LoadedModel) -> dict[str, Any]:
    """What a plan records about where the original comes from."""
    facts: dict[str, Any] = {"target": opened.origin}
    if opened.plan is None:
        facts["class"] = class_name(opened.model)
    if opened.args and _recordable(opened.args):
        facts["args"] = dict(opened.args)
    return facts


def whole_plan(opened: LoadedModel, plan: Plan) -> Plan:
    """The plan from the original model."""
    if opened.plan is None:
        return replace(plan, model={**plan.model, **origin_of(opened)})
    joined = opened.plan + plan
    kept = {key: opened.plan.model[key] for key in ("class", "params") if key in opened.plan.model}
    return replace(joined, model={**plan.model, **origin_of(opened), **kept})


def told(report: Report, loaded: LoadedModel) -> Report:
    """A report with the notes of loading before its own."""
    return replace(report, notes=tuple(dict.fromkeys((*loaded.notes, *report.notes))))


def _recordable(args: Mapping[str, Any]) -> bool:
    try:
        json.dumps(args)
    except (TypeError, ValueError):
        return False
    return True
