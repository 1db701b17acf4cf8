"""How long things take: runs that take turns, so that what else the machine does hits all of them alike.

What counts is the median of the ratio to the first run in the same turn; half the distance between the quartiles of
these ratios, as a share, says how far to trust it. Within a turn a short run is repeated, since clocks are coarse, but
not for longer than a scheduler leaves a process alone: on a machine that five times as many processes want, medians of
many short turns stay within 5%, those of fewer long ones do not.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..core.nested import Args, Kwargs, tensors_of
from ..layers.partitions import CALLS
from .engine import Engine, Session, with_threads
from .torch_engine import PLAIN

NOISY = 0.1
"""From this spread on, times are noise more than anything else."""
_SLOWER = 1.15
"""A run that takes this many times as long as the first one in the first turns runs no more."""
_SECONDS = 4.0
"""How long models are timed where nothing else is said."""
_LEAST, _LEAST_ELSEWHERE = 2e-4, 2e-3
"""A timing lasts at least so many seconds, on a CPU and elsewhere; short runs are repeated within it."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a run takes."""

    seconds: float  # the median
    spread: float  # half the distance between the quartiles, as a share of the median


def time_in_turns(
    runs: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    turns: tuple[int, int] = (5, 400),
    seconds: float = 1.0,
    drop: bool = False,
    against: int = 0,
) -> list[Timing]:
    """Times several runs that take turns on a device, for about some seconds.

    ``turns`` is how many there are, at least and at most. With ``drop``, those much slower than the one numbered
    ``against`` are given up early.
    """
    least, repeats = _LEAST if device.type == "cpu" else _LEAST_ELSEWHERE, []
    for run in runs:
        run()  # lazy initialisation, code caches
        repeats.append(max(1, min(50, int(least / max(_once(run, 1, device), 1e-7)))))
    times: list[list[float]] = [[] for _ in runs]
    dropped: set[int] = set()
    start = time.perf_counter()
    for turn in range(turns[1]):
        if turn >= turns[0] and time.perf_counter() - start > seconds:
            break
        for i, run in enumerate(runs):
            if i not in dropped:
                times[i].append(_once(run, repeats[i], device))
        if drop and turn == 1:
            dropped = {i for i, own in enumerate(times) if i and min(own) > _SLOWER * max(times[against])}
    base = statistics.median(times[0])
    first = Timing(base, _spread([t / base for t in times[0]]))
    ratios = [[t / reference for t, reference in zip(own, times[0])] for own in times[1:]]
    return [first, *(Timing(base * statistics.median(own), _spread(own)) for own in ratios)]


def time_models(
    models: Sequence[nn.Module | Session],
    args: Args,
    kwargs: Kwargs,
    *,
    seconds: float | None = None,
    threads: int | None = None,
    engine: Engine = PLAIN,
) -> list[Timing]:
    """Times a forward of each of several models, or sessions of them, in evaluation, in turns of about ``seconds``."""
    sessions = [m if isinstance(m, Session) else engine.session(m, args, kwargs, threads) for m in models]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(with_threads(threads))
        for session in sessions:
            stack.enter_context(session.held())
        device = next((t.device for t in tensors_of((args, kwargs))), torch.device("cpu"))
        for session in sessions:
            for _ in range(CALLS):  # after which fused layers are as fast as they get
                session.run(*args, **kwargs)
        return time_in_turns(
            [partial(s.run, *args, **kwargs) for s in sessions],
            device,
            turns=(7, 600),
            seconds=_SECONDS if seconds is None else seconds,
        )


def _spread(ratios: Sequence[float]) -> float:
    if len(ratios) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(ratios, method="inclusive")
    return (high - low) / 2 / middle


def _once(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def device_name(device: torch.device) -> str:
    """Names a device for a person and for a cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
