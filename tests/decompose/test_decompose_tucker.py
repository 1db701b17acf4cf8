"""Tucker-2: reported errors are true, the table is the truncation, HOOI only improves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decompose_cases import SPECTRA, decaying, kernel_loss, kernels, moment
from hypothesis import given, settings, strategies as st
from torch import Tensor

from pwrewrite import decompose
from pwrewrite.core.errors import RefusedError, UsageError
from pwrewrite.decompose import Tucker2Spectrum, evbmf_rank, tucker2


def true_error(kernel: Tensor, reconstructed: Tensor) -> float:
    return float((kernel.double() - reconstructed.double()).norm() / kernel.double().norm())


@settings(max_examples=60, deadline=None)
@given(case=kernels(max_dims=3), data=st.data())
def test_reported_error_is_the_reconstruction_error(case: tuple[Tensor, int], data: st.DataObject) -> None:
    kernel, groups = case
    ranks = {
        "rank_in": data.draw(st.integers(1, kernel.shape[1])),
        "rank_out": data.draw(st.integers(1, kernel.shape[0] // groups)),
    }
    for method in ("hosvd", "hooi"):
        found = tucker2(kernel, **ranks, groups=groups, method=method)
        assert found.reduce.shape == (groups * ranks["rank_in"], kernel.shape[1])
        assert found.core.shape == (groups * ranks["rank_out"], ranks["rank_in"], *kernel.shape[2:])
        assert found.expand.shape == (kernel.shape[0], ranks["rank_out"])
        assert (found.rank_in, found.rank_out) == (ranks["rank_in"], ranks["rank_out"])
        assert found.relative_error == found.weighted_error
        # both are norms of residuals of one rounding each: a few eps of the kernel's norm apart, eps = 2e-16
        assert found.relative_error == pytest.approx(true_error(kernel, found.reconstruct()), rel=1e-10, abs=1e-14)
        eye = torch.eye(ranks["rank_in"], dtype=torch.float64)
        for block in found.reduce.reshape(groups, ranks["rank_in"], -1):
            torch.testing.assert_close(block @ block.T, eye, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(case=kernels(max_dims=3))
def test_the_table_is_the_truncation_at_every_pair_of_ranks(case: tuple[Tensor, int]) -> None:
    kernel, groups = case
    spectrum = Tucker2Spectrum(kernel, groups)
    table = spectrum.relative_errors
    out, inner = kernel.shape[0] // groups, kernel.shape[1]
    assert table.shape == (out + 1, inner + 1)
    assert spectrum.max_ranks == (inner, out)
    # all terms are non-negative, so neither sum can rise, but for the last digit
    assert bool((table[1:] <= table[:-1] * (1 + 1e-14)).all())
    assert bool((table[:, 1:] <= table[:, :-1] * (1 + 1e-14)).all())
    assert table[-1, -1] == 0
    assert bool(((table[0] - 1).abs() < 1e-14).all())
    assert bool(((table[:, 0] - 1).abs() < 1e-14).all())
    for rank_out in range(1, out + 1, 2):
        for rank_in in range(1, inner + 1, 2):
            cut = spectrum.truncate(rank_in, rank_out)
            expected = float(table[rank_out, rank_in])
            assert true_error(kernel, cut.reconstruct()) == pytest.approx(expected, rel=1e-9, abs=1e-13)
            hosvd = tucker2(kernel, rank_in=rank_in, rank_out=rank_out, groups=groups, method="hosvd")
            # the table's basis is from an SVD and this one from a Gram matrix: 1e-8 apart near equal singular values
            assert hosvd.relative_error == pytest.approx(expected, rel=1e-4, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(case=kernels(max_dims=2), data=st.data())
def test_hooi_is_never_worse_than_hosvd(case: tuple[Tensor, int], data: st.DataObject) -> None:
    kernel, groups = case
    ranks = {
        "rank_in": data.draw(st.integers(1, kernel.shape[1])),
        "rank_out": data.draw(st.integers(1, kernel.shape[0] // groups)),
    }
    hosvd = tucker2(kernel, **ranks, groups=groups, method="hosvd").relative_error
    errors = [tucker2(kernel, **ranks, groups=groups, sweeps=n, tolerance=0).relative_error for n in (0, 1, 4)]
    for earlier, later in zip([hosvd, *errors], errors):
        assert later <= earlier + 1e-9


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chebyshev_steps_reach_what_eigendecompositions_reach(power: float, dtype: torch.dtype) -> None:
    """160×128 is large enough for the fast update; the exact alternation is written out here."""
    kernel = decaying(160, 128, (3, 3), power, torch.Generator().manual_seed(3)).to(dtype)
    tensor = kernel.double().reshape(160, 128, 9)
    out = torch.linalg.svd(tensor.reshape(160, -1))[0][:, :80]
    for _ in range(6):
        inner = torch.linalg.svd(torch.einsum("oik,oa->iak", tensor, out).reshape(128, -1))[0][:, :64]
        out = torch.linalg.svd(torch.einsum("oik,ib->obk", tensor, inner).reshape(160, -1))[0][:, :80]
    core = torch.einsum("oik,oa,ib->abk", tensor, out, inner)
    exact = float((tensor.norm() ** 2 - core.norm() ** 2).sqrt() / tensor.norm())
    found = tucker2(kernel, rank_in=64, rank_out=80)
    assert found.relative_error <= 1.001 * exact
    # float32: orthonormal to about 1e-6, which the difference of two norms shows
    precision = 1e-10 if dtype == torch.float64 else 2e-5
    assert found.relative_error == pytest.approx(true_error(kernel, found.reconstruct()), rel=precision, abs=precision)


def test_a_float32_kernel_of_low_rank_is_found_to_float32_precision() -> None:
    """A float32 Gram matrix alone would leave an error of about 3e-4."""
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(5, 7, 3, 3, generator=generator)
    kernel = torch.einsum("ao,oikl,ib->abkl", torch.randn(64, 5), core, torch.randn(7, 48))
    assert tucker2(kernel, rank_in=7, rank_out=5).relative_error < 1e-6
    assert tucker2(kernel, rank_in=7, rank_out=5, method="hosvd").relative_error < 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    kernel = decaying(12, 10, (3, 3), 1.0, torch.Generator().manual_seed(0)).float()
    plain, scaled = (tucker2(k, rank_in=5, rank_out=6) for k in (kernel, kernel * scale))
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-4)
    torch.testing.assert_close(scaled.reconstruct() / scale, plain.reconstruct(), rtol=1e-3, atol=1e-4)


def test_a_zero_kernel_is_exact_at_any_rank() -> None:
    for groups in (1, 2):
        found = tucker2(torch.zeros(4, 3, 3, 3), rank_in=2, rank_out=1, groups=groups)
        assert found.relative_error == 0
        assert not found.reconstruct().any()
    assert not Tucker2Spectrum(torch.zeros(4, 3, 3, 3)).relative_errors.any()


@settings(max_examples=40, deadline=None)
@given(case=kernels(max_dims=2), data=st.data())
def test_weighted_optimum_beats_the_unweighted_in_the_weighted_norm(
    case: tuple[Tensor, int], data: st.DataObject
) -> None:
    kernel, groups = case
    out, inner = kernel.shape[0] // groups, kernel.shape[1]
    generator = torch.Generator().manual_seed(0)
    weights = {
        "input_weight": moment(inner, 2 * inner, generator, groups),
        "output_weight": moment(out, 2 * out, generator, groups),
    }
    rank_in, rank_out = data.draw(st.integers(1, inner)), data.draw(st.integers(1, out))
    whole = kernel_loss(kernel, weights["input_weight"], weights["output_weight"], groups)

    def loss(found: decompose.Tucker2) -> float:
        delta = kernel - found.reconstruct()
        return kernel_loss(delta, weights["input_weight"], weights["output_weight"], groups)

    plain = tucker2(kernel, rank_in=rank_in, rank_out=rank_out, groups=groups)
    found = tucker2(kernel, rank_in=rank_in, rank_out=rank_out, groups=groups, **weights)
    assert found.weighted_error**2 == pytest.approx(loss(found) / whole, rel=1e-6, abs=1e-20)
    assert found.relative_error == pytest.approx(true_error(kernel, found.reconstruct()), rel=1e-9, abs=1e-12)
    hosvd = Tucker2Spectrum(kernel, groups, **weights)
    cut = hosvd.truncate(rank_in, rank_out)
    table = float(hosvd.losses[rank_out, rank_in])
    assert table == pytest.approx(loss(cut), rel=1e-6, abs=1e-16 * whole)
    refined = hosvd.truncate(rank_in, rank_out, sweeps=5)
    assert loss(refined) == pytest.approx(loss(found), rel=1e-6, abs=1e-16 * whole)
    # HOOI finds a local optimum, and HOSVD is within a factor of 2 of the best loss (De Lathauwer et al. 2000,
    # property 10)
    assert loss(found) <= table * (1 + 1e-9) + 1e-16 * whole
    assert loss(found) <= 2 * loss(plain) + 1e-16 * whole
    if rank_in == inner or rank_out == out:  # one side: the optimum is global
        assert loss(found) <= loss(plain) * (1 + 1e-9) + 1e-16 * whole


def test_identity_weights_change_nothing() -> None:
    kernel = decaying(8, 6, (3, 3), 1.0, torch.Generator().manual_seed(0))
    plain = tucker2(kernel, rank_in=3, rank_out=4)
    eyes = {"input_weight": torch.eye(6) * 5, "output_weight": torch.eye(8) * 0.1}
    weighted = tucker2(kernel, rank_in=3, rank_out=4, **eyes)
    torch.testing.assert_close(weighted.reconstruct(), plain.reconstruct(), rtol=0, atol=1e-6)
    assert weighted.weighted_error == pytest.approx(plain.relative_error, rel=1e-6)


@pytest.mark.parametrize("rank", [0, -1, 7, True, 2.0, None, "3"])
def test_ranks_that_are_no_width_are_named(rank: object) -> None:
    kernel = torch.randn(8, 6, 3, 3)
    with pytest.raises(UsageError, match="rank_in"):
        tucker2(kernel, rank_in=rank, rank_out=4)
    with pytest.raises(UsageError, match="rank_out"):
        Tucker2Spectrum(kernel.transpose(0, 1)).truncate(4, rank)


def test_kernels_that_cannot_be_decomposed_are_refused() -> None:
    kernel = torch.randn(8, 6, 3, 3)
    kernel[1, 2, 0, 0], kernel[3, 3, 1, 1] = float("nan"), float("-inf")
    with pytest.raises(RefusedError, match="1 NaN and 1 Inf"):
        tucker2(kernel, rank_in=2, rank_out=2)
    with pytest.raises(RefusedError, match="kernel"):
        Tucker2Spectrum(kernel)
    for bad, text in [
        (torch.randn(4, 4), "spatial axes"),
        (torch.randn(4, 4, 1, 1, 1, 1), "spatial axes"),
        (torch.randn(4, 0, 3, 3), "no elements"),
        (torch.ones(4, 4, 3, 3, dtype=torch.int8), "floating"),
        (torch.ones(4, 4, 3, 3, dtype=torch.complex64), "floating"),
    ]:
        with pytest.raises(UsageError, match=text):
            tucker2(bad, rank_in=1, rank_out=1)
    with pytest.raises(UsageError, match="3 groups"):
        tucker2(torch.randn(4, 4, 3, 3), rank_in=1, rank_out=1, groups=3)
    with pytest.raises(UsageError, match="method"):
        tucker2(torch.randn(4, 4, 3, 3), rank_in=1, rank_out=1, method="cp")


def test_evbmf_finds_the_ranks_of_a_noisy_bottleneck() -> None:
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(6, 5, 3, 3, generator=generator)
    left, right = torch.randn(40, 6, generator=generator), torch.randn(5, 32, generator=generator)
    kernel = torch.einsum("ao,oikl,ib->abkl", left, core, right)
    kernel = kernel + 0.05 * kernel.std() * torch.randn(kernel.shape, generator=generator)
    for form, rank in (("reduction", 5), ("expansion", 6)):
        spectrum = SPECTRA[form](kernel)
        assert evbmf_rank(spectrum.energies[0].sqrt(), spectrum.matrix.shape[1:]) == rank


def test_gradients_and_inputs_are_left_alone() -> None:
    kernel = torch.randn(8, 6, 3, 3, requires_grad=True)
    before = kernel.detach().clone()
    found = tucker2(kernel, rank_in=3, rank_out=4)
    assert not found.core.requires_grad
    assert torch.equal(kernel.detach(), before)
    found.core.add_(1)
    found.expand.add_(1)
    assert torch.equal(kernel.detach(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_factors_stay_on_the_device() -> None:
    kernel = torch.randn(96, 64, 3, 3)
    there = tucker2(kernel.cuda(), rank_in=32, rank_out=48)
    assert there.core.device.type == "cuda"
    assert there.relative_error == pytest.approx(tucker2(kernel, rank_in=32, rank_out=48).relative_error, rel=1e-3)


def test_dead_filters_do_not_break_the_eigendecomposition() -> None:
    """LAPACK's ssyevd fails on about one in thirty of these Gram matrices."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        kernel = decaying(120, 60, (3,), 3.0, generator).float()
        kernel *= (torch.rand(120, generator=generator) < 0.3)[:, None, None]
        alive = int(kernel.flatten(1).any(1).sum())
        found = tucker2(kernel, rank_in=60, rank_out=alive)
        assert found.relative_error < 1e-5
        assert found.relative_error == pytest.approx(true_error(kernel, found.reconstruct()), abs=1e-6)


