"""Fusing what a person types: `fuse_target`, and the latency before, after and frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..capturing import Inputs, split_inputs
from ..core.copies import deep_copy
from ..core.errors import InputError, RefusedError
from ..engines.frozen import Frozen, freeze
from ..engines.timing import time_in_turns
from ..layers.partitions import CALLS
from ..passes import Pass
from ..report.records import FusingReport
from ..targets import TargetOptions, open_target
from .fuse import Fused, drawn_inputs, fuse
from .steps import Progress, join_names
from .subject import plan_from_original, with_notes_of

_SECONDS = 4.0


def fuse_target(
    request: TargetOptions,
    passes: Sequence[Pass | str] | None = None,
    *,
    keep_nan: bool | None = None,
    verify: bool = True,
    benchmark: bool = False,
    progress: Progress | None = None,
) -> Fused:
    """Fuses what a target leads to, in evaluation mode.

    Args:
        request: The target.
        passes: What is done; by default all of `pwrewrite.workflows.fuse.DEFAULT`.
        keep_nan: As for `pwrewrite.fuse`.
        verify: Whether to verify the result.
        benchmark: Whether to measure the latency before, after and frozen.
        progress: Called at each step.

    Returns:
        The result, with what was measured in ``report.fusing``; its plan leads from the original model, over an earlier
        rewrite where the target is a folder.

    Raises:
        RefusedError: If there is nothing to fuse.
        PwrewriteError: If the target does not lead to a model.
    """
    if progress is not None:
        progress("loading", None)
    opened = open_target(request)
    model, inputs = opened.model.eval(), opened.example_inputs
    result = fuse(model, inputs, passes, keep_nan=keep_nan, verify=verify, target=request.target, progress=progress)
    if not result.edits:
        raise RefusedError("there is nothing to fuse", where=request.target)
    seconds: list[float] = []
    reason = ""
    if benchmark:
        if progress is not None:
            progress("measuring", None)
        models = [model, result.model]
        try:
            models.append(freeze(result.model, drawn_inputs(inputs)))
        except (RefusedError, InputError) as error:
            reason = error.got or error.message
        seconds = latencies(models, inputs)
    before, after, frozen = (*seconds, None, None, None)[:3]
    fusing = FusingReport(result.before, result.after, before, after, frozen, reason)
    return replace(
        result,
        plan=plan_from_original(opened, result.plan),
        report=replace(with_notes_of(opened, result.report), fusing=fusing),
        names=join_names(opened.names, result.names),
    )


def latencies(models: Sequence[nn.Module], inputs: Inputs) -> list[float]:
    """Median seconds of models, run in turns, without gradients.

    Args:
        models: The models.
        inputs: Example inputs.

    Raises:
        RefusedError: If the models have no values.
    """
    models = [model if isinstance(model, Frozen) else deep_copy(model) for model in models]
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    if any(t.is_meta for t in tensors):
        raise RefusedError("a model without weights cannot be measured", hint="give weights, or leave --benchmark out")
    args, kwargs = split_inputs(drawn_inputs(inputs))
    runs = [partial(model, *args, **kwargs) for model in models]
    with torch.no_grad():
        for run in runs:
            for _ in range(CALLS):  # after which fused layers are as fast as they get
                run()
        device = tensors[0].device if tensors else torch.device("cpu")
        timings = time_in_turns(runs, device, turns=(3, 1000), seconds=_SECONDS)
    return [timing.seconds for timing in timings]
