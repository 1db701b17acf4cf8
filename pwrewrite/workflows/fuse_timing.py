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
from ..engines.choosing import time_everywhere
from ..engines.engine import engine_named
from ..engines.frozen import Frozen, freeze
from ..engines.timing import time_in_turns
from ..layers.partitions import CALLS
from ..report.records import FusingReport
from ..targets import LoadedModel
from .fuse import Fused, drawn_inputs

_SECONDS = 4.0


def with_latency(result: Fused, loaded: LoadedModel, engine: str | None = None) -> Fused:
    """A result with what its model takes before (``loaded``), after and frozen in ``report.fusing``; with the name of
    an ``engine`` or ``auto``, before and after in it, and beside it in all others.

    Raises `UsageError` if the engine is unknown or not installed, `RefusedError` if the models have no values or do not
    run in it.
    """
    if engine is not None:
        return _in_engine(result, loaded, engine)
    models, reason = [loaded.model, result.model], ""
    try:
        models.append(freeze(result.model, drawn_inputs(loaded.example_inputs)))
    except (RefusedError, InputError) as error:
        reason = error.got or error.message
    before, after, frozen = (*latencies(models, loaded.example_inputs), None)[:3]
    fusing = FusingReport(result.before, result.after, before, after, frozen, reason)
    return replace(result, report=replace(result.report, fusing=fusing))


def _in_engine(result: Fused, loaded: LoadedModel, engine: str) -> Fused:
    if engine != "auto":
        engine_named(engine).require()
    args, kwargs = split_inputs(drawn_inputs(loaded.example_inputs))
    times = time_everywhere([loaded.model, result.model], args, kwargs)
    name = times.fastest if engine == "auto" and times.times else engine
    others = times.seconds
    if name not in others:
        raise RefusedError(f"the models cannot be measured in {name}", got="; ".join(times.notes))
    before, after = others.pop(name)
    ran = str(times.ran[name])
    fusing = FusingReport(result.before, result.after, before, after, engine=ran, engines=others)
    notes = (*result.report.notes, *times.notes)
    return replace(result, report=replace(result.report, fusing=fusing, notes=notes))


def latencies(models: Sequence[nn.Module], inputs: Inputs) -> list[float]:
    """Median seconds of models, run in turns, without gradients; a `RefusedError` if they have no values."""
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
