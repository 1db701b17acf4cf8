"""The knapsack's answer is the best one, stays within its limits, and the frontier is monotone."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

from pwrewrite.core.errors import RefusedError
from pwrewrite.planning import knapsack
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
    assert (caught.value.kind, caught.value.least) == ("macs", {"macs": 8.0})
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


@pytest.mark.parametrize("seed", range(40))
def test_losses_of_any_size_beside_each_other(seed: int) -> None:
    """What matters may be 18 orders of magnitude below what else there is to choose from."""
    draw = random.Random(seed)
    groups = [
        [
            Option(0.0, {"macs": 1000.0}),
            *(Option(10 ** draw.uniform(-12, 6), {"macs": float(draw.randint(0, 1000))}) for _ in range(4)),
        ]
        for _ in range(5)
    ]
    limits = {"macs": draw.uniform(0.3, 0.9) * 5000}
    best = brute_force(groups, limits)
    if best is None:
        with pytest.raises(Infeasible):
            allocate(groups, limits)
        return
    found = allocate(groups, limits)
    assert best * (1 - 1e-9) <= found.loss <= best * (1 + 2e-4)
    assert found.loss * (1 - found.gap) <= best * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_limits_within_the_tolerance_of_the_solver(seed: int) -> None:
    """A limit one below a total of 13 digits is a limit."""
    draw = random.Random(seed)
    groups = [
        [Option(10 ** draw.uniform(-3, 3), {kind: float(draw.randint(1, 10**13)) for kind in KINDS}) for _ in range(5)]
        for _ in range(5)
    ]
    aimed = [draw.choice(group) for group in groups]
    limits = {kind: sum(option.costs[kind] for option in aimed) - 1.0 for kind in KINDS}
    best = brute_force(groups, limits)
    if best is None:
        with pytest.raises(Infeasible):
            allocate(groups, limits)
        return
    found = allocate(groups, limits)
    assert found.loss <= best * (1 + 2e-4)
    assert all(found.costs[kind] <= limits[kind] for kind in KINDS)


def test_several_limits_on_many_layers() -> None:
    draw = random.Random(0)
    groups = []
    for _ in range(200):
        scale, macs, params = 10 ** draw.uniform(-12, 6), 10 ** draw.uniform(5, 10), 10 ** draw.uniform(2, 7)
        shares = [(draw.uniform(0.05, 1), draw.uniform(0.8, 1.2)) for _ in range(30)]
        groups.append(
            [
                Option(0.0, {"macs": macs, "params": params}),
                *(Option(scale * (1 / s - 0.99), {"macs": macs * s * t, "params": params * s / t}) for s, t in shares),
            ]
        )
    limits = {kind: 0.5 * sum(group[0].costs[kind] for group in groups) for kind in KINDS}
    found = allocate(groups, limits, gap=1e-3)
    assert found == allocate(groups, limits, gap=1e-3)
    assert found.gap <= 1e-3
    assert all(found.costs[kind] <= limits[kind] for kind in KINDS)
    looser = allocate(groups, {kind: 1.1 * limit for kind, limit in limits.items()}, gap=1e-3)
    assert looser.loss * (1 - looser.gap) <= found.loss


def test_limits_that_cannot_be_met_together_say_how_far_each_would_go() -> None:
    groups = [[Option(0.0, {"macs": 10.0, "params": 1.0}), Option(1.0, {"macs": 4.0, "params": 9.0})]] * 2
    with pytest.raises(Infeasible, match="together") as caught:
        allocate(groups, {"macs": 10.0, "params": 4.0})
    assert caught.value.least == {"macs": 20.0, "params": 18.0}
    assert "macs of at least 20, or params of at least 18" in str(caught.value)
    assert caught.value.exit_code == 1


def test_the_frontier_stays_within_other_limits_down_to_its_end() -> None:
    groups = [[Option(0.0, {"macs": 10.0, "params": 1.0}), Option(1.0, {"macs": 4.0, "params": 9.0})]] * 4
    found = frontier(groups, "macs", limits={"params": 20.0})
    assert [(one.loss, one.costs["macs"]) for one in found] == [(0.0, 40.0), (1.0, 34.0), (2.0, 28.0)]
    assert all(one.costs["params"] <= 20 for one in found)
    tight = [[Option(0.0, {"macs": 9.0, "params": 9.0}), Option(1.0, {"macs": 4.0, "params": 4.0})]] * 2
    assert [one.loss for one in frontier(tight, "macs", limits={"params": 14.0})] == [1.0, 2.0]
    with pytest.raises(Infeasible):
        frontier(tight, "macs", limits={"params": 7.0})


def test_no_limit_and_nothing_to_choose() -> None:
    groups = [[Option(0.0, {"macs": 5.0, "params": 3.0}), Option(2.0, {"macs": 1.0, "params": 3.0})]]
    assert allocate(groups, {"macs": math.inf, "params": 3.0}).chosen == (0,)
    assert allocate(groups, {"macs": 1.0, "params": math.inf}).chosen == (1,)
    assert allocate(groups, {}).chosen == (0,)
    same = [[Option(0.0, {"macs": 2.0}), Option(0.0, {"macs": 2.0})]] * 3
    assert allocate(same, {"macs": 6.0}).chosen == (0, 0, 0)
    assert frontier([], "macs")[0].chosen == ()
    assert [one.chosen for one in frontier(same, "macs")] == [(0, 0, 0)]
    never = [[Option(math.inf, {"macs": 1.0}), Option(3.0, {"macs": 2.0}), Option(0.0, {"macs": 9.0})]]
    assert allocate(never, {"macs": 2.0}).chosen == (1,)


def test_a_solver_that_finds_nothing_in_time_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "_solved", lambda *given: (None, False, None))
    crossed = [[Option(0.0, {"macs": 9.0, "params": 1.0}), Option(0.0, {"macs": 1.0, "params": 9.0})]] * 2
    with pytest.raises(RefusedError, match="no choice within the limits was found") as caught:
        allocate(crossed, {"macs": 11.0, "params": 11.0})
    assert not isinstance(caught.value, Infeasible)
    # With one limit there is always an answer, and what is not proven is said.
    one = [[Option(0.0, {"macs": 9.0}), Option(1.0, {"macs": 5.0}), Option(5.0, {"macs": 4.0})]] * 3
    found = allocate(one, {"macs": 18.0})
    assert found.costs["macs"] <= 18
    assert found.loss >= 3 >= found.loss * (1 - found.gap)


@st.composite
def claiming(draw: st.DrawFn) -> list[list[Option]]:
    """Groups of which every one can claim some of three things, or nothing."""
    groups = []
    for _ in range(draw(st.integers(1, 5))):
        claims = frozenset(draw(st.sets(st.sampled_from("abc"))))
        group = [replace(option, claims=claims) for option in draw(st.lists(options, max_size=3))]
        groups.append([draw(options), *group])
    return groups


@settings(max_examples=60, deadline=None)
@given(claiming(), st.floats(0, 1.1))
def test_what_claims_the_same_excludes_each_other(groups: list[list[Option]], share: float) -> None:
    limits = {"macs": share * sum(max(o.costs["macs"] for o in group) for group in groups)}
    best, least = None, math.inf
    for picked in itertools.product(*groups):
        claims = [claim for option in picked for claim in option.claims]
        macs = sum(option.costs["macs"] for option in picked)
        if len(claims) == len(set(claims)):
            least = min(least, macs)
            if macs <= limits["macs"]:
                loss = sum(option.loss for option in picked)
                best = loss if best is None else min(best, loss)
    if best is None:
        with pytest.raises(Infeasible) as caught:
            allocate(groups, limits)
        assert caught.value.kind == "macs"
        return
    found = allocate(groups, limits, gap=1e-9)
    claims = [claim for group, i in zip(groups, found.chosen) for claim in group[i].claims]
    assert len(claims) == len(set(claims))
    assert found.loss == pytest.approx(best, rel=1e-6, abs=1e-9)
    points = frontier(groups, "macs", points=4)
    assert points[-1].costs["macs"] <= least * (1 + 1e-9)


def test_many_units_over_many_layers() -> None:
    """A hundred layers, and a unit over every three of them: within seconds, and a gap that is small."""
    draw = random.Random(0)
    groups = []
    for i in range(99):
        scale = draw.uniform(0.1, 10)
        widths = [w / 20 for w in range(1, 20)]
        lossy = [Option(scale * (1 - w) ** 2, {"macs": w * 10}, frozenset({str(i)})) for w in widths]
        groups.append([Option(0.0, {"macs": 10.0}), *lossy])
    for unit in range(33):
        scale, claims = draw.uniform(0.1, 30), frozenset(str(i) for i in range(3 * unit, 3 * unit + 3 + unit % 2))
        saves = [Option(scale * (1 - w) ** 2, {"macs": 30 * w}, claims) for w in (0.2, 0.4, 0.6, 0.8, 0.9)]
        groups.append([Option(0.0, {"macs": 30.0}), *saves])
    found = allocate(groups, {"macs": 1100.0}, time_limit=20)
    assert found.gap < 1e-3
    assert any(found.chosen[99:])
