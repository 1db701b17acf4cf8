"""Ranks as users write them, by energy and by EVBMF."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from decompose_cases import SPECTRA, decaying
from hypothesis import given, strategies as st

from pwrewrite.core.errors import RefusedError, UsageError
from pwrewrite.decompose import (
    default_multiple,
    energy_rank,
    evbmf_rank,
    resolve_rank,
    round_rank,
)


@pytest.mark.parametrize(
    ("spec", "channels", "expected"),
    [
        (32, 100, 32),  # a width is taken as it is
        (33, 100, 33),
        (np.int64(7), 100, 7),
        ("32", 100, 32),
        (" 32 ", 100, 32),
        (1, 1, 1),
        ("1", 100, 1),
        (0.5, 100, 48),  # a ratio of 64 channels or more is rounded to a multiple of 8; 50 is nearer to 48
        (0.5, 60, 30),
        ("0.5", 128, 64),
        ("50%", 128, 64),
        ("12.5 %", 64, 8),
        (np.float32(0.25), 128, 32),
        (1.0, 100, 100),  # full is full, multiple or not
        ("1.0", 100, 100),
        ("100%", 3, 3),
        (0.99, 100, 96),
        (0.999, 103, 103),
        (0.01, 100, 1),  # never 0
        (0.03, 100, 3),  # too small for a multiple
        (0.5, 3, 2),
        (0.001, 1, 1),
    ],
)
def test_ranks_as_users_write_them(spec: object, channels: int, expected: int) -> None:
    assert resolve_rank(spec, channels) == expected


@pytest.mark.parametrize(
    "spec",
    [
        *(0, -4, 101, "0", "-3", "101", 0.0, -0.5, 1.5, 32.0, "1.5", "150%", "0%", "-50%", True, False),
        *(math.nan, math.inf, "nan", "inf", "-inf%", "half", "", "%", "3/4", "0x10", "5 0", None, [], 1 + 2j, "½"),
    ],
)
def test_ranks_that_make_no_sense_are_named(spec: object) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_rank(spec, 100, name="rank_in")
    assert "rank_in" in str(caught.value)
    assert caught.value.expected


@given(rank=st.floats(0, 300), channels=st.integers(1, 300), multiple=st.one_of(st.none(), st.integers(1, 64)))
def test_rounding_goes_to_the_nearest_multiple(rank: float, channels: int, multiple: int | None) -> None:
    found = round_rank(rank, channels, multiple)
    step = default_multiple(channels) if multiple is None else multiple
    assert 1 <= found <= channels
    if rank >= channels:
        assert found == channels
    elif rank < 0.5:
        assert found == 1
    elif found % step == 0:
        assert abs(found - rank) <= step / 2
    elif found == channels:  # the nearest multiple is beyond
        assert channels - rank < step
    else:
        assert rank < step / 2
        assert found == max(1, math.floor(rank + 0.5))


def test_rounding_needs_a_multiple() -> None:
    with pytest.raises(UsageError, match="multiple"):
        round_rank(3, 10, 0)


def test_energy_keeps_at_least_what_it_says() -> None:
    spectrum = SPECTRA["expansion"](decaying(20, 12, (3, 3), 1.0, torch.Generator().manual_seed(0)))
    for energy in (1e-6, 0.3, 0.95, 0.999, 1.0):
        rank = energy_rank(spectrum, energy)
        kept = 1 - spectrum.relative_errors.square()
        assert float(kept[rank]) >= energy - 1e-12
        assert rank == 1 or float(kept[rank - 1]) < energy
    for energy in (0, -1, 1.1, math.nan):
        with pytest.raises(UsageError, match="energy"):
            energy_rank(spectrum, energy)


@pytest.mark.parametrize(("rows", "columns"), [(40, 200), (200, 40), (100, 100), (64, 576)])
@pytest.mark.parametrize("rank", [0, 1, 5, 20])
@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_evbmf_finds_the_rank_of_a_noisy_matrix(rows: int, columns: int, rank: int, noise: float) -> None:
    """Signal singular values are at least three times the largest of the noise, about noise·(√rows + √columns)."""
    generator = torch.Generator().manual_seed(rank + rows)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator, dtype=torch.float64))[0]
    strengths = noise * (math.sqrt(rows) + math.sqrt(columns)) * torch.linspace(3, 10, rank, dtype=torch.float64)
    matrix = left * strengths @ right.T + noise * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    assert evbmf_rank(matrix) == rank
    assert evbmf_rank(torch.linalg.svdvals(matrix), (rows, columns)) == rank
    assert evbmf_rank(matrix.float() * 1e-20) == rank


def test_evbmf_of_extreme_matrices() -> None:
    assert evbmf_rank(torch.zeros(4, 6)) == 0
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(30, 4, generator=generator) @ torch.randn(4, 50, generator=generator)
    assert evbmf_rank(exact.double()) == 4
    assert evbmf_rank(torch.tensor([[2.0]])) in (0, 1)
    assert evbmf_rank(torch.randn(1, 20, generator=generator)) in (0, 1)
    assert 0 <= evbmf_rank(torch.eye(10)) <= 10
    with pytest.raises(RefusedError, match="NaN"):
        evbmf_rank(torch.full((3, 3), math.nan))
    for bad in (torch.zeros(3), torch.zeros(3, 0), torch.zeros(2, 2, 2)):
        with pytest.raises(UsageError, match="evbmf_rank"):
            evbmf_rank(bad)
    with pytest.raises(UsageError, match="do not fit"):
        evbmf_rank(torch.ones(5), (4, 6))
