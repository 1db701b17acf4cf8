"""`Affine`: chains and sums of convolutions are what running them one by one gives."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.decompose.affine import Affine, NotExact

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # sums of some hundred products in float64


def run(m: Affine, x: Tensor) -> Tensor:
    sides = [p for pair in reversed(m.spec.padding) for p in pair]
    return F.conv2d(F.pad(x, sides), m.weight, m.bias, m.spec.stride, 0, m.spec.dilation, m.spec.groups)


def drawn(inputs: int, outputs: int, rng: random.Random) -> Affine:
    """A convolution of any kernel, padding, stride, dilation and groups."""
    groups = rng.choice([g for g in range(1, 13) if inputs % g == outputs % g == 0])
    kernel = [rng.choice([1, 1, 2, 3, 5]) for _ in range(2)]
    dilation = tuple(rng.choice([1, 2]) for _ in range(2))
    reach = [d * (k - 1) for k, d in zip(kernel, dilation)]
    padding = tuple(rng.choice([(r // 2, r // 2), (0, r), (0, 0)]) for r in reach)
    stride = rng.choice([(1, 1), (1, 1), (2, 2)])
    bias = torch.randn(outputs, dtype=torch.float64) if rng.random() < 0.5 else None
    spec = ConvSpec(inputs, outputs, tuple(kernel), stride, padding, dilation, groups, bias is not None)
    return Affine(spec, torch.randn(outputs, inputs // groups, *kernel, dtype=torch.float64), bias)


def test_chains_and_sums_of_random_convolutions() -> None:
    torch.manual_seed(0)
    rng, done = random.Random(0), {"chains": 0, "sums": 0}
    for _ in range(400):
        a, b, c = drawn(12, 6, rng), drawn(6, 12, rng), drawn(12, 6, rng)
        x = torch.randn(2, 12, rng.randint(12, 16), 13, dtype=torch.float64)
        try:
            chain = a.then(b)
        except NotExact:
            pass
        else:
            done["chains"] += 1
            torch.testing.assert_close(run(chain, x), run(b, run(a, x)), **CLOSE)
            assert chain.spec.weight_shape == chain.weight.shape
        try:
            total = a.plus(c)
        except NotExact:
            continue
        done["sums"] += 1
        torch.testing.assert_close(run(total, x), run(a, x) + run(c, x), **CLOSE)
        torch.testing.assert_close(run(total.symmetric(), x), run(a, x) + run(c, x), **CLOSE)
        assert all(left == right for left, right in total.symmetric().spec.padding)
    assert min(done.values()) > 40


def test_scales_shifts_and_pools() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    scale, shift = torch.randn(2, 4, dtype=torch.float64)
    norm = Affine.diagonal(scale, shift, 2)
    torch.testing.assert_close(run(norm, x), x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), **CLOSE)
    torch.testing.assert_close(run(norm.scaled(-2.0).shifted(3.0), x), 3 - 2 * run(norm, x), **CLOSE)
    window = ConvSpec(1, 1, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1, False)
    pool = Affine.pool(scale, 4, window)
    torch.testing.assert_close(run(pool, x), F.avg_pool2d(x, 3, 2, 1), **CLOSE)


@pytest.mark.parametrize(
    ("first", "second", "how", "why"),
    [
        ({"bias": True}, {"kernel_size": (3, 3), "padding": ((1, 1),) * 2}, "then", "shift"),
        ({"kernel_size": (3, 3)}, {"kernel_size": (3, 3)}, "then", "neither is 1×1"),
        ({"stride": (2, 2)}, {"kernel_size": (3, 3)}, "then", "neither is 1×1"),
        ({"kernel_size": (1,), "stride": (1,), "padding": ((0, 0),)}, {}, "then", "does not take"),
        ({"stride": (2, 2)}, {}, "plus", "strides differ"),
        ({"kernel_size": (3, 3)}, {}, "plus", "different sizes"),
        ({"kernel_size": (3, 3), "dilation": (2, 2), "padding": ((2, 2),) * 2}, "three", "plus", "different grids"),
        ({"padding": ((0, 1), (0, 1)), "dilation": (2, 2), "kernel_size": (3, 3)}, None, "symmetric", "one side"),
    ],
)
def test_what_is_no_convolution(first: dict, second: dict | str | None, how: str, why: str) -> None:
    three = {"kernel_size": (3, 3), "padding": ((1, 1), (1, 1))}

    def made(facts: dict) -> Affine:
        plain = {"kernel_size": (1, 1), "stride": (1, 1), "padding": ((0, 0),) * 2, "dilation": (1, 1), "bias": False}
        spec = ConvSpec(4, 4, **(plain | facts))
        return Affine(spec, torch.randn(spec.weight_shape), torch.randn(4) if spec.bias else None)

    others = [] if second is None else [made(three if second == "three" else second)]
    with pytest.raises(NotExact, match=why) as error:
        getattr(made(first), how)(*others)
    assert error.value.padding is (why == "shift")
