"""The cheapest choice that claims nothing twice, what each decision costs above it, and bounds where it is wide."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from pwrewrite.planning import exclusion
from pwrewrite.planning.exclusion import Exclusion, Floats


def _brute(claims: Floats, without: Floats, claiming: Floats) -> dict[tuple[bool, ...], float]:
    totals = {}
    for each in product([False, True], repeat=len(claims)):
        if (claims[list(each)].sum(0) <= 1).all():
            totals[each] = float(np.where(each, claiming, without).sum())
    return totals


def _random(seed: int) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng(seed)
    groups, things = int(rng.integers(1, 9)), int(rng.integers(1, 7))
    claims = (rng.random((groups, things)) < rng.choice([0.15, 0.4])).astype(float)
    without, claiming = rng.random(groups), rng.random(groups)
    claiming[~claims.any(1)] = np.inf
    if seed % 3 == 0:
        without[claims.any(1) & (rng.random(groups) < 0.2)] = np.inf
        claiming[rng.random(groups) < 0.2] = np.inf
    return claims, without, claiming


@pytest.mark.parametrize("seed", range(60))
def test_it_equals_brute_force(seed: int) -> None:
    claims, without, claiming = _random(seed)
    totals, diagram = _brute(claims, without, claiming), Exclusion(claims)
    chosen = claiming < without
    for group, claims_it in diagram.cheapest(without, claiming):
        chosen[group] = claims_it
    least = min(totals.values())
    if least == np.inf:
        assert not np.concatenate(diagram.margins(without, claiming)).any()
        return
    assert totals[tuple(chosen.tolist())] == pytest.approx(least)
    margins = diagram.margins(without, claiming)
    for group in np.flatnonzero(claims.any(1)):
        for side, margin in enumerate((margins.without[group], margins.claiming[group])):
            best = min((total for each, total in totals.items() if each[group] == bool(side)), default=np.inf)
            assert margin == pytest.approx(best - least, abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_a_narrowed_diagram_is_a_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusion, "_WIDEST", 2)
    claims, without, claiming = _random(3 * seed + 1)
    chosen = claiming < without
    for group, claims_it in Exclusion(claims).cheapest(without, claiming):
        chosen[group] = claims_it
    total = np.where(chosen, claiming, without).sum()
    assert total <= min(_brute(claims, without, claiming).values()) + 1e-12


def test_a_long_chain_stays_narrow() -> None:
    count = 2000
    claims = np.zeros((2 * count - 1, count))
    claims[range(count), range(count)] = 1  # every layer alone, and every two neighbours
    claims[range(count, 2 * count - 1), range(count - 1)] = claims[range(count, 2 * count - 1), range(1, count)] = 1
    diagram, claiming = Exclusion(claims), np.where(np.arange(2 * count - 1) < count, -1.0, -2.5)
    choice = diagram.cheapest(np.zeros(2 * count - 1), claiming)
    assert sum(claiming[group] for group, claims_it in choice if claims_it) == -2.5 * count / 2
