"""How long things take: runs that take turns, so that what else the machine does hits all of them alike.

What counts is the median of the ratio to the first run in the same turn: a slow moment of the machine, or a clock that
steps down, lasts longer than a turn and leaves the ratio as it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from ..capturing.inventory import Inventory
from ..capturing.state import untouched

_SLOWER = 1.15
"""What takes this many times as long as the first in the first turns runs no more, where that is wanted."""
_LEAST = 2e-3
"""A timing lasts at least so many seconds; short runs are repeated within it."""


def interleaved(
    runs: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    rounds: tuple[int, int] = (5, 40),
    seconds: float = 1.0,
    drop: bool = True,
) -> list[float]:
    """Median seconds of several runs that take turns: of the first, and of the ratios to it in the same turn.

    Args:
        runs: What to time.
        device: Where they run; waited for.
        rounds: How many turns, at least and at most.
        seconds: Stop between the two after about so long.
        drop: Whether those much slower than the first are given up early.
    """
    repeats = []
    for run in runs:
        run()  # lazy initialisation, code caches
        repeats.append(max(1, min(50, int(_LEAST / max(_once(run, 1, device), 1e-7)))))
    times: list[list[float]] = [[] for _ in runs]
    dropped: set[int] = set()
    start = time.perf_counter()
    for turn in range(rounds[1]):
        if turn >= rounds[0] and time.perf_counter() - start > seconds:
            break
        for i, run in enumerate(runs):
            if i not in dropped:
                times[i].append(_once(run, repeats[i], device))
        if drop and turn == 1:
            dropped = {i for i, taken in enumerate(times) if min(taken) > _SLOWER * max(times[0])}
    base = statistics.median(times[0])
    return [base * statistics.median(t / first for t, first in zip(taken, times[0])) for taken in times]


def time_models(
    models: Sequence[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, seconds: float = 4.0
) -> list[float]:
    """Median seconds of a forward of each of several models, in turns, in eval mode, without gradients.

    Args:
        models: The models; afterwards they are as they were.
        args: Positional inputs.
        kwargs: Keyword inputs.
        seconds: About how long this takes.
    """
    device = next((p.device for p in models[0].parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in models:
            stack.enter_context(untouched(Inventory(model), values=True))
            model.eval()
        runs = [partial(model, *args, **kwargs) for model in models]
        return interleaved(runs, device, rounds=(7, 60), seconds=seconds, drop=False)


def _once(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats
