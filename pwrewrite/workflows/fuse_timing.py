"""What a fused model takes before, after and frozen: `with_latency`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..capturing import Inputs, split_inputs
from ..core.errors import InputError, RefusedError
from ..core.nested import deep_copy
from ..engines.frozen import Frozen, freeze
from ..engines.timing import time_in_turns
from ..layers.partitions import CALLS
from ..report.records import FusingReport
from ..targets import LoadedModel
from .fuse import Fused, drawn_inputs

_SECONDS = 4.0


def with_latency(result: Fused, loaded: LoadedModel) -> Fused:
    """A result with what its model takes before, after and frozen in ``report.fusing``.

    Args:
        result: What `fuse` made.
        loaded: The model before, with its example inputs.

    Raises:
        RefusedError: If the models have no values.
    """
    models, reason = [loaded.model, result.model], ""
    try:
        models.append(freeze(result.model, drawn_inputs(loaded.example_inputs)))
    except (RefusedError, InputError) as error:
        reason = error.got or error.message
    before, after, frozen = (*latencies(models, loaded.example_inputs), None)[:3]
    fusing = FusingReport(result.before, result.after, before, after, frozen, reason)
    return replace(result, report=replace(result.report, fusing=fusing))


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