def test_eigendecompositions_do_not_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh
    kernel = decaying(12, 10, (3, 3), 1.0, torch.Generator().manual_seed(0)).float()
    expected = tucker2(kernel, rank_in=5, rank_out=6).relative_error
    calls = []

    def fails_until(attempt: int) -> object:
        def eigh(matrix: Tensor, **options: object) -> tuple[Tensor, Tensor]:
            calls.append(matrix.dtype)
            if len(calls) % attempt:
                raise torch.linalg.LinAlgError("failed to converge")
            return real(matrix)

        return eigh

    for attempt in (2, 3, 4, 10**6):  # float64, ties broken, more so, SVD
        calls.clear()
        monkeypatch.setattr(torch.linalg, "eigh", fails_until(attempt))
        found = tucker2(kernel, rank_in=5, rank_out=6)
        assert found.relative_error == pytest.approx(expected, rel=1e-4)
        assert found.relative_error == pytest.approx(true_error(kernel, found.reconstruct()), rel=1e-4)
    monkeypatch.undo()
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails_until(10**6))
    large = decaying(64, 64, (3, 3), 0.3, torch.Generator().manual_seed(0)).float()
    assert tucker2(large, rank_in=32, rank_out=32).relative_error < 1
    monkeypatch.setattr(torch.linalg, "svd", fails_until(10**6))
    assert float(SPECTRA["expansion"](kernel.double()).relative_errors[6]) > 0


@pytest.mark.parametrize("shape", [(3000, 4, 3), (3, 900, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_channels_than_all_else_spans_are_not_decomposed_among_themselves(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    eigh: Any = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: (sizes.append(gram.shape[-1]), eigh(gram))[1])
    kernel = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    spectrum = Tucker2Spectrum(kernel)
    assert max(sizes, default=0) <= 12
    assert spectrum.max_ranks == (shape[1], shape[0])
    energy = kernel.square().sum()
    for rank_in, rank_out in ((1, 2), (2, 3), (shape[1] - 1, 3), (4, min(shape[0], 20))):
        made = spectrum.truncate(rank_in, rank_out)
        assert made.core.shape[:2] == (rank_out, rank_in)
        error = (made.reconstruct() - kernel).square().sum()
        # Sums of some thousand squares; where they are next to nothing, of the rounding of each.
        torch.testing.assert_close(
            error / energy, (spectrum.losses[rank_out, rank_in] / energy).to(dtype), atol=1e-6, rtol=1e-4
        )
