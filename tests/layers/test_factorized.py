"""The modules that rewrites put in: they read like what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.forms import FORMS
from pwrewrite.forms.specs import linear_spec, pointwise_spec
from pwrewrite.layers.factorized import (
    ACTIVATIONS,
    NORMS,
    FactorizedLinear,
    Projected,
    build,
    make_layer,
)

SHARED = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode", "transposed")
LAYERS: tuple[Any, ...] = (
    nn.Conv1d(6, 4, 3, 2, 1, 1, 2, False),
    nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), (1, 2), 2, True, "reflect"),
    nn.Conv2d(6, 4, 4, padding="same"),
    nn.Conv2d(6, 4, 3, padding="valid"),
    nn.Conv3d(6, 4, (1, 3, 3), padding=(0, 1, 1)),
    nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, 2),
)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_bottleneck_reads_like_its_convolution(layer: Any) -> None:
    spec = ConvSpec.of_module(layer)
    made = build(spec, "bottleneck", {"rank_in": 1, "rank_out": 1})
    for name in SHARED:
        assert getattr(made, name) == getattr(layer, name), name
    assert made.output_padding == layer.output_padding
    assert ConvSpec.of_module(made) == spec
    if layer.padding != "valid":
        assert made.padding == layer.padding
    assert (made.bias is None) == (layer.bias is None)
    assert str(layer.in_channels) in made.extra_repr()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_from_its_facts(layer: Any) -> None:
    made = make_layer(ConvSpec.of_module(layer))
    assert type(made) is type(layer)
    made.load_state_dict(layer.state_dict())
    x = torch.randn(1, 6, *(9, 8, 7)[: ConvSpec.of_module(layer).dims])
    assert torch.equal(made(x), layer(x))


def test_output_size_of_a_transposed_one() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(6, 4, 3, 2, 1).double()
    spec = ConvSpec.of_module(layer)
    x = torch.randn(2, 6, 5, 4).double()
    for form in ("bottleneck", "reduce", "expand", "spatial"):
        widths = FORMS[form].limits(spec)
        made = build(spec, form, widths).double()
        made.load_factors(FORMS[form].factorize(layer.weight, spec, widths), layer.bias)
        for size in ([9, 7], [10, 8], [2, 4, 10, 7]):
            # float64, sums of fewer than 100 products
            assert torch.allclose(made(x, output_size=size), layer(x, output_size=size), atol=1e-13)


def test_modules_name_their_forms() -> None:
    conv, point = ConvSpec.of_module(nn.Conv2d(6, 4, 3)), ConvSpec.of_module(nn.Conv2d(6, 4, 1))
    for form, widths, kind in (
        ("bottleneck", {"rank_in": 2, "rank_out": 2}, "Bottleneck"),
        ("reduce", {"rank_in": 2}, "Bottleneck"),
        ("spatial", {"rank": 2}, "SpatialPair"),
        ("depthwise", {"terms": 2}, "DepthwiseSeparable"),
    ):
        assert build(conv, form, widths)._get_name() == kind
    assert build(point, "pair", {"rank": 2})._get_name() == "LowRankPair"
    linear: Any = build(linear_spec(6, 4, True), "pair", {"rank": 2})
    assert type(linear) is FactorizedLinear
    assert str(linear).startswith("LowRankLinear(")
    assert (linear.in_features, linear.out_features) == (6, 4)
    assert linear(torch.zeros(3, 2, 6)).shape == (3, 2, 4)


@pytest.mark.parametrize("norm", [None, *NORMS])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_norms_and_activations_between(norm: str | None, activation: str | None) -> None:
    spec = ConvSpec.of_module(nn.Conv2d(6, 4, 3))
    made = build(spec, "bottleneck", {"rank_in": 2, "rank_out": 3}, norm=norm, activation=activation)
    made(torch.randn(2, 6, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    assert made.stage_names == ("reduce", "core", "expand")


@pytest.mark.parametrize(("dims", "kind"), [(0, nn.Linear), (1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
def test_a_projected_branch(dims: int, kind: type[nn.Module]) -> None:
    made = Projected(nn.ReLU(), make_layer(pointwise_spec(dims, 6, 2), dtype=torch.float64))
    assert type(made.project) is kind
    x = torch.randn(3, 6, *(4,) * dims).double()
    assert made(x).shape == (3, 2, *(4,) * dims)
    assert torch.equal(made(x), made.project(x.relu()))
