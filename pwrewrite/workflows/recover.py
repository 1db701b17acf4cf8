"""Training a rewritten model to its original: `recover`, and `trained` for what was planned under a budget."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..capturing import Inputs, capture
from ..capturing.inputs import tensors_for
from ..core.declaring import flag_of, from_keywords, refuse_unknown
from ..core.errors import UsageError, first_line
from ..core.modes import plain_modes
from ..core.nested import Tree, map_tensors
from ..core.options import Budget, RecoverOptions
from ..core.random_state import check_seed
from ..core.records import Shown
from ..core.recovery import Recovery
from ..edit.swap import copy_of
from ..planning.batch_inputs import is_array
from ..planning.batches import Batches, stable
from ..planning.fitting import Fit
from ..planning.outputs import Measured, kind_of_outputs
from ..planning.planner import Planner
from ..planning.recovery import Recoverer
from ..planning.room import samples_in_run
from ..planning.running import Chunk, device_of, evaluating, run_seeded
from ..targets.arrays import LABEL_NAMES
from .steps import Progress, silent


@dataclass(frozen=True, repr=False)
class Recovered(Shown):
    """The result of `recover`.

    Attributes:
        model: The trained copy.
        report: How it was trained, and the held-out loss before and after.
        measured: How far it is from the original on held-out inputs.
        notes: What a reader should know.
    """

    model: nn.Module
    report: Recovery
    measured: Measured
    notes: tuple[str, ...] = ()


@plain_modes()
def recover(
    original: nn.Module,
    rewritten: nn.Module,
    batches: Iterable[Tree],
    time: str = "3epochs",
    *,
    example_inputs: Inputs | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Recovered:
    """Trains a rewritten model to its original, which is the teacher: no labels are needed.

    One in five of the inputs is held out, and decides which state is kept; the one before counts too, so that the
    result is never worse by its loss there. Under ``torchrun`` all processes train together.

    Args:
        original: The model that was rewritten; stays as it is.
        rewritten: What became of it; stays as it is, too.
        batches: Inputs: any iterable of batches, of inputs alone or of ``(inputs, labels)``.
        time: How long: ``5m``, ``90s``, or ``3epochs``, which gives the same result every time.
        example_inputs: What the models take; told from the first batch and the original's ``forward`` where None.
        progress: Called at each step with what is being done and how much of it is done.
        **options: Fields of `pwrewrite.core.options.RecoverOptions`: ``recover_batch``, ``recover_rate``,
            ``recover_device``, ``augment``; and of `pwrewrite.Budget`: ``outputs``, ``batch``, ``calibration_size``,
            ``seed``.

    Returns:
        The trained copy, in the training mode of ``rewritten``, and how it went.

    Raises:
        UsageError: If there is no batch, one holds NaN, an option makes no sense, the time is too short for a step, or
            the rewritten model does not take the original's inputs.
        RefusedError: If memory runs out, or there is nothing to train.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    >>> smaller = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)).eval()
    >>> result = recover(model, smaller, torch.randn(64, 1, 8, 8).split(8), "20epochs")
    >>> result.report.after < result.report.before
    True
    """
    if "recover" in options:
        raise UsageError("the time is given twice", hint="leave recover= out: here it is called time")
    names = ("outputs", "batch", "calibration_size", "seed")
    budget = from_keywords(Budget, {name: options.pop(name) for name in names if name in options})
    chosen = from_keywords(
        RecoverOptions, {"recover": str(time) if isinstance(time, (int, float)) else time, **options}
    )
    refuse_unknown("recover", {k: v for k, v in options.items() if k not in vars(chosen)}, RecoverOptions)
    check_seed(budget.seed)
    own, source = budget.batch, stable(batches, 32)
    if isinstance(own, str):
        raise UsageError(f"batch={own!r} is a name", hint="give the function itself")
    inputs = tensors_for(_inputs_of(original, source, own) if example_inputs is None else example_inputs)
    chunk = samples_in_run(capture(original, inputs))
    read = Batches(source, inputs, size=budget.calibration_size, chunk=chunk, batch=own)
    first, labels = read.first()
    with torch.no_grad(), evaluating(original):
        outputs = budget.outputs or kind_of_outputs(run_seeded(original, first, budget.seed), labels)
    _check_runs(rewritten, first, budget.seed)
    model, say = copy_of(rewritten), progress or silent
    recoverer = Recoverer(original, read, chosen, outputs, seed=budget.seed, say=say)
    report, measured = recoverer.train(model)
    return Recovered(model, report, measured, tuple(dict.fromkeys((*read.notes, *recoverer.notes))))


def trained(planner: Planner, rewritten: nn.Module, fit: Fit) -> tuple[Fit, Recovery | None]:
    """Trains a fitted model where the budget says so, in place; how far it is from the original then."""
    settings = planner.settings
    if settings.recover is None or planner.batches is None:
        return fit, None
    recoverer = Recoverer(
        planner.model, planner.batches, settings, planner.outputs, seed=settings.seed, say=planner.say
    )
    report, measured = recoverer.train(rewritten)
    planner.notes += recoverer.notes
    return replace(fit, held_out=measured), report


def check_recovery(budget: Budget) -> None:
    """Refuses options that say nothing without ``recover``, and recovery without inputs."""
    for name in RecoverOptions.__dataclass_fields__:
        if getattr(budget, name) is not None and budget.recover is None:
            raise UsageError(f"{flag_of(Budget, name)} goes with --recover")
    if budget.recover is not None and budget.calibration is None:
        raise UsageError("--recover goes with --calibration: there is nothing to train on")


def _check_runs(rewritten: nn.Module, inputs: Chunk, seed: int) -> None:
    """Raises `UsageError` for a model that does not run on the original's inputs."""
    device = device_of(rewritten)
    try:
        with torch.no_grad(), evaluating(rewritten):
            run_seeded(rewritten, map_tensors(inputs, lambda tensor: tensor.to(device)), seed)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UsageError(
            "the rewritten model does not run on inputs that the original takes",
            expected="a model that was made from the original",
            got=first_line(error),
        ) from error


def _inputs_of(model: nn.Module, source: Iterable[object], own: Callable[..., object] | None) -> Inputs:
    """The inputs in the first batch: as many as the model's forward needs, at least one; by name from a dict."""
    try:
        batch: Any = next(iter(source), None)
        batch = batch if own is None or batch is None else own(batch)
    except Exception as error:
        raise UsageError("batch 0 of the inputs cannot be read", got=first_line(error)) from error
    parameters = inspect.signature(model.forward).parameters
    if batch is None:
        raise UsageError("the inputs are empty", hint="an iterator that was gone through gives nothing more")
    inner = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(inner, Mapping) and (named := {name: inner[name] for name in inner if name in parameters}):
        return _tensors(named)
    if isinstance(batch, Mapping):  # the one input of a model that takes a dict
        return (_tensors({name: value for name, value in batch.items() if name not in LABEL_NAMES}),)
    if not isinstance(batch, (tuple, list)):
        return (torch.as_tensor(batch),)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters.values())
    taken = batch[: max(1, needed)]
    return tuple(_tensors(each) if isinstance(each, Mapping) else torch.as_tensor(each) for each in taken)


def _tensors(named: Mapping[str, Tree]) -> dict[str, Tree]:
    """Arrays as tensors, by name."""
    return {name: torch.as_tensor(value) if is_array(value) else value for name, value in named.items()}
