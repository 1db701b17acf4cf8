"""Losses that are predicted are those of the factors that are made, for every form, and small ranks lose more."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from decompose_cases import SPECTRA, kernel_loss
from torch import Tensor, nn

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.decompose import PairFactors, solve_last
from pwrewrite.forms import FORMS
from pwrewrite.forms.form import FormLoss, ranks_to_try
from pwrewrite.forms.specs import linear_spec
from pwrewrite.forms.weighted import WeightedLayer
from pwrewrite.planning.patches import row_size

LAYERS = {
    "dense": nn.Conv2d(12, 16, 3),
    "grouped": nn.Conv2d(12, 16, 3, groups=2),
    "wide": nn.Conv2d(6, 20, (5, 3)),
    "transposed": nn.ConvTranspose2d(8, 6, 2, 2),
    "pointwise": nn.Conv2d(12, 8, 1),
    "one axis": nn.Conv1d(10, 8, 3),
}
SPATIAL = ("reduce", "expand", "bottleneck", "depthwise", "spatial")


def moments(spec: ConvSpec, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def moment(size: int) -> Tensor:
        mixing = torch.randn(spec.groups, size, size, generator=generator, dtype=torch.float64)
        rows = torch.randn(spec.groups, 4 * size, size, generator=generator, dtype=torch.float64) @ mixing
        return rows.mT @ rows / rows.shape[1]

    return moment(row_size(spec)), moment(spec.out_channels // spec.groups)


def weighted(name: str) -> WeightedLayer:
    layer = LAYERS[name]
    spec = ConvSpec.of_module(layer)
    torch.manual_seed(0)
    return WeightedLayer(torch.randn_like(layer.weight), spec, *moments(spec), positions=10.0)  # type: ignore[arg-type]


def losses(layer: WeightedLayer, form: str) -> list[FormLoss]:
    """Every width of a form's ladder."""
    return FORMS[form].losses(layer, FORMS[form].choices(layer.spec, layer.multiple, lambda widths, axes: True))


def forms_of(name: str) -> tuple[str, ...]:
    if name == "pointwise":
        return ("pair",)
    return tuple(form for form in SPATIAL if form != "spatial" or name != "one axis")


