"""Budgets: what a person types, what Python gives, and what is refused."""

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pwrewrite.core.errors import UsageError
from pwrewrite.planning.budget import Kind, Limit, budgets_of

READ = {
    "macs=0.5": ("macs", 0.5, True),
    "macs=50%": ("macs", 0.5, True),
    " MACs = 33 % ": ("macs", 0.33, True),
    "macs=1": ("macs", 1.0, True),
    "macs=100%": ("macs", 1.0, True),
    "params=12M": ("params", 12e6, False),
    "params=12m": ("params", 12e6, False),
    "params=1.5B": ("params", 1.5e9, False),
    "params=12,345,678": ("params", 12_345_678, False),
    "params=12_345_678": ("params", 12_345_678, False),
    "macs=2.1G": ("macs", 2.1e9, False),
    "macs=1e6": ("macs", 1e6, False),
    "macs=64": ("macs", 64, False),
    "flops=8G": ("macs", 4e9, False),
    "flops=0.5": ("macs", 0.5, True),
    "latency=0.6": ("latency", 0.6, True),
    "latency=8ms": ("latency", 0.008, False),
    "latency=1.5s": ("latency", 1.5, False),
    "latency=250 µs": ("latency", 250e-6, False),
    "latency=250μs": ("latency", 250e-6, False),
    "latency=250us": ("latency", 250e-6, False),
    "bytes=40MiB": ("bytes", 40 * 2**20, False),
    "bytes=40MB": ("bytes", 40e6, False),
    "bytes=512B": ("bytes", 512, False),
    "bytes=40000000": ("bytes", 40e6, False),
}


@pytest.mark.parametrize("text", READ)
def test_what_is_typed(text: str) -> None:
    kind, limit, relative = READ[text]
    (budget,) = budgets_of([text])
    assert (budget.kind, budget.relative) == (kind, relative)
    assert budget.limit == pytest.approx(limit, rel=1e-15)


def test_what_python_gives() -> None:
    given = {"macs": 0.5, "params": 12_000_000, "latency": "8ms", "bytes": 4e7}
    assert budgets_of(given) == (
        Limit("macs", 0.5, True),
        Limit("params", 12e6, False),
        Limit("latency", 0.008, False),
        Limit("bytes", 4e7, False),
    )
    assert budgets_of({"macs": np.float32(0.5), "params": np.int64(70)}) == (
        Limit("macs", 0.5, True),
        Limit("params", 70, False),
    )
    assert budgets_of({}) == budgets_of([]) == ()


def test_of_the_original() -> None:
    assert Limit("macs", 0.25, True).absolute(400) == 100
    assert Limit("params", 12.0, False).absolute(400) == 12


REFUSED = {
    "macs=1.5": "a ratio above 1",
    "macs=2.0": "a ratio above 1",
    "macs=150%": "a ratio above 1",
    "macs=0": "not above 0",
    "macs=-0.5": "not above 0",
    "params=-5M": "not above 0",
    "macs=0%": "not above 0",
    "macs=nan": "not a number",
    "macs=": "not a number",
    "macs=half": "not a number",
    "macs=0.5.5": "not a number",
    "params=12Q": r"unknown unit 'Q'",
    "macs=8ms": "ms is a unit of latency",
    "latency=12M": "M is a unit of macs",
    "latency=8": "latency=8ms",
    "latency=1.5": "latency=1.5ms",
    "mac=0.5": "did you mean macs",
    "parameters=0.5": "did you mean params",
    "colour=0.5": "expected: macs",
    "=0.5": "no budget of the kind ''",
    "0.5": "KIND=LIMIT",
    "params=0.0001k": "leaves nothing",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[text]) as caught:
        budgets_of([text])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 0, 1.5, True, None, [0.5], np.nan, "x"])
def test_what_python_may_not_give(value: object) -> None:
    with pytest.raises(UsageError):
        budgets_of({"macs": value})


def test_a_kind_is_limited_once() -> None:
    with pytest.raises(UsageError, match="macs more than once"):
        budgets_of(["macs=0.5", "params=0.5", "macs=0.4"])
    with pytest.raises(UsageError, match="flops are macs"):
        budgets_of(["macs=0.5", "flops=8G"])


WRITTEN = ["macs=0.5", "macs=2.1G", "params=12M", "params=12345678", "latency=8ms", "latency=1.5s", "latency=250us"]
WRITTEN += ["bytes=40MiB", "bytes=40MB", "bytes=512B", "latency=0.6", "macs=1"]


@pytest.mark.parametrize("text", WRITTEN)
def test_written_as_a_person_would(text: str) -> None:
    assert str(*budgets_of([text])) == text


@given(st.sampled_from(get_args(Kind)), st.floats(1e-9, 1.0) | st.integers(2, 10**15))
def test_what_is_written_is_read(kind: str, limit: float) -> None:
    relative = isinstance(limit, float)
    budget = Limit(kind, float(limit) if relative or kind != "latency" else limit / 1e9, relative)  # type: ignore[arg-type]
    assert budgets_of([str(budget)]) == (budget,)
