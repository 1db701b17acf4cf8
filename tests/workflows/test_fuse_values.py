"""Fused models and values: NaN and Inf, code that decides by value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pwrewrite.layers import PointwiseActivation, kernels
from pwrewrite.passes import FusePointwiseActivation
from pwrewrite.workflows.fuse import fuse

pytestmark = pytest.mark.skipif(torch.float32 not in kernels.CPU_DTYPES, reason="no oneDNN on this machine")


def relus() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU6(), nn.Conv2d(16, 16, 1), nn.Hardtanh()).eval()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay(bad: float) -> None:
    model, x = relus(), torch.randn(1, 3, 8, 8)
    fused = fuse(model, x)
    assert fused.report.passed
    assert not fused.report.notes
    one = x.clone()
    one[0, 0, 4, 4] = bad
    with torch.no_grad():
        for given in (one, torch.full_like(x, bad)):
            for _ in range(5):
                torch.testing.assert_close(fused.model(given), model(given), equal_nan=True, atol=1e-5, rtol=1e-4)


def flags(model: nn.Module) -> set[bool]:
    return {m.keep_nan for m in model.modules() if isinstance(m, PointwiseActivation)}


def test_where_keeping_nan_costs_time_the_report_says_so() -> None:
    model, large = relus(), torch.randn(1, 3, 320, 320)  # maps of 6.6 MB
    fast = fuse(model, large, verify=False)
    assert flags(fast.model) == {False}
    assert "NaN may become a number" in " ".join(fast.report.notes)
    kept = fuse(model, large, keep_nan=True, verify=False)
    assert flags(kept.model) == {True}
    assert not kept.report.notes
    assert flags(fuse(model, torch.randn(1, 3, 8, 8), keep_nan=False, verify=False).model) == {False}
    by_pass = fuse(model, large, [FusePointwiseActivation(keep_nan=True)], verify=False)
    assert flags(by_pass.model) == {True}


class Decides(nn.Module):
    """Chooses by a value, behind convolutions of any number of dimensions."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.a, self.n, self.b = conv(1, 8, 3, padding=1), norm(8), conv(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n(self.a(x)))
        if x.sum() > 0:
            x = x * 1.5
        out: Tensor = self.b(x)
        return out


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_any_dimension_decide_by_value(dims: int) -> None:
    model, x = Decides(dims).eval(), torch.randn(1, 1, *[8] * dims)
    fused = fuse(model, x)
    assert fused.report.passed
    with torch.no_grad():
        torch.testing.assert_close(fused.model(x), model(x), atol=1e-5, rtol=1e-4)
