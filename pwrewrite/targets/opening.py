"""From what a person types to a model that can be captured: `open_target`, the one place where a target is opened.

A folder that `pwrewrite.save` wrote is a target like any other, so rewrites compose: it opens as the rewritten model,
with the plan that leads to it from the original. The original comes from ``--model``, or from the target that the plan
records (a file with its absolute path) when the user says that it is trusted.

Random weights are drawn after a seed, the same in every run; the caller's own random state stays as it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import add
from pathlib import Path

import torch
from torch import nn

from ..capturing import split_inputs
from ..capturing.lazy import has_lazy_modules, materialized
from ..core.declaring import from_keywords
from ..core.errors import InputError, TargetError, UsageError
from ..core.modes import plain_modes
from ..core.options import TargetOptions
from ..core.plan import Plan
from ..core.random_state import check_seed, keeping_random_state
from ..core.records import Shown
from ..core.subjects import check_model
from ..core.text import NO_WEIGHTS
from . import storage
from .checkpoints import check_checkpoint
from .inputs import ExampleInputs, describe_inputs, parse_input, resolve_inputs
from .resolve import TargetInfo, parse_target, resolve_model
from .user_code import suggest_files
from .weights import load_weights

RANDOM_WEIGHTS = (
    f"{NO_WEIGHTS}: the weights are those that the model's code makes (seed {{seed}}). Errors of random weights are "
    "larger than those of trained ones, and predictions say nothing"
)


@dataclass(frozen=True, repr=False)
class LoadedModel(Shown):
    """A model that is ready to be captured, and where it came from.

    Attributes:
        model: In eval mode.
        example_inputs: A tuple of positional inputs or a dict of keyword ones; empty when none were asked for.
        target: As the user gave it.
        notes: What was assumed, chosen or left out.
        plan: From the original model to this one; None where this is the original.
        origin: The target of the original model, as a plan should record it.
        args: What the original's constructor was given.
        names: Name of a parameter of the original to those that came in its place.
    """

    model: nn.Module
    example_inputs: ExampleInputs
    target: str
    notes: tuple[str, ...] = ()
    plan: Plan | None = None
    origin: str = ""
    args: Mapping[str, object] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def open_target(
    options: TargetOptions, *, empty: bool = False, need_inputs: bool = True, seeded: bool = True
) -> LoadedModel:
    """Builds the model that a target leads to, fills in weights and finds inputs for it.

    Args:
        options: The target, and how it is opened.
        empty: Build without memory for the weights: parameters are on meta, buffers and inputs are real, a checkpoint's
            tensors replace the empty ones. A model that does not bear this, and that of a folder, is built for real.
        need_inputs: Whether inputs are wanted at all.
        seeded: Whether the random state is set; else the caller's own is drawn from.

    Raises:
        PwrewriteError: `UsageError`, `TargetError`, `WeightsError` and `InputError` for what was given; `PlanError` for
            the plan of a folder.
    """
    for text in options.inputs:  # what is cheap to refuse is refused before a model is built
        parse_input(text)
    if storage.is_saved(options.target):
        return _open_folder(options, need_inputs, seeded)
    if options.base is not None:
        if ":" not in options.target and not Path(options.target).exists():
            hint = suggest_files(Path(options.target), ("",), only_near=True)
            raise UsageError(
                f"no such folder: {options.target}", expected="a folder that pwrewrite has saved", hint=hint
            )
        message, got = "--model is for a saved folder: the model that it was rewritten from", "which is none"
        raise UsageError(message, got=f"{options.target}, {got}", hint="leave --model out")
    if options.weights is not None:
        check_checkpoint(options.weights)
    with _seeded(options.seed if seeded else None):
        model, info = resolve_model(options.target, options.args, empty=empty)
        filled = () if options.weights is None else load_weights(model, options.weights, options.weights_lenient)
        inputs, assumed = resolve_inputs(model, info, options.inputs) if need_inputs else ((), ())
    drawn = (RANDOM_WEIGHTS.format(seed=options.seed),) if options.weights is None and seeded else ()
    notes = (*info.notes, *filled, *assumed, *drawn)
    return LoadedModel(model, inputs, options.target, notes, None, recordable(options.target), dict(options.args))


def load_target(
    target: str,
    *,
    args: Mapping[str, object] | None = None,
    weights: Path | None = None,
    weights_lenient: bool = False,
    inputs: Sequence[str] = (),
    base: str | None = None,
    trust_target: bool = False,
    need_inputs: bool = True,
    empty: bool = False,
) -> LoadedModel:
    """What a target leads to, with random weights drawn from the caller's own random state.

    The last two arguments, what comes back and what is raised are as for `open_target`, the others as in
    `TargetOptions`.
    """
    opening = {"target": target, "args": args or {}, "weights": weights, "weights_lenient": weights_lenient}
    options = from_keywords(TargetOptions, {**opening, "inputs": inputs, "base": base, "trust_target": trust_target})
    return open_target(options, empty=empty, need_inputs=need_inputs, seeded=False)


@plain_modes()
def load(folder: str | Path, model: nn.Module | None = None, *, trust_target: bool = False) -> nn.Module:
    """The rewritten model, with the saved weights and in eval mode, from a folder that `pwrewrite.save` wrote.

    Args:
        folder: The folder.
        model: The original model, with any weights; stays as it is.
        trust_target: Whether, without ``model``, the target recorded in the plan may be imported. That runs its code.

    Raises:
        TargetError: If it is no such folder, or neither a model nor trust was given.
        PlanError: If the plan does not fit the model.
        WeightsError: If the saved weights are damaged or do not fit.
    """
    plan = storage.read_plan(folder)
    if model is not None:
        check_model(model)
        return storage.restore(folder, _with_shapes(model, plan))
    return load_target(str(folder), trust_target=trust_target, need_inputs=False).model


def recordable(target: str) -> str:
    """A target as a plan records it: a file with its absolute path, anything else as it is."""
    info = parse_target(target)
    if info.kind != "file":
        return target
    path = str(Path(info.place).resolve())
    return path if info.name is None else f"{path}:{info.name}"


def _open_folder(options: TargetOptions, need_inputs: bool, seeded: bool) -> LoadedModel:
    folder = options.target
    if options.weights is not None:
        got = f"--weights {options.weights}"
        raise UsageError("a saved folder holds its own weights", got=got, hint="leave --weights out")
    plan = storage.read_plan(folder)
    origin = options.base if options.base is not None else _recorded_target(folder, plan, options.trust_target)
    if storage.is_saved(origin):
        expected = "the target of the original model"
        hint = "a folder's plan leads from the original to it, over every rewrite in between"
        raise UsageError("--model is itself a saved folder", got=origin, expected=expected, hint=hint)
    args = dict(options.args or plan.model.get("args") or {})
    with _seeded(options.seed if seeded else None):
        original, info = resolve_model(origin, args)
    original = _with_shapes(original, plan)
    model = storage.restore(folder, original)
    if options.inputs:
        inputs, notes = resolve_inputs(model, None, options.inputs)
    else:
        inputs, notes = _inputs(original, info, plan) if need_inputs else ((), ())
    names = storage.read_names(folder)
    return LoadedModel(model, inputs, folder, (*info.notes, *notes), plan, recordable(origin), args, names)


def _recorded_target(folder: str, plan: Plan, trusted: bool) -> str:
    """The target of the original model that a folder's plan names, if that may be imported."""
    target = plan.model.get("target")
    if not trusted:
        message = "a saved folder holds weights and a plan, not the model's code"
        expected = "the original model, as load(folder, model) or --model TARGET"
        hint = f"its target was {target!r}; --trust-target (trust_target=True) imports that, which runs its code"
        raise TargetError(message, where=folder, expected=expected, hint=hint)
    if not isinstance(target, str):
        raise TargetError("the plan records no target", where=folder, hint="give the model: load(folder, model)")
    return target


