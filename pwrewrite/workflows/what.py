"""What is done to a model: passes, a `Plan` or a `Budget`, from whatever a caller gives.

A Python call gives it as one argument, or as keywords; the command line as records of options. Both come through
`what_of`, so that both refuse the same mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..core.declaring import changed, flag_of, from_keywords, refuse_unknown
from ..core.errors import PlanError, UsageError, shortened
from ..core.numbers import parse_time
from ..core.options import Budget, LayerOptions, PassOptions, Proof
from ..core.plan import Plan
from ..core.random_state import check_seed
from ..passes import Pass
from ..planning.augment import PLAIN
from ..targets import LoadedModel
from ..targets.arrays import open_labels
from ..targets.calibration import open_calibration
from ..targets.user_objects import open_function, open_metric
from .pass_names import as_list, passes_of
from .recover import check_recovery

T = TypeVar("T")

What = Sequence[Pass] | Plan | Budget
"""Passes in order, a plan to carry out, or a budget to plan within."""


def what_from_keywords(function: str, what: object, options: Mapping[str, object]) -> tuple[What, Proof]:
    """What a Python call of ``function`` asks for.

    ``what`` are passes or their names, a plan, a budget or its limits, or None where keywords say it: fields of
    `PassOptions`, `Budget` and `Proof`, and ``proof``, ``plan`` and ``budget``. A `UsageError` for others, and for
    those that make no sense together.
    """
    rest: dict[str, Any] = dict(options)
    proof = from_keywords(Proof, rest)
    plan, budget = rest.pop("plan", None), rest.pop("budget", None)
    passes = rest.pop("passes", None)
    if isinstance(what, Mapping) and "ops" in what:
        what = Plan.from_dict(what)
    if isinstance(plan, (str, Path)):
        plan = Plan.read(plan)
    elif isinstance(plan, Mapping):
        plan = Plan.from_dict(plan)
    elif plan is not None and not isinstance(plan, Plan):
        got = shortened(repr(plan), 80)
        raise PlanError("this is no plan", expected="a Plan, its data, or the name of a file with one", got=got)
    if isinstance(what, Plan):
        plan, what = _only(what, plan, "plan"), None
    elif isinstance(what, (Budget, Mapping, float)) or (isinstance(what, str) and "=" in what):
        budget, what = _only(what, budget, "budget"), None
    passes = passes if what is None else _only(what, passes, "passes")
    if passes is not None and len(as_list(passes)) == 0:
        return (), proof
    for_budget = dict(rest)
    pass_options = from_keywords(PassOptions, {**rest, "passes": () if passes is None else as_list(passes)})
    within = from_keywords(Budget, for_budget)
    unknown = {name: rest[name] for name in for_budget if name not in PassOptions.__dataclass_fields__}
    refuse_unknown(function, unknown, PassOptions, Budget, Proof)
    if isinstance(budget, Budget):
        own = {name: getattr(within, name) for name in rest if name in Budget.__dataclass_fields__}
        within = replace(budget, **own)
    elif budget is not None:
        within = replace(within, limits=budget)
    return what_of(pass_options, within, plan, proof.allow_output_change), proof


def _only(value: T, keyword: object, name: str) -> T:
    if keyword is not None:
        raise UsageError(f"{name} is given twice", hint=f"leave {name}= out")
    return value


def what_of(passes: PassOptions, budget: Budget, plan: Plan | None = None, allow_output_change: bool = False) -> What:
    """What options ask for; a plan gets weights that the budget's calibration inputs decide where there are any."""
    budget = replace(
        budget, forms=as_list(budget.forms), include=as_list(budget.include), exclude=as_list(budget.exclude)
    )
    plan = budget.plan if plan is None else plan
    limited = (not isinstance(budget.limits, (Mapping, Sequence)) or bool(budget.limits)) or budget.max_drop is not None
    for_passes, for_budget = changed(passes, LayerOptions), changed(budget, LayerOptions)
    for_budget = [name for name in for_budget if name not in ("seed", "plan")]
    check_goes_with_calibration(budget)
    check_recovery(budget)
    check_seed(budget.seed)
    if isinstance(budget.recover, str):
        budget = replace(budget, recover=parse_time(budget.recover, "recover"))
    if not limited and budget.calibration is None:
        if for_budget == ["limits"]:
            raise UsageError("the budget limits nothing", expected="limits such as macs=0.5", got=repr(budget.limits))
        if for_budget:
            raise UsageError(f"{flag_of(Budget, for_budget[0])} goes with --budget or --calibration")
        if plan is None:
            return passes_of(passes, allow_output_change)
        if own := changed(passes):
            raise _excluded(flag_of(PassOptions, own[0]))
        return plan
    if for_passes:
        raise UsageError(
            f"{flag_of(PassOptions, for_passes[0])} goes with passes, not with --budget or --calibration",
            hint="a budget chooses layers, forms and widths; --forms, --include and --exclude restrict it",
        )
    if plan is not None:
        choosing = [n for n in changed(budget) if n in ("limits", "forms", "max_layer_error", "gate", "max_drop")]
        choosing += [name for name in changed(budget) if name in LayerOptions.__dataclass_fields__]
        if choosing:
            raise _excluded(flag_of(Budget, choosing[0]))
    elif not limited:
        raise UsageError(
            "there is no budget: calibration inputs serve a budget or a plan", expected="--budget macs=0.5, for example"
        )
    if budget.max_drop is not None and budget.metric is None:
        raise UsageError("--max-drop needs a --metric", hint="--metric eval.py:accuracy")
    return replace(budget, plan=plan)


def check_goes_with_calibration(budget: Budget) -> None:
    """Refuses options that say nothing without calibration inputs."""
    for name in ("batch", "preprocess", "calibration_size", "labels", "outputs", "refit"):
        if getattr(budget, name) not in (None, "none") and budget.calibration is None:
            raise UsageError(f"{flag_of(Budget, name)} goes with --calibration")


def _excluded(flag: str) -> UsageError:
    return UsageError(f"--plan and {flag} exclude each other", hint="a plan already says what to do; it can be edited")


def opened(budget: Budget, loaded: LoadedModel) -> Budget:
    """A budget with what it names opened: calibration inputs, labels and metric."""
    if isinstance(budget.calibration, str):
        data = open_calibration(
            budget.calibration,
            example_inputs=loaded.example_inputs,
            preprocess=budget.preprocess,
            size=budget.calibration_size,
            labels=open_labels(budget.labels) if budget.labels is not None else None,
            model=loaded.model,
        )
        budget = replace(budget, calibration=data)
    if isinstance(budget.batch, str):
        budget = replace(budget, batch=open_function(budget.batch, "--batch"))
    if isinstance(budget.augment, str) and budget.augment not in PLAIN:
        budget = replace(budget, augment=open_function(budget.augment, "--augment"))
    if isinstance(budget.metric, str):
        name = budget.metric.rpartition(":")[2]
        budget = replace(budget, metric=open_metric(budget.metric), metric_name=name)
    return budget
