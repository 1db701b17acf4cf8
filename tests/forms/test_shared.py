"""One reduction for several layers: its losses at every rank, its factors, and that both are the best there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.forms.reduce import FORM as REDUCE
from pwrewrite.forms.shared import SharedCuts
from pwrewrite.forms.weighted import WeightedLayer


def moment(size: int) -> Tensor:
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    return ((basis * torch.logspace(0, -3, size, dtype=torch.float64)) @ basis.T)[None]


def layers(weighted: bool, channels: int = 12) -> list[WeightedLayer]:
    torch.manual_seed(0)
    convs = [nn.Conv2d(channels, 8, 1), nn.Conv2d(channels, 6, 3, padding=1), nn.Conv2d(channels, 5, (5, 1))]
    made = []
    for conv in convs:
        spec = ConvSpec.of_module(conv)
        inputs = moment(conv.weight[0].numel()) if weighted else None
        made.append(WeightedLayer(conv.weight, spec, inputs, moment(spec.out_channels) if weighted else None, 10.0))
    return made


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_those_of_the_factors(weighted: bool) -> None:
    readers = layers(weighted)
    cuts, ranks = SharedCuts(readers), [1, 3, 6, 11, 12]
    assert cuts.max_rank == 12
    whole = sum(reader.scale for reader in readers)
    for rank, curves in zip(ranks, cuts.losses(ranks)):
        for widths in ((None, None, None), (1, 4, None), (1, 1, 1)):
            factors = cuts.factors(rank, widths)
            lost = [y.loss_of(y.kernel - kernel) for y, kernel in zip(readers, factors.kernels())]
            predicted = [float(curve[-1 if width is None else width]) for curve, width in zip(curves, widths)]
            assert lost == pytest.approx(predicted, rel=1e-5, abs=1e-6 * whole)
            assert factors.weighted_error == pytest.approx((sum(lost) / whole) ** 0.5, rel=1e-6, abs=1e-9)
        for curve in curves:
            assert bool((curve.diff() <= 1e-9).all())
    totals = [sum(float(curve[-1]) for curve in curves) for curves in cuts.losses(ranks)]
    assert all(more > less for more, less in itertools.pairwise(totals))
    assert totals[-1] == 0


@pytest.mark.parametrize("channels", [12, 200])
def test_full_rank_is_exact(channels: int) -> None:
    readers = layers(weighted=True, channels=channels)
    cuts = SharedCuts(readers)
    assert cuts.max_rank == min(channels, 8 + 6 * 9 + 5 * 5)
    for reader, kernel in zip(readers, cuts.factors(cuts.max_rank).kernels()):
        torch.testing.assert_close(kernel, reader.kernel, rtol=1e-8, atol=1e-8)


def test_without_a_norm_it_is_the_truncated_svd_of_all_kernels() -> None:
    readers = layers(weighted=False)
    rows = torch.cat([y.kernel.flatten(2).movedim(1, -1).flatten(0, 1) for y in readers])
    values = torch.linalg.svdvals(rows).square()
    for rank, curves in zip((1, 5, 9), SharedCuts(readers).losses((1, 5, 9))):
        assert sum(float(curve[-1]) for curve in curves) == pytest.approx(5.0 * float(values[rank:].sum()))


def test_one_reader_is_the_reduce_form() -> None:
    reader = layers(weighted=True)[1]
    (alone,) = REDUCE.losses(reader, [({"rank_in": 5}, None)])
    ((curve,),) = SharedCuts([reader]).losses([5])
    assert float(curve[-1]) == pytest.approx(alone.loss, rel=1e-6)


def test_readers_that_need_the_same_lose_no_more_together_than_alone() -> None:
    readers = layers(weighted=True)
    used = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64)).Q
    same = [
        y.with_kernel(torch.einsum("oi...,ij->oj...", y.kernel, used @ used.T).reshape(y.rows.shape)) for y in readers
    ]
    (curves,) = SharedCuts(same).losses([4])
    assert sum(float(curve[-1]) for curve in curves) < 1e-6 * sum(reader.scale for reader in same)
