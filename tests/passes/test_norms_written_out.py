"""Norms whose code computes scale and shift from buffers fold, however they are written, and only they."""

from __future__ import annotations

import pytest
import torch
from check_passes import check_pass
from torch import Tensor, nn
from torch.nn import functional as F

import pwrewrite
from pwrewrite.core.plan import SkipReason
from pwrewrite.passes import FoldBatchNorm


class Buffers(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        for name, value in (("weight", torch.rand(n) + 0.5), ("bias", torch.randn(n))):
            self.register_buffer(name, value)
        for name, value in (("running_mean", torch.randn(n)), ("running_var", torch.rand(n) + 0.5)):
            self.register_buffer(name, value)
        self.eps = 1e-5


class TwoWays(Buffers):
    """One way where a gradient is wanted, another one where not."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            k = self.weight * (self.running_var + self.eps).rsqrt()
            return x * k[None, :, None, None] + (self.bias - self.running_mean * k)[None, :, None, None]
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class NoEps(Buffers):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.running_var.rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


class ScaleAndShift(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(n, 1, 1) + 0.5), nn.Parameter(torch.randn(n, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.beta


class ScaleOnly(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(1, n, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(self.gamma)


class GradientDecides(Buffers):
    """Something else where a gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1)
        return x * scale * 2 if x.requires_grad else x * scale


class Squares(nn.Module):
    """Looks like a norm and is none."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(n, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x * self.gamma)


class MixesPositions(nn.Module):
    """One number a column, not a channel."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(n) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), kind(8), nn.ReLU(), nn.Conv2d(8, 8, 1), kind(8)).eval()


X = torch.randn(2, 3, 10, 10)


@pytest.mark.parametrize("kind", [TwoWays, NoEps, ScaleAndShift, ScaleOnly])
def test_folds(kind: type[nn.Module]) -> None:
    model = network(kind)
    check_pass(FoldBatchNorm(), model, X, edits={"1": "fold", "4": "fold"}, skips={})
    fused = pwrewrite.fuse(model, X, thorough=False)
    assert fused.report.passed
    assert fused.after["kernels"] == 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (GradientDecides, SkipReason.OVERRIDDEN_FORWARD),
        (Squares, SkipReason.SEVERAL_READERS),
        (MixesPositions, SkipReason.OVERRIDDEN_FORWARD),
    ],
)
def test_something_else_stays(kind: type[nn.Module], reason: SkipReason) -> None:
    check_pass(FoldBatchNorm(), network(kind), X, edits={}, skips={"1": reason, "4": reason})


def test_a_saved_plan_does_the_same() -> None:
    model = network(TwoWays)
    fused = pwrewrite.fuse(model, X, thorough=False)
    again = pwrewrite.apply(model, pwrewrite.Plan.from_json(fused.plan.to_json()))
    with torch.no_grad():
        torch.testing.assert_close(again(X), fused.model(X), rtol=0, atol=0)