def _inputs(original: nn.Module, info: TargetInfo, plan: Plan) -> tuple[ExampleInputs, tuple[str, ...]]:
    """The original's own inputs where they are of the recorded shapes; else inputs of these shapes."""
    recorded: list[dict[str, object]] = plan.model.get("inputs") or []
    try:
        own, notes = resolve_inputs(original, info)
        shapes = [[(item["shape"], item["dtype"]) for item in items] for items in (describe_inputs(own), recorded)]
        if not recorded or shapes[0] == shapes[1]:
            return own, notes
    except InputError:
        if not recorded:
            raise
    return _recorded_inputs(original, plan)


def _recorded_inputs(model: nn.Module, plan: Plan) -> tuple[ExampleInputs, tuple[str, ...]]:
    items = plan.model.get("inputs") or []
    names = [f"{item['name']}=" if item.get("name") else "" for item in items]
    shapes = [f"{'x'.join(map(str, item['shape']))}:{item['dtype']}" for item in items]
    return resolve_inputs(model, None, list(map(add, names, shapes)))


def _with_shapes(original: nn.Module, plan: Plan) -> nn.Module:
    """The original model; a copy, run on inputs of the recorded shapes, where it has lazy modules."""
    if not has_lazy_modules(original):
        return original
    return materialized(original, *split_inputs(_recorded_inputs(original, plan)[0]))


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """With torch's (CPU) and Python's random states at a seed; puts them back."""
    if seed is None:
        yield
        return
    check_seed(seed)
    with keeping_random_state():
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        yield
