"""Opening any target, saved folders included: `open_target`.

A folder that `pwrewrite.targets.storage.save` wrote is a target too, so rewrites compose: it is opened as the rewritten
model, together with the plan that leads to it from the original. The original comes from ``--model``, or from the
target that the plan records when the user says that it is trusted.

What a plan records. A file is recorded with its absolute path, so that the folder can be opened from any working
directory (of this machine; elsewhere the caller gives the model, as one who does not trust the folder would anyway).
Names of modules and of the zoos are recorded as they are. Inputs are recorded as shapes and dtypes.

Random weights. What a constructor draws is drawn after a seed, so that a model without a checkpoint is the same model
in every run. The caller's own random state stays as it is.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import InputError, PlanError, UsageError
from ..core.plan import Plan
from . import LoadedModel, TargetInfo, describe_inputs, load_target, parse_target, resolve_inputs, resolve_model
from .inputs import ExampleInputs
from .storage import PLAN, is_saved, load, read_plan

RANDOM_WEIGHTS = (
    "no --weights: the weights are those that the model's code makes (seed {seed}). Errors of random weights are "
    "larger than those of trained ones, and predictions say nothing"
)


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be captured, and where it came from.

    Attributes:
        loaded: The model with its example inputs and notes.
        plan: From the original model to this one; None where this is the original.
        origin: The target of the original model, as a plan should record it.
        args: What the original's constructor was given.
        names: Name of a parameter of the original to those that came in its place; empty where this is the original.
    """

    loaded: LoadedModel
    plan: Plan | None
    origin: str
    args: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.loaded.model


def open_target(
    target: str,
    *,
    args: Mapping[str, Any] | None = None,
    weights: Path | None = None,
    weights_lenient: bool = False,
    inputs: Sequence[str] = (),
    base: str | None = None,
    trust_target: bool = False,
    seed: int = 0,
) -> Opened:
    """Opens a target, a saved folder included.

    Args:
        target: As for `pwrewrite.targets.load_target`, or a saved folder.
        args: Arguments of what makes the (original) model.
        weights: A checkpoint; not for a folder, which holds its own.
        weights_lenient: Accept a checkpoint that fits in part.
        inputs: Example inputs as text.
        base: For a folder: the target of the original model.
        trust_target: For a folder: whether the recorded target may be imported.
        seed: What the random state is set to before the model is made.

    Raises:
        PwrewriteError: If the target does not lead to a model.
    """
    if is_saved(target):
        if weights is not None:
            raise UsageError(
                "a saved folder holds its own weights", got=f"--weights {weights}", hint="leave --weights out"
            )
        return _open_folder(target, args, inputs, base, trust_target, seed)
    if base is not None:
        raise UsageError(
            "--model is for a saved folder: the model that it was rewritten from",
            got=f"{target}, which is none",
            hint="leave --model out",
        )
    with _seeded(seed):
        loaded = load_target(target, args=args, weights=weights, weights_lenient=weights_lenient, inputs=inputs)
    notes = loaded.notes if weights is not None else (*loaded.notes, RANDOM_WEIGHTS.format(seed=seed))
    loaded = LoadedModel(loaded.model, loaded.example_inputs, target, notes)
    return Opened(loaded, None, recordable(target), dict(args or {}))


def recordable(target: str) -> str:
    """A target as a plan records it: a file with its absolute path, anything else as it is."""
    found = parse_target(target)
    if found.kind != "file":
        return target
    path = str(Path(found.place).resolve())
    return path if found.name is None else f"{path}:{found.name}"


def class_name(model: nn.Module) -> str:
    """A model's class; under the name of the user's file, where that was imported under a name that is ours."""
    kind = type(model)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    ours = file is not None and kind.__module__.startswith("pwrewrite_target_")
    return f"{Path(str(file)).stem if ours else kind.__module__}.{kind.__qualname__}"


def _open_folder(
    folder: str, args: Mapping[str, Any] | None, inputs: Sequence[str], base: str | None, trust: bool, seed: int
) -> Opened:
    plan = read_plan(folder)
    recorded = plan.model.get("target")
    origin = base
    if origin is None and trust and isinstance(recorded, str):
        origin = recorded
    if origin is None:
        load(folder, None, trust_target=trust)  # which says what is missing
        raise AssertionError("a folder was opened without a model")
    if is_saved(origin):
        raise UsageError(
            "--model is itself a saved folder",
            got=origin,
            expected="the target of the original model",
            hint="a folder's plan leads from the original to it, over every rewrite in between",
        )
    made_with = dict(args if args else plan.model.get("args") or {})
    with _seeded(seed):
        original, info = resolve_model(origin, made_with)
    model = load(folder, original)
    example, notes = resolve_inputs(model, None, inputs) if inputs else _inputs(original, info, plan)
    loaded = LoadedModel(model, example, folder, (*info.notes, *notes))
    return Opened(loaded, plan, recordable(origin), made_with, _names(folder))


def _inputs(original: nn.Module, info: TargetInfo, plan: Plan) -> tuple[ExampleInputs, tuple[str, ...]]:
    """The original's own inputs where they are of the recorded shapes; else inputs of these shapes."""
    recorded = plan.model.get("inputs") or []
    try:
        own, notes = resolve_inputs(original, info)
        if not recorded or _facts(describe_inputs(own)) == _facts(recorded):
            return own, notes
    except InputError:
        if not recorded:
            raise
    try:
        texts = [_spec(item) for item in recorded]
    except (KeyError, TypeError) as error:
        raise PlanError(
            "the plan's inputs are not shapes", where="model.inputs", expected="shape and dtype", got=repr(error)
        ) from None
    return resolve_inputs(original, None, texts)


def _facts(described: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    return [(item.get("shape"), item.get("dtype")) for item in described]


def _spec(item: Mapping[str, Any]) -> str:
    name = f"{item['name']}=" if "name" in item else ""
    return f"{name}{'x'.join(map(str, item['shape']))}:{item['dtype']}"


def _names(folder: str) -> dict[str, tuple[str, ...]]:
    """The folder's map from the original's parameter names to its own."""
    try:
        data = json.loads((Path(folder) / PLAN).read_text(encoding="utf-8"))
        return {str(old): tuple(map(str, new)) for old, new in (data.get("names") or {}).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PlanError("the map of names cannot be read", where=f"{folder}/{PLAN}", got=repr(error)) from None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """With torch's (CPU) and Python's random states at a seed; puts them back."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)
