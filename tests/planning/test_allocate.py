"""The knapsack's answer is the best one, stays within its limits, and the frontier is monotone."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwrewrite.planning.allocate import Infeasible, Option, allocate, frontier

KINDS = ("macs", "params")
losses = st.one_of(st.just(0.0), st.floats(1e-6, 1e3))
options = st.builds(
    lambda loss, macs, params: Option(loss, {"macs": float(macs), "params": float(params)}),
    losses,
    st.integers(0, 1000),
    st.integers(0, 1000),
)
problems = st.lists(st.lists(options, min_size=1, max_size=5), min_size=1, max_size=4)


def brute_force(groups: list[list[Option]], limits: dict[str, float]) -> float | None:
    best = None
    for picked in itertools.product(*groups):
        if all(sum(o.costs[k] for o in picked) <= limit for k, limit in limits.items()):
            loss = sum(o.loss for o in picked)
            best = loss if best is None else min(best, loss)
    return best


@settings(max_examples=120, deadline=None)
@given(problems, st.lists(st.floats(0, 1.2), min_size=1, max_size=2))
def test_it_equals_brute_force(groups: list[list[Option]], shares: list[float]) -> None:
    limits = {
        kind: share * sum(max(o.costs[kind] for o in group) for group in groups) for kind, share in zip(KINDS, shares)
    }
    best = brute_force(groups, limits)
    if best is None:
        with pytest.raises(Infeasible):
            allocate(groups, limits)
        return
    found = allocate(groups, limits, gap=1e-9)
    assert found.loss == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert found.gap <= 1e-6
    for kind, limit in limits.items():
        total = sum(Fraction(group[i].costs[kind]) for group, i in zip(groups, found.chosen))
        assert total <= Fraction(limit)
        assert found.costs[kind] == float(total)


@settings(max_examples=40, deadline=None)
@given(problems)
def test_the_frontier_is_monotone(groups: list[list[Option]]) -> None:
    found = frontier(groups, "macs", points=7)
    assert found
    for dearer, cheaper in itertools.pairwise(found):
        assert cheaper.costs["macs"] < dearer.costs["macs"]
        assert cheaper.loss > dearer.loss
    assert found[0].loss == pytest.approx(sum(min(o.loss for o in group) for group in groups))
    least = sum(min(o.costs["macs"] for o in group) for group in groups)
    assert found[-1].costs["macs"] <= least * (1 + 1e-9)


def test_a_limit_that_allows_everything_changes_nothing() -> None:
    keep, same = Option(0.0, {"macs": 10.0}), Option(0.0, {"macs": 5.0})
    found = allocate([[keep, same, Option(1.0, {"macs": 1.0})]] * 3, {"macs": 30.0})
    assert found.chosen == (0, 0, 0)
    assert found.gap == 0


def test_what_cannot_be_met_is_told_with_the_smallest() -> None:
    groups = [[Option(0.0, {"macs": 10.0, "params": 1.0}), Option(1.0, {"macs": 4.0, "params": 9.0})]] * 2
    with pytest.raises(Infeasible) as caught:
        allocate(groups, {"macs": 7.0})
    assert (caught.value.kind, caught.value.smallest) == ("macs", 8.0)
    with pytest.raises(Infeasible) as caught:
        allocate(groups, {"macs": 10.0, "params": 4.0})
    assert caught.value.kind is None


def test_no_groups_and_single_options() -> None:
    assert allocate([], {"macs": 0.0}).chosen == ()
    assert allocate([[Option(2.0, {"macs": 3.0})]], {"macs": 3.0}).loss == 2.0


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_scales_do_not_matter(scale: float) -> None:
    groups = [[Option(scale * loss * (i + 1), {"macs": 1e13 / (1 + loss) + i}) for loss in range(8)] for i in range(20)]
    limit = 0.4 * sum(group[0].costs["macs"] for group in groups)
    found = allocate(groups, {"macs": limit})
    again = allocate(groups, {"macs": limit})
    assert found == again
    assert found.costs["macs"] <= limit
    assert 0 < found.loss < math.inf
    assert found.gap <= 1e-3


def test_a_thousand_layers() -> None:
    groups = [
        [
            Option((1 + i % 7) * (1 - r / 40) ** 2 * 1e-3, {"macs": 1e6 * (1 + i % 11) * r / 40})
            for r in range(40, 0, -1)
        ]
        for i in range(1000)
    ]
    limit = 0.5 * sum(group[0].costs["macs"] for group in groups)
    found = allocate(groups, {"macs": limit})
    assert found.costs["macs"] <= limit
    assert found.gap <= 1e-3
