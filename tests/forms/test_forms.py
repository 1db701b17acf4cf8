"""Forms: the chain that each puts in place, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.core.errors import PlanError, UsageError
from pwrewrite.forms import (
    FORMS,
    chain_macs,
    chain_params,
    check_form,
    check_widths,
    factorize,
    linear_spec,
    pointwise_spec,
    rank_limits,
    spec_from_dict,
    spec_to_dict,
    stages,
)
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
    assert rank_limits(CONV, "bottleneck") == {"rank_in": 6, "rank_out": 4}
    assert rank_limits(CONV, "reduce") == {"rank_in": 6}
    assert rank_limits(replace(CONV, in_channels=2), "expand") == {"rank_out": 4}
    assert rank_limits(ConvSpec.of_module(nn.Conv2d(1, 64, 3)), "expand") == {"rank_out": 9}
    assert rank_limits(ConvSpec.of_module(nn.Conv2d(64, 1, 3)), "reduce") == {"rank_in": 9}
    assert rank_limits(CONV, "spatial") == {"rank": min(6 * 3, 4 * 5)}
    assert rank_limits(CONV, "spatial", (1,)) == {"rank": min(6 * 5, 4 * 3)}
    assert rank_limits(linear_spec(5, 9, True), "pair") == {"rank": 5}


def test_stages_put_space_where_it_belongs() -> None:
    reduce, core, expand = (spec for _, spec in stages(CONV, "bottleneck", {"rank_in": 3, "rank_out": 2}))
    assert (reduce.in_channels, reduce.out_channels, reduce.kernel_size, reduce.groups) == (12, 6, (1, 1), 2)
    assert (core.in_channels, core.out_channels) == (6, 4)
    assert (core.kernel_size, core.stride, core.padding, core.dilation) == ((3, 5), (2, 1), ((1, 1), (2, 2)), (1, 2))
    assert [spec.bias for spec in (reduce, core, expand)] == [False, False, True]
    first, second = (spec for _, spec in stages(CONV, "spatial", {"rank": 3}))
    assert (first.kernel_size, first.stride) == ((3, 1), (2, 1))
    assert (second.kernel_size, second.dilation) == ((1, 5), (1, 2))
    _, up, _ = (spec for _, spec in stages(UP, "bottleneck", {"rank_in": 1, "rank_out": 1}))
    assert up.transposed
    assert up.output_padding == (1, 1)
    deep, point = (spec for _, spec in stages(CONV, "depthwise", {"terms": 2}))
    assert (deep.groups, deep.out_channels, point.in_channels, point.groups) == (12, 24, 24, 2)


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("spec", [CONV, UP])
def test_a_module_has_the_cost_of_its_chain(form: str, spec: ConvSpec) -> None:
    spec = replace(spec, kernel_size=(1, 1), dilation=(1, 1), padding=((0, 0),) * 2) if form == "pair" else spec
    limits = rank_limits(spec, form)
    widths = {name: max(1, limit // 2) for name, limit in limits.items()}
    chain = stages(spec, form, widths)
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
    chain = stages(spec, "pair", {"rank": 2})
    assert chain_params(chain) == 6 * 2 + 2 * 4 + 4
    assert chain_macs(chain, (5, 7, 6), (5, 7, 4)) == 35 * (12 + 8)
    assert pointwise_spec(0, 6, 4) == linear_spec(6, 4, False)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_factors_fit_the_stages(form: str) -> None:
    spec = ConvSpec.of_module(nn.Conv2d(4, 6, 1 if form == "pair" else 3))
    widths = dict.fromkeys(FORMS[form], 2)
    factors = factorize(torch.randn(spec.weight_shape), spec, form, widths)
    chain = stages(spec, form, widths)
    assert [stage.name for stage in factors.stages(False)] == [name for name, _ in chain]
    for stage, (_, part) in zip(factors.stages(False), chain, strict=True):
        assert stage.weight.shape == part.weight_shape


def test_checks_say_where() -> None:
    where = "at {}".format
    assert check_form(CONV, "reduce", None, where) is None
    assert check_form(CONV, "spatial", None, where) == (0,)
    assert check_form(CONV, "spatial", [1], where) == (1,)
    for form, axes in (("none", None), (3, None), ("reduce", [0]), ("spatial", []), ("spatial", [2]), ("spatial", 0)):
        with pytest.raises(PlanError, match=r"") as caught:
            check_form(CONV, form, axes, where)
        assert str(caught.value.where).startswith("at ")
    assert check_widths(CONV, "reduce", {"rank_in": 6}, where) == {"rank_in": 6}
    for widths in (None, [], {}, {"rank": 1}, {"rank_in": 7}, {"rank_in": 0}, {"rank_in": True}, {"rank_in": "4"}):
        with pytest.raises(PlanError):
            check_widths(CONV, "reduce", widths, where)


def test_a_layer_of_no_kind() -> None:
    with pytest.raises((UsageError, KeyError)):
        make_layer(replace(CONV, kernel_size=(1,) * 4))
