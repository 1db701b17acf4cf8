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


def test_much_slower_ones_are_given_up() -> None:
    counts = {"fast": 0, "slow": 0}

    def run(name: str, seconds: float) -> Callable[[], object]:
        def once() -> None:
            counts[name] += 1
            time.sleep(seconds)

        return once

    fast, slow = time_in_turns([run("fast", 0.003), run("slow", 0.02)], torch.device("cpu"), turns=(6, 6), drop=True)
    assert counts["slow"] < counts["fast"]
    assert slow.seconds > 2 * fast.seconds


def test_the_spread_is_that_of_the_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.cycle([1.0, 2.0, 1.0, 4.0, 1.0, 3.0])
    monkeypatch.setattr(timing, "_once", lambda run, repeats, device: next(ticks))
    first, second = time_in_turns([list, list], torch.device("cpu"), turns=(3, 3), seconds=0)
    assert (first.seconds, first.spread) == (1, 0)
    assert (second.seconds, second.spread) == (3, pytest.approx(1 / 6))


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with with_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with with_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
    assert device_name(torch.device("cpu"))
