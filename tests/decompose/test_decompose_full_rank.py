"""At full rank every form is the convolution it stands for, whatever the convolution's attributes."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from decompose_cases import Convolution, convolutions, full_rank, least_dims, moment
from hypothesis import given, settings, strategies as st

from pwrewrite import decompose

FORMS = ["hooi", "hosvd", "reduction", "expansion", "spatial", "spatial-last", "depthwise", "low_rank"]


def assert_reproduces(case: Convolution, factors: decompose.Factors, dtype: torch.dtype) -> None:
    """The chain and the original agree within c·eps·‖y‖.

    A sum of n rounded products is off by at most n·eps of the sum of their absolute values, so original and chain
    together are off by at most the sum of their contraction lengths times eps, times that scale; the factors are
    orthonormal to a few eps and carry a kernel that is off by as much. c is four times the sum of the lengths. ‖y‖
    is taken without cancellation, as the convolution of absolute values, because a random y may be 0 by accident;
    orthonormal factors keep the norm of what passes, but not the sum of absolute values: that may grow by the root
    of the channels, at most 2 on either side here.
    """
    weight, x, bias = case.tensors(dtype)
    expected = case.run(x, case.whole(weight), bias)
    got = case.run_chain(x, factors, bias)
    assert got.shape == expected.shape
    scale = case.run(x.abs(), case.whole(weight.abs()), None if bias is None else bias.abs()).norm()
    bound = 4 * case.contraction * torch.finfo(dtype).eps * 4 * scale
    assert float((got - expected).norm()) <= float(bound)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_full_rank_is_the_convolution(form: str, data: st.DataObject) -> None:
    case = data.draw(convolutions(pointwise=form == "low_rank", min_dims=least_dims(form)))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    weight, _, _ = case.tensors(dtype)
    kernel = decompose.to_forward_layout(weight, case.groups, case.transposed)
    factors = full_rank(form, kernel, case.groups)
    assert all(stage.weight.dtype == dtype for stage in factors.stages(case.transposed))
    # the factors in the kernel's dtype: a few eps per channel and direction
    assert factors.relative_error <= 100 * torch.finfo(dtype).eps
    assert_reproduces(case, factors, dtype)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_full_rank_survives_singular_weights(form: str, data: st.DataObject) -> None:
    case = data.draw(convolutions(pointwise=form == "low_rank", min_dims=least_dims(form)))
    weight, _, _ = case.tensors(torch.float64)
    kernel = decompose.to_forward_layout(weight, case.groups, case.transposed)
    generator = torch.Generator().manual_seed(case.seed)
    rank_in, rank_out = data.draw(st.integers(0, case.in_group)), data.draw(st.integers(0, case.out_group))
    inner = moment(case.in_group, max(rank_in, 1), generator, case.groups) * (rank_in > 0)
    outer = moment(case.out_group, max(rank_out, 1), generator, case.groups) * (rank_out > 0)
    if form == "depthwise":  # its input weight is over in·k, one block per channel
        inner = moment(case.in_group * kernel[0, 0].numel(), 1, generator, case.groups)
    weights = {
        "input_weight": data.draw(st.sampled_from([inner, None])),
        "output_weight": data.draw(st.sampled_from([outer, None])),
    }
    assert_reproduces(case, full_rank(form, kernel, case.groups, **weights), torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_kernels_are_decomposed_in_float32(form: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    spatial = (1, 1) if form == "low_rank" else (3, 3)
    kernel = torch.randn(6, 4, *spatial, generator=generator).to(dtype)
    factors = full_rank(form, kernel, 2)
    assert factors.reconstruct().dtype == torch.float32
    torch.testing.assert_close(factors.reconstruct(), kernel.float(), rtol=0, atol=1e-5)
    # back in half precision each factor is off by eps/2, and so is the product, per term: a few eps in all
    in_half = {f.name: getattr(factors, f.name) for f in fields(factors)}
    in_half = {name: value.to(dtype) for name, value in in_half.items() if isinstance(value, torch.Tensor)}
    rounded = replace(factors, **in_half).reconstruct()
    assert rounded.dtype == dtype
    assert float((rounded.float() - kernel.float()).norm() / kernel.float().norm()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("form", ["hooi", "reduction", "expansion", "low_rank"])
def test_a_float32_kernel_of_real_size_is_exact(form: str) -> None:
    spatial = (1, 1) if form == "low_rank" else (3, 3)
    kernel = torch.randn(160, 96, *spatial, generator=torch.Generator().manual_seed(1))
    factors = full_rank(form, kernel, 1)
    assert factors.relative_error < 20 * torch.finfo(torch.float32).eps


def test_the_stages_of_a_grouped_transposed_bottleneck() -> None:
    weight = torch.randn(8, 3, 3, 3, dtype=torch.float64)  # 8 in, 6 out, 2 groups
    kernel = decompose.to_forward_layout(weight, 2, True)
    assert kernel.shape == (6, 4, 3, 3)
    assert torch.equal(decompose.from_forward_layout(kernel, 2, True), weight)
    stages = decompose.tucker2(kernel, rank_in=3, rank_out=2, groups=2).stages(transposed=True)
    assert [(tuple(s.weight.shape), s.groups, s.transposed, s.axes) for s in stages] == [
        ((6, 4, 1, 1), 2, False, ()),
        ((6, 2, 3, 3), 2, True, (0, 1)),
        ((6, 2, 1, 1), 2, False, ()),
    ]
