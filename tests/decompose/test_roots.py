"""Roots of weights, Cholesky factors with a ridge, and Gram matrices by halves."""

from __future__ import annotations

import pytest
import torch

from pwrewrite.decompose.eigen import mean_diagonal, ridged_cholesky, root_of
from pwrewrite.decompose.gram import add_gram, mirror, row_gram


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("flush", [False, True])
def test_a_group_of_nothing_leaves_the_others_alone(dtype: torch.dtype, flush: bool) -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 8, dtype=dtype)
    alive = rows.mT @ rows / 40
    stack = torch.stack([alive, torch.zeros_like(alive), 1e-30 * alive])
    torch.set_flush_denormal(flush)
    try:
        root = root_of(stack)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(root[0] @ root[0].mT, alive, rtol=1e-5, atol=1e-6)
    assert root[1:].abs().max() < 1e-4


def test_a_root_of_few_directions_is_exact() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 64)
    weight = (rows.mT @ rows).double()
    root = root_of(weight)
    torch.testing.assert_close(root @ root.mT, weight, rtol=1e-6, atol=1e-5)
    assert torch.equal(root_of(torch.zeros(4, 4, dtype=torch.float64)).abs() < 1e-5, torch.ones(4, 4).bool())


def test_ridges_grow_where_there_is_no_factor() -> None:
    good = torch.eye(3, dtype=torch.float64)
    bad = torch.diag(torch.tensor([1.0, 1.0, -1e-5], dtype=torch.float64))
    stack = torch.stack([good, bad])
    factor, ridges = ridged_cholesky(stack, mean_diagonal(stack), 1e-9, 10)
    assert float(ridges[0]) == 1e-9
    assert 1e-5 < float(ridges[1]) < 1e-3
    torch.testing.assert_close(factor[0], good, rtol=0, atol=1e-8)


@pytest.mark.parametrize("size", [5, 255, 256, 300, 1000])
def test_halves_make_a_whole(size: int) -> None:
    torch.manual_seed(0)
    rows, more = torch.randn(size, 7), torch.randn(size, 9)
    torch.testing.assert_close(row_gram(rows), rows @ rows.mT)
    sums = torch.zeros(size, size, dtype=torch.float64)
    add_gram(sums, rows, 2.0)
    add_gram(sums, more, 0.5)
    mirror(sums)
    wanted = 2 * (rows @ rows.mT) + 0.5 * (more @ more.mT)
    torch.testing.assert_close(sums, wanted.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(sums, sums.mT)
