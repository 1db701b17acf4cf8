"""Forms: the chain that each puts in place, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.core.errors import PlanError
from pwrewrite.forms import FORMS
from pwrewrite.forms.specs import chain_macs, chain_params, linear_spec, pointwise_spec, spec_from_dict, spec_to_dict
from pwrewrite.layers.factorized import build, make_layer

CONV = ConvSpec.of_module(nn.Conv2d(12, 8, (3, 5), (2, 1), (1, 2), (1, 2), 2))
UP = ConvSpec.of_module(nn.ConvTranspose2d(12, 8, 3, 2, 1, 1, 2))


def test_specs_survive_json() -> None:
    for spec in (CONV, UP, linear_spec(3, 4, True), ConvSpec.of_module(nn.Conv2d(3, 4, 4, padding="same"))):
        assert spec_from_dict(spec_to_dict(spec), "x") == spec


@pytest.mark.parametrize(
    "change",
    [
        {"kernel_size": [3]},
        {"kernel_size": [0, 3]},
        {"kernel_size": 3},
        {"groups": 5},
        {"groups": 0},
        {"in_channels": None},
        {"padding": [1, 1]},
    ],
)
def test_specs_that_make_no_sense(change: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as caught:
        spec_from_dict({**spec_to_dict(CONV), **change}, "line 3")
    assert caught.value.where == "line 3"


def test_limits_are_what_the_unfoldings_have() -> None:
    assert FORMS["bottleneck"].limits(CONV) == {"rank_in": 6, "rank_out": 4}
    assert FORMS["reduce"].limits(CONV) == {"rank_in": 6}
    assert FORMS["expand"].limits(replace(CONV, in_channels=2)) == {"rank_out": 4}
    assert FORMS["expand"].limits(ConvSpec.of_module(nn.Conv2d(1, 64, 3))) == {"rank_out": 9}
    assert FORMS["reduce"].limits(ConvSpec.of_module(nn.Conv2d(64, 1, 3))) == {"rank_in": 9}
    assert FORMS["spatial"].limits(CONV) == {"rank": min(6 * 3, 4 * 5)}
    assert FORMS["spatial"].limits(CONV, (1,)) == {"rank": min(6 * 5, 4 * 3)}
    assert FORMS["pair"].limits(linear_spec(5, 9, True)) == {"rank": 5}


def test_stages_put_space_where_it_belongs() -> None:
    reduce, core, expand = (spec for _, spec in FORMS["bottleneck"].stages(CONV, {"rank_in": 3, "rank_out": 2}))
    assert (reduce.in_channels, reduce.out_channels, reduce.kernel_size, reduce.groups) == (12, 6, (1, 1), 2)
    assert (core.in_channels, core.out_channels) == (6, 4)
    assert (core.kernel_size, core.stride, core.padding, core.dilation) == ((3, 5), (2, 1), ((1, 1), (2, 2)), (1, 2))
    assert [spec.bias for spec in (reduce, core, expand)] == [False, False, True]
    first, second = (spec for _, spec in FORMS["spatial"].stages(CONV, {"rank": 3}))
    assert (first.kernel_size, first.stride) == ((3, 1), (2, 1))
    assert (second.kernel_size, second.dilation) == ((1, 5), (1, 2))
    _, up, _ = (spec for _, spec in FORMS["bottleneck"].stages(UP, {"rank_in": 1, "rank_out": 1}))
    assert up.transposed
    assert up.output_padding == (1, 1)
    deep, point = (spec for _, spec in FORMS["depthwise"].stages(CONV, {"terms": 2}))
    assert (deep.groups, deep.out_channels, point.in_channels, point.groups) == (12, 24, 24, 2)


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("spec", [CONV, UP])
def test_a_module_has_the_cost_of_its_chain(form: str, spec: ConvSpec) -> None:
    spec = replace(spec, kernel_size=(1, 1), dilation=(1, 1), padding=((0, 0),) * 2) if form == "pair" else spec
    limits = FORMS[form].limits(spec)
    widths = {name: max(1, limit // 2) for name, limit in limits.items()}
    chain = FORMS[form].stages(spec, widths)
    module = build(spec, form, widths)
    assert chain_params(chain) == sum(p.numel() for p in module.parameters())
    x = torch.zeros(2, 12, 9, 11)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        out = module(x)
    assert out.shape == make_layer(spec)(x).shape
    assert chain_macs(chain, x.shape, out.shape) == counter.get_total_flops() // 2


def test_macs_of_a_linear_chain() -> None:
    spec = linear_spec(6, 4, True)
    chain = FORMS["pair"].stages(spec, {"rank": 2})
    assert chain_params(chain) == 6 * 2 + 2 * 4 + 4
    assert chain_macs(chain, (5, 7, 6), (5, 7, 4)) == 35 * (12 + 8)
    assert pointwise_spec(0, 6, 4) == linear_spec(6, 4, False)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_factors_fit_the_stages(form: str) -> None:
    spec = ConvSpec.of_module(nn.Conv2d(4, 6, 1 if form == "pair" else 3))
    widths = dict.fromkeys(FORMS[form].widths, 2)
    factors = FORMS[form].factorize(torch.randn(spec.weight_shape), spec, widths)
    chain = FORMS[form].stages(spec, widths)
    for stage, (_, part) in zip(factors.stages(False), chain, strict=True):
        assert stage.weight.shape == part.weight_shape


def test_checks_say_where() -> None:
    where = "at {}".format
    reduce, spatial = FORMS["reduce"], FORMS["spatial"]
    assert reduce.read_axes(CONV, None, where) is None
    assert spatial.read_axes(CONV, None, where) == (0,)
    assert spatial.read_axes(CONV, (1,), where) == (1,)
    for form, axes in (
        ("reduce", (0,)),
        ("spatial", ()),
        ("spatial", (2,)),
        ("spatial", (0, 1)),  # nothing would be left to the second stage
        ("pair", None),  # not for a k×k
    ):
        with pytest.raises(PlanError, match=r"") as caught:
            FORMS[form].read_axes(CONV, axes, where)
        assert str(caught.value.where).startswith("at ")
    with pytest.raises(PlanError, match="divide"):
        spatial.read_axes(ConvSpec.of_module(nn.Conv1d(4, 4, 3)), None, where)
    assert reduce.read_widths(CONV, {"rank_in": 6}, None, where) == {"rank_in": 6}
    for widths in ({}, {"rank": 1}, {"rank_in": 7}, {"rank_in": 0}):
        with pytest.raises(PlanError):
            reduce.read_widths(CONV, widths, None, where)


def test_a_layer_of_no_kind() -> None:
    with pytest.raises(AttributeError, match="Conv4d"):
        make_layer(replace(CONV, kernel_size=(1,) * 4))


def test_forms_know_their_names_and_passes() -> None:
    for name, form in FORMS.items():
        assert name == form.name
        assert form.passes
