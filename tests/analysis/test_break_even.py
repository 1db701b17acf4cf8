"""Break-even ranks: closed forms, and every ratio tried one by one against costs counted from shapes."""

from fractions import Fraction
from math import isqrt

import pytest
from hypothesis import given, settings, strategies as st

from pwrewrite.analysis.break_even import BottleneckCost
from pwrewrite.core.convolution import ConvSpec


def spec_of(
    in_channels, out_channels, kernel, stride=1, groups=1, transposed=False, padding=0, dilation=1, dims=2, bias=False
):
    """A `ConvSpec` with the same settings in every dim."""
    return ConvSpec(
        in_channels,
        out_channels,
        (kernel,) * dims,
        (stride,) * dims,
        ((padding, padding),) * dims,
        (dilation,) * dims,
        groups,
        bias,
        "zeros",
        transposed,
        (0,) * dims,
    )


def bottleneck(spec, rank_in, rank_out, input_shape):
    """The three convolutions of a bottleneck: their MACs and weights, counted one after the other."""
    reduce = spec_of(spec.in_channels, rank_in, 1, groups=spec.groups, dims=spec.dims)
    core = ConvSpec(rank_in, rank_out, *[getattr(spec, f) for f in ConvSpec.__slots__[2:]])
    expand = spec_of(rank_out, spec.out_channels, 1, groups=spec.groups, dims=spec.dims)
    macs = weights = 0
    shape = input_shape
    for part in (reduce, core, expand):
        out = part.output_shape(shape)
        macs += part.macs(shape, out)
        weights += part.params - (part.out_channels if part.bias else 0)
        shape = out
    return macs, weights


def by_trying(spec, input_shape, which):
    """The largest ranks that do not raise the cost, by trying every common ratio at which one of them changes."""
    fan_in, fan_out, groups = spec.in_channels // spec.groups, spec.out_channels // spec.groups, spec.groups
    ratios = {Fraction(a, fan_in) for a in range(1, fan_in + 1)} | {Fraction(b, fan_out) for b in range(1, fan_out + 1)}
    original = (spec.macs(input_shape, spec.output_shape(input_shape)), spec.params - spec.bias * spec.out_channels)
    best = (0, 0)
    for ratio in sorted({*ratios, min(ratios) / 2}):
        ranks = max(1, int(ratio * fan_in)) * groups, max(1, int(ratio * fan_out)) * groups
        if bottleneck(spec, *ranks, input_shape)[which] <= original[which]:
            best = ranks
    return best


def test_square_layer_of_the_closed_form() -> None:
    # c → c channels, k × k, stride 1, r = R/c: r² k² + 2 r = k² ⇒ R = c (√(1 + k⁴) - 1) / k²
    for channels, kernel in ((64, 3), (256, 3), (128, 5), (512, 3)):
        k = kernel * kernel
        root = isqrt(channels * channels * (1 + k * k))  # ⌊c √(1 + k⁴)⌋
        expected = (root - channels) // k
        cost = BottleneckCost.of_params(spec_of(channels, channels, kernel, padding=kernel // 2))
        assert cost.break_even() == (expected, expected)


def test_half_width_of_a_square_3x3_layer() -> None:
    # c²/4 · 9 + 2 · c²/2 = 3.25 c², against 9 c²
    cost = BottleneckCost.of_params(spec_of(64, 64, 3))
    assert cost.original == 9 * 64 * 64
    assert cost.half == 13 * 64 * 64 // 4


def test_a_stride_lowers_the_ranks_in_macs_and_not_in_params() -> None:
    spec = spec_of(64, 64, 3, stride=2, padding=1)
    macs = BottleneckCost.of_macs(spec, [((1, 64, 56, 56), (1, 64, 28, 28))])
    params = BottleneckCost.of_params(spec)
    assert params.break_even() == BottleneckCost.of_params(spec_of(64, 64, 3)).break_even() == (57, 57)
    assert macs.break_even() == by_trying(spec, (1, 64, 56, 56), 0) == (48, 48)


def test_calls_add_up() -> None:
    spec = spec_of(8, 8, 3, padding=1)
    once = BottleneckCost.of_macs(spec, [((1, 8, 4, 4), (1, 8, 4, 4))])
    shapes = [((2, 8, 4, 4), (2, 8, 4, 4)), ((8, 4, 4), (8, 4, 4))]  # the second is not batched
    assert BottleneckCost.of_macs(spec, shapes).original == 3 * once.original


def test_too_small_to_gain() -> None:
    # in 1, out 1, 3 × 3: 9 against 1 + 9 + 1
    assert BottleneckCost.of_params(spec_of(1, 1, 3)).break_even() == (0, 0)


@pytest.mark.parametrize("transposed", [False, True])
@settings(max_examples=150, deadline=None)
@given(
    fan_in=st.integers(1, 20),
    fan_out=st.integers(1, 20),
    groups=st.sampled_from([1, 1, 2, 3]),
    kernel=st.integers(2, 4),
    stride=st.integers(1, 3),
    dims=st.sampled_from([1, 2]),
)
def test_equals_trying_every_ratio(transposed, fan_in, fan_out, groups, kernel, stride, dims) -> None:
    spec = spec_of(fan_in * groups, fan_out * groups, kernel, stride, groups, transposed, padding=1, dims=dims)
    shape = (2, fan_in * groups, *(7, 5)[:dims])
    macs = BottleneckCost.of_macs(spec, [(shape, spec.output_shape(shape))])
    params = BottleneckCost.of_params(spec)
    assert macs.original == spec.macs(shape, spec.output_shape(shape))
    assert params.original == spec.params
    assert macs.break_even() == by_trying(spec, shape, 0)
    assert params.break_even() == by_trying(spec, shape, 1)
    ranks = max(1, fan_in // 2) * groups, max(1, fan_out // 2) * groups
    assert (macs.half, params.half) == bottleneck(spec, *ranks, shape)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2048), st.integers(1, 2048), st.integers(1, 7), st.integers(1, 4))
def test_ranks_bracket_the_cost(fan_in, fan_out, kernel, stride) -> None:
    spec = spec_of(fan_in, fan_out, kernel, stride, padding=kernel // 2)
    shape = (1, fan_in, 56, 56)
    cost = BottleneckCost.of_macs(spec, [(shape, spec.output_shape(shape))])
    rank_in, rank_out = cost.break_even()
    if not rank_in:
        assert cost.at(1, 1) > cost.original
        return
    assert cost.at(rank_in, rank_out) <= cost.original
    # the next ratio at which a rank changes costs more
    ratio = min(Fraction(rank_in + 1, fan_in), Fraction(rank_out + 1, fan_out))
    assert ratio > 1 or cost.at(max(1, int(ratio * fan_in)), max(1, int(ratio * fan_out))) > cost.original


def test_a_layer_that_is_called_with_nothing() -> None:
    """A detector's heads, where nothing was found: all ranks cost the same, nothing."""
    spec = spec_of(16, 32, 3, padding=1)
    shape = (0, 16, 14, 14)
    assert BottleneckCost.of_macs(spec, [(shape, spec.output_shape(shape))]).break_even() == (16, 32)
