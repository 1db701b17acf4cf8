"""Runs that are timed take turns, the hopeless are given up, and the spread says how far to trust the median."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import pytest
import torch

from pwrewrite.engines import timing
from pwrewrite.engines.timing import device_name, time_in_turns, with_threads


def test_runs_take_turns() -> None:
    order: list[str] = []

    def run(name: str) -> Callable[[], object]:
        return lambda: (order.append(name), time.sleep(0.003))

    found = time_in_turns([run("a"), run("b"), run("c")], torch.device("cpu"), turns=(3, 3))
    assert order[6:] == ["a", "b", "c"] * 3
    assert all(math.isfinite(timing.seconds) for timing in found)


def test_much_slower_ones_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, now = {"fast": 0, "slow": 0}, 0.0

    def run(name: str, seconds: float) -> Callable[[], object]:
        def once() -> None:
            nonlocal now
            counts[name] += 1
            now += seconds

        return once

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    fast, slow = time_in_turns([run("fast", 0.003), run("slow", 0.02)], torch.device("cpu"), turns=(6, 6), drop=True)
    assert counts == {"fast": 8, "slow": 4}  # two before the turns
    assert slow.seconds > 2 * fast.seconds


def test_the_spread_is_that_of_the_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.cycle([1.0, 2.0, 1.0, 4.0, 1.0, 3.0])
    monkeypatch.setattr(timing, "_once", lambda run, repeats, device: next(ticks))
    first, second = time_in_turns([list, list], torch.device("cpu"), turns=(3, 3), seconds=0)
    assert (first.seconds, first.spread) == (1, 0)
    assert (second.seconds, second.spread) == (3, pytest.approx(1 / 6))


def test_short_runs_are_told_apart_where_a_scheduler_takes_the_core_away(monkeypatch: pytest.MonkeyPatch) -> None:
    slice_, away, now = 2.5e-3, 10e-3, 0.0  # of every 12.5 ms, this process has the first 2.5

    def work(seconds: float) -> Callable[[], object]:
        def once() -> None:
            nonlocal now
            turn, used = divmod(now, slice_ + away)
            now = turn * (slice_ + away) + used + seconds
            now += away if used + seconds >= slice_ else 0.0

        return once

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    whole, half = time_in_turns([work(3.1e-4), work(1.6e-4)], torch.device("cpu"))
    assert half.seconds / whole.seconds == pytest.approx(1.6 / 3.1, rel=0.02)
    assert whole.seconds == pytest.approx(3.1e-4, rel=0.02)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with with_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with with_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
    assert device_name(torch.device("cpu"))