@pytest.mark.parametrize(("name", "form"), [(name, form) for name in LAYERS for form in forms_of(name)])
def test_predicted_losses_are_those_of_the_factors(name: str, form: str) -> None:
    layer = weighted(name)
    rungs = losses(layer, form)
    assert rungs
    for rung in rungs[:: max(1, len(rungs) // 6)]:
        factors = FORMS[form].fit(layer, rung.widths, rung.axes)
        delta = layer.kernel - factors.reconstruct().reshape(layer.kernel.shape)
        loss = 5.0 * kernel_loss(delta, layer.inputs, layer.gradients, layer.spec.groups)
        assert rung.loss == pytest.approx(loss, rel=1e-5, abs=1e-6 * layer.scale)
        assert factors.weighted_error == pytest.approx(rung.error, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("name", "form"), [(name, form) for name in LAYERS for form in forms_of(name)])
def test_the_full_rank_loses_nothing(name: str, form: str) -> None:
    layer = weighted(name)
    axes = (0,) if form == "spatial" else None
    factors = FORMS[form].fit(layer, FORMS[form].limits(layer.spec, axes), axes)
    torch.testing.assert_close(factors.reconstruct().reshape(layer.kernel.shape), layer.kernel, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["reduce", "spatial", "depthwise", "expand"])
def test_the_last_factor_cannot_be_bettered(form: str) -> None:
    layer = weighted("dense")
    rung = losses(layer, form)[3]
    best = FORMS[form].fit(layer, rung.widths, rung.axes)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        assert isinstance(best, PairFactors)
        matrix = best.last_matrix()
        nudge = 1e-3 * torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype)
        other = best.with_last(matrix + nudge)
        delta = layer.kernel - other.reconstruct().reshape(layer.kernel.shape)
        assert layer.loss_of(delta) > rung.loss * (1 - 1e-9)


def test_a_bottleneck_beats_the_plain_one() -> None:
    from pwrewrite.decompose import tucker2

    layer = weighted("dense")
    for rung in losses(layer, "bottleneck")[::20]:
        plain = tucker2(layer.kernel, rank_in=rung.widths["rank_in"], rank_out=rung.widths["rank_out"])
        assert rung.loss <= layer.loss_of(layer.kernel - plain.reconstruct()) * (1 + 1e-9) + 1e-6


@pytest.mark.parametrize("form", ["reduce", "expand", "depthwise", "spatial"])
def test_inner_maps_times_last_factors_are_the_kernel(form: str) -> None:
    layer = weighted("grouped")
    rung = losses(layer, form)[2]
    factors = FORMS[form].fit(layer, rung.widths, rung.axes)
    assert isinstance(factors, PairFactors)
    eye = torch.eye(layer.rows.shape[2], dtype=torch.float64).expand(2, -1, -1)
    made = factors.last_matrix() @ factors.inner(eye, layer.spatial)
    torch.testing.assert_close(made.reshape(layer.kernel.shape), factors.reconstruct().reshape(layer.kernel.shape))


def test_without_statistics_losses_are_relative_squared_errors() -> None:
    layer = nn.Linear(12, 10)
    one = WeightedLayer(layer.weight, linear_spec(12, 10, True), None, None)
    one.normalise(1.0)
    values = torch.linalg.svdvals(layer.weight.detach().double()).square()
    for rung in losses(one, "pair"):
        assert rung.loss == pytest.approx(float(values[rung.widths["rank"] :].sum() / values.sum()), abs=1e-9)


@pytest.mark.parametrize("form", SPATIAL)
def test_the_identity_needs_no_moment(form: str) -> None:
    layer = LAYERS["dense"]
    spec = ConvSpec.of_module(layer)
    _, gradients = moments(spec)
    weight = torch.randn(16, 12, 3, 3, generator=torch.Generator().manual_seed(0))
    plain = WeightedLayer(weight, spec, None, gradients, 3.0)
    eye = torch.eye(row_size(spec), dtype=torch.float64)[None]
    full = WeightedLayer(weight, spec, eye, gradients, 3.0)
    assert plain.scale == pytest.approx(full.scale)
    for one, other in zip(losses(plain, form), losses(full, form)):
        assert (one.widths, one.axes) == (other.widths, other.axes)
        assert one.loss == pytest.approx(other.loss, rel=0.05 if form == "bottleneck" else 1e-4, abs=1e-4 * full.scale)
        made = FORMS[form].fit(plain, one.widths, one.axes)
        loss = plain.loss_of(plain.kernel - made.reconstruct().reshape(plain.kernel.shape))
        assert loss <= one.loss * (1 + 1e-6) + 1e-6 * plain.scale


def test_singular_moments_are_solved() -> None:
    normal = torch.zeros(1, 4, 4, dtype=torch.float64)
    normal[0, :2, :2] = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    cross = torch.tensor([[[2.0, 1.0, 0.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(
        solve_last(normal, cross)[0, 0], torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_moments_that_rounding_made_indefinite_are_solved() -> None:
    normal = torch.diag(torch.tensor([1.0, 1.0, -1e-7], dtype=torch.float64))[None]
    cross = torch.tensor([[[1.0, 2.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(solve_last(normal, cross), cross, rtol=1e-3, atol=0.0)
    nothing = torch.zeros(1, 3, 3, dtype=torch.float32)
    assert not solve_last(nothing, nothing[:, :1]).any()


def test_ladders_reach_the_full_rank_and_stay_short() -> None:
    assert ranks_to_try(5) == [1, 2, 3, 4, 5]
    assert ranks_to_try(1) == [1]
    for limit in (17, 64, 100, 512, 4608):
        ranks = ranks_to_try(limit)
        assert ranks[-1] == limit
        assert ranks == sorted(set(ranks))
        assert len(ranks) <= 24
        assert ranks[0] >= 1
    assert all(rank % 16 == 0 for rank in ranks_to_try(128, 16) if rank >= 16)


def test_a_product_of_weights_is_never_formed_and_the_same() -> None:
    generator = torch.Generator().manual_seed(0)

    def moment(size: int) -> Tensor:
        rows = torch.randn(2, 3 * size, size, generator=generator, dtype=torch.float64)
        return rows.mT @ rows

    kernel = torch.randn(8, 6, 3, 3, generator=generator, dtype=torch.float64)
    outer, inner, near = moment(4), moment(9), moment(6)
    dense = torch.stack([torch.kron(a, b) for a, b in zip(outer, inner)])
    for wide in (kernel, kernel[:, :2]):  # either side of the matrix may be the shorter one
        side = near[:, : wide.shape[1], : wide.shape[1]]
        one = SPECTRA["reduction"](wide, groups=2, input_weight=side, output_weight=(outer, inner))
        other = SPECTRA["reduction"](wide, groups=2, input_weight=side, output_weight=dense)
        torch.testing.assert_close(one.losses, other.losses)
        torch.testing.assert_close(one.truncate(2).reconstruct(), other.truncate(2).reconstruct())
    few = moment(3)
    dense = torch.stack([torch.kron(a, b) for a, b in zip(outer, few)])
    one_, other_ = (SPECTRA["spatial"](kernel, groups=2, output_weight=weight) for weight in ((outer, few), dense))
    torch.testing.assert_close(one_.losses, other_.losses)


def test_what_forms_make_of_a_layer_goes_with_it() -> None:
    """Without the garbage collector, since a large model's moments would fill the memory until it runs."""
    gc.collect()
    gc.disable()
    try:
        layer = weighted("dense")
        for form in forms_of("dense"):
            losses(layer, form)
        gone = weakref.ref(layer)
        del layer
        assert gone() is None
    finally:
        gc.enable()
