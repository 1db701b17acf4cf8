"""The forms with one rank: optimal, truthful at every rank from one factorisation, weighted as promised."""

from __future__ import annotations

import math

import pytest
import torch
from decompose_cases import SPECTRA, convolutions, decaying, kernel_loss, kernels, least_dims, moment
from hypothesis import given, settings, strategies as st
from torch import Tensor

from pwrewrite import decompose
from pwrewrite.core.errors import RefusedError, UsageError

FORMS = [form for form in SPECTRA if form != "low_rank"]


def matricise(form: str, kernel: Tensor, groups: int) -> Tensor:
    """The stack of matrices whose rank a form cuts, written out independently."""
    out, inner = kernel.shape[0] // groups, kernel.shape[1]
    blocks = kernel.reshape(groups, out, inner, *kernel.shape[2:])
    if form == "expansion":
        return blocks.reshape(groups, out, -1)
    if form == "reduction":
        return blocks.movedim(2, -1).reshape(groups, -1, inner)
    if form == "depthwise":
        return blocks.movedim(2, 1).reshape(groups * inner, out, -1)
    axes = [0] if form == "spatial" else list(range(1, kernel.dim() - 2))
    rest = [axis for axis in range(kernel.dim() - 2) if axis not in axes]
    order = [0, 1, *(3 + axis for axis in rest), 2, *(3 + axis for axis in axes)]
    columns = inner * math.prod(kernel.shape[2 + axis] for axis in axes)
    return blocks.permute(order).reshape(groups, -1, columns)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_rank_from_one_factorisation(form: str, data: st.DataObject) -> None:
    kernel, groups = data.draw(kernels(min_dims=least_dims(form), max_dims=3))
    spectrum = SPECTRA[form](kernel, groups=groups)
    stack = matricise(form, kernel, groups)
    assert spectrum.max_rank == min(stack.shape[1:])
    squares = torch.linalg.svdvals(stack).square().sum(0)
    for rank in range(spectrum.max_rank + 1):
        best = float(squares[rank:].sum().clamp(min=0).sqrt() / squares.sum().sqrt())
        assert float(spectrum.relative_errors[rank]) == pytest.approx(best, rel=1e-9, abs=1e-14)
        if rank == 0:
            continue
        found = spectrum.truncate(rank)
        assert found.rank == rank
        error = float((kernel - found.reconstruct()).norm() / kernel.norm())
        assert error == pytest.approx(best, rel=1e-9, abs=1e-14)
        assert found.relative_error == pytest.approx(error, rel=1e-9, abs=1e-14)
        assert found.weighted_error == found.relative_error
    for rank in (0, spectrum.max_rank + 1):
        with pytest.raises(UsageError, match="rank"):
            spectrum.truncate(rank)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_weighted_truncation_is_the_optimum_in_the_weighted_norm(form: str, data: st.DataObject) -> None:
    """Against an SVD of G^½ M C^½ by brute force, with the weights over whole sides or over channels."""
    kernel, groups = data.draw(kernels(min_dims=least_dims(form), max_dims=2))
    stack = matricise(form, kernel, groups)
    rows, columns = stack.shape[1:]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    out, inner = kernel.shape[0] // groups, kernel.shape[1]
    near_out = moment(out, 2 * out, generator, groups)
    if form == "depthwise":  # input weight over in·k, whose diagonal blocks weight the columns
        size = columns
        given_in = moment(inner * size, 2 * inner * size, generator, groups)
        right = torch.stack(
            [g[c * size : (c + 1) * size, c * size : (c + 1) * size] for g in given_in for c in range(inner)]
        )
        given_out, left = near_out, near_out.repeat_interleave(inner, 0)
    else:
        if data.draw(st.booleans()):
            given_in = right = moment(columns, 2 * columns, generator, groups)
        else:
            given_in = moment(inner, 2 * inner, generator, groups)
            right = torch.stack([torch.kron(g, torch.eye(columns // inner).double()) for g in given_in])
        if data.draw(st.booleans()):
            given_out = left = moment(rows, 2 * rows, generator, groups)
        else:
            given_out = near_out
            left = torch.stack([torch.kron(g, torch.eye(rows // out).double()) for g in given_out])
    spectrum = SPECTRA[form](kernel, groups=groups, input_weight=given_in, output_weight=given_out)

    def root(weight: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(weight)
        return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT

    squares = torch.linalg.svdvals(root(left) @ stack @ root(right)).square().sum(0)
    plain = SPECTRA[form](kernel, groups=groups)
    for rank in range(1, spectrum.max_rank + 1):
        best = float(squares[rank:].sum())
        found, unweighted = spectrum.truncate(rank), plain.truncate(rank)
        losses = []
        for factors in (found, unweighted):
            delta = matricise(form, kernel - factors.reconstruct(), groups)
            losses.append(float((root(left) @ delta @ root(right)).square().sum()))
        # a Gram matrix in float64 resolves a loss to about 1e-15 of the whole
        floor = 1e-13 * float(squares.sum())
        assert losses[0] == pytest.approx(best, rel=1e-6, abs=floor)
        assert losses[0] <= losses[1] * (1 + 1e-6) + floor
        assert float(spectrum.losses[rank]) == pytest.approx(best, rel=1e-6, abs=floor)
        true = float((kernel - found.reconstruct()).norm() / kernel.norm())
        assert found.relative_error == pytest.approx(true, rel=1e-9, abs=1e-13)


def test_singular_weights_ignore_what_they_do_not_see() -> None:
    """Inputs that live in 3 of 8 channels, outputs that matter in 2 of 6: rank 2 loses nothing that counts."""
    kernel = decaying(6, 8, (3, 3), 0.0, torch.Generator().manual_seed(0))
    inputs = torch.diag(torch.tensor([1.0, 2, 3, 0, 0, 0, 0, 0], dtype=torch.float64))
    outputs = torch.diag(torch.tensor([0, 1.0, 0, 0, 4, 0], dtype=torch.float64))
    found = SPECTRA["expansion"](kernel, input_weight=inputs, output_weight=outputs).truncate(2)
    delta = kernel - found.reconstruct()
    whole = kernel_loss(kernel, inputs, outputs)
    # the floor of 1e-8 under the eigenvalues lets that share of the other outputs in
    assert kernel_loss(delta, inputs, outputs) < 1e-6 * whole
    assert kernel_loss(kernel - SPECTRA["expansion"](kernel).truncate(2).reconstruct(), inputs, outputs) > 0.05 * whole


@settings(max_examples=20, deadline=None)
@given(case=convolutions(max_dims=2))
def test_kernel_loss_is_the_mean_weighted_output_error(case: object) -> None:
    """With C the second moment of unfolded patches, tr(G Δ C Δᵀ) is the mean of ‖G^½ Δy‖² over positions."""
    generator = torch.Generator().manual_seed(case.seed)
    delta = torch.randn(case.groups * case.out_group, case.in_group, *case.kernel, generator=generator).double()
    patches = torch.randn(50, case.groups, case.in_group * math.prod(case.kernel), generator=generator).double()
    inputs = torch.einsum("ngi,ngj->gij", patches, patches) / 50
    outputs = moment(case.out_group, 3, generator, case.groups)
    y = torch.einsum("goi,ngi->ngo", delta.reshape(case.groups, case.out_group, -1), patches)
    mean = float(torch.einsum("ngo,gop,ngp->", y, outputs, y)) / 50
    assert kernel_loss(delta, inputs, outputs, case.groups) == pytest.approx(mean, rel=1e-9)


def test_split_moment_of_a_product_is_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    channels, tall, wide = (moment(n, 2 * n, generator)[0] for n in (4, 3, 2))
    whole = torch.kron(channels, torch.kron(tall, wide))
    near, far = decompose.split_moment(whole, 4, (3, 2), ())
    torch.testing.assert_close(torch.kron(near, far), whole)
    near, far = decompose.split_moment(whole, 4, (3, 2), (0,))
    torch.testing.assert_close(torch.kron(near, far), whole)
    near, far = decompose.split_moment(whole, 4, (3, 2), (1,))
    torch.testing.assert_close(near, torch.kron(channels, wide) * tall.trace())
    torch.testing.assert_close(far, tall / tall.trace())
    stack = torch.stack([whole, torch.zeros_like(whole)])
    near, far = decompose.split_moment(stack, 4, (3, 2), (0,))
    assert near.shape == (2, 12, 12)
    assert far.shape == (2, 2, 2)
    assert bool(far.isfinite().all())
    with pytest.raises(UsageError, match="channels"):
        decompose.split_moment(whole, 5, (3, 2), ())


def test_low_rank_of_a_linear_map_and_of_pointwise_convolutions() -> None:
    matrix = decaying(9, 7, (), 1.0, torch.Generator().manual_seed(0))
    assert matrix.shape == (9, 7)
    found = decompose.split_spectrum(matrix).truncate(3)
    left, values, right = torch.linalg.svd(matrix)
    torch.testing.assert_close(found.reconstruct(), (left[:, :3] * values[:3]) @ right[:3])
    assert [tuple(stage.weight.shape) for stage in found.stages()] == [(3, 7), (9, 3)]
    pointwise = decompose.split_spectrum(matrix.reshape(9, 7, 1, 1), first_axes=(0, 1)).truncate(3)
    assert pointwise.reconstruct().shape == (9, 7, 1, 1)
    assert [stage.axes for stage in pointwise.stages()] == [(0, 1), ()]
    assert [stage.transposed for stage in pointwise.stages(transposed=True)] == [True, False]


def test_spatial_splits_of_three_axes() -> None:
    kernel = decaying(4, 3, (3, 2, 5), 0.5, torch.Generator().manual_seed(0))
    shapes = {
        (0,): [(2, 3, 3, 1, 1), (4, 2, 1, 2, 5)],
        (1, 2): [(2, 3, 1, 2, 5), (4, 2, 3, 1, 1)],
        (2, 0): [(2, 3, 3, 1, 5), (4, 2, 1, 2, 1)],
    }
    for axes, expected in shapes.items():
        found = decompose.split_spectrum(kernel, first_axes=axes).truncate(2)
        assert [tuple(stage.weight.shape) for stage in found.stages()] == expected
        assert found.stages()[0].axes == tuple(sorted(axes))
        assert float((kernel - found.reconstruct()).norm() / kernel.norm()) == pytest.approx(found.relative_error)
    for axes in ((3,), (-1,)):
        with pytest.raises(UsageError, match="first_axes"):
            decompose.split_spectrum(kernel, first_axes=axes)
    with pytest.raises(UsageError, match="spatial axes"):
        decompose.split_spectrum(torch.randn(4, 4, 3, 1, 1, 1))


@pytest.mark.parametrize("form", SPECTRA)
def test_kernels_and_weights_that_do_not_fit_are_named(form: str) -> None:
    kernel = torch.randn(4, 3, 1, 1)
    for value in (float("nan"), float("inf")):
        bad = kernel.clone()
        bad[0, 0] = value
        with pytest.raises(RefusedError, match="NaN"):
            SPECTRA[form](bad)
    with pytest.raises(UsageError, match="input_weight of shape"):
        SPECTRA[form](kernel, input_weight=torch.eye(5))
    with pytest.raises(UsageError, match="output_weight of shape"):
        SPECTRA[form](kernel, output_weight=torch.ones(4, 3))
    with pytest.raises(RefusedError, match="output_weight"):
        SPECTRA[form](kernel, output_weight=torch.full((4, 4), float("nan")))
    with pytest.raises(UsageError, match="semi-definite"):
        decompose.tucker2(kernel, rank_in=1, rank_out=1, input_weight=-torch.eye(3))


def test_a_zero_kernel_is_exact_at_any_rank() -> None:
    for form, spectrum in SPECTRA.items():
        found = spectrum(torch.zeros(4, 3, 1, 1)).truncate(1)
        assert found.relative_error == 0, form
        assert not found.reconstruct().any()
