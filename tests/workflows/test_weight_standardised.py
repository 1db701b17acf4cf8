"""Convolutions that standardise their weight in each call: rewritten, fused or left with a reason, never an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pwrewrite
from pwrewrite import passes
from pwrewrite.core.errors import RefusedError


class Centred(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class ByBatchNorm(nn.Conv2d):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, weight=self.gain, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ByStd(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Residual(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class Loop(Residual):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.relu(self.conv(x))
        return x


class Normed(Residual):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__(conv)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


@pytest.mark.parametrize("kind", [Centred, ByBatchNorm, ByStd])
@pytest.mark.parametrize("around", [Residual, Loop, Normed])
@pytest.mark.parametrize(
    "settings",
    [{"padding": 1}, {"padding": 1, "padding_mode": "reflect"}, {"padding": "same", "bias": False}],
    ids=str,
)
def test_they_pass_or_are_left_with_a_reason(
    kind: type[nn.Conv2d], around: type[Residual], settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, x = around(kind(4, 4, 3, **settings)).eval(), torch.randn(1, 4, 8, 8)
    fused = pwrewrite.fuse(model, x)
    assert fused.report.passed
    assert fused.edits or fused.report.skips
    result = pwrewrite.rewrite(model, x, [passes.InsertReduction(2)])
    assert result.report.passed
    assert result.report.skips


@pytest.mark.parametrize("kind", [Centred, ByBatchNorm, ByStd])
def test_baked_they_are_made_smaller(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    layers = [kind(16, 16, 3, padding=1), nn.ReLU(), Residual(kind(16, 16, 3, padding=1)), kind(16, 16, 3, padding=1)]
    model, inputs = nn.Sequential(*layers).eval(), torch.randn(32, 16, 8, 8)
    with pytest.raises(RefusedError, match=r"3 parametrized[\s\S]*--bake"):
        pwrewrite.rewrite(model, inputs[:1], pwrewrite.Budget({"macs": 0.5}, calibration=inputs))
    result = pwrewrite.rewrite(model, inputs[:1], pwrewrite.Budget({"macs": 0.5}, calibration=inputs, bake=True))
    assert result.report.passed
    assert result.report.after["macs"] <= result.report.before["macs"] / 2
    assert not any(isinstance(module, kind) for module in result.model.modules())


def test_what_the_input_decides_is_not_baked() -> None:
    class ByInput(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * x.mean(), self.bias, padding=1)

    model, x = Residual(ByInput(4, 4, 3, padding=1)).eval(), torch.randn(1, 4, 8, 8)
    result = pwrewrite.rewrite(model, x, [passes.FoldBatchNorm()])
    assert not result.edits
    assert [skip.reason for skip in result.report.skips] == ["overridden-forward"]


def test_no_remedy_is_named_that_is_none() -> None:
    class Sound(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(x, self.weight - self.weight.mean(), self.bias, padding=1)

    model, x = Residual(Sound(4, 4, 3, padding=1)).eval(), torch.randn(1, 4, 8)
    (skip,) = pwrewrite.rewrite(model, x, [passes.InsertReduction(2)]).report.skips
    assert skip.reason == "overridden-forward"
    assert "bake" not in skip.detail
