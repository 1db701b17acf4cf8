"""An activation that all blocks share is fused as one of each block's own would be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pwrewrite


class Conv(nn.Module):
    """Convolution, norm and activation, as detection packages have it: one SiLU for the whole class."""

    default = nn.SiLU()

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, own: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn, self.act = nn.BatchNorm2d(outputs), nn.SiLU() if own else self.default

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class C2f(nn.Module):
    """Two chained bottlenecks, all of whose maps are concatenated."""

    def __init__(self, channels: int, own: bool) -> None:
        super().__init__()
        self.half = channels // 2
        self.cv1, self.cv2 = Conv(channels, channels, 1, own=own), Conv(2 * channels, channels, 1, own=own)
        self.m = nn.ModuleList(nn.Sequential(Conv(self.half, self.half, own=own)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.cv1(x).split((self.half, self.half), 1))
        for block in self.m:
            maps.append(maps[-1] + block(maps[-1]))
        y: Tensor = self.cv2(torch.cat(maps, 1))
        return y


def detector(own: bool) -> nn.Module:
    return nn.Sequential(Conv(3, 16, stride=2, own=own), C2f(16, own), Conv(16, 32, stride=2, own=own), C2f(32, own))


def sequential(own: bool) -> nn.Module:
    shared = nn.ReLU()

    def block(inputs: int, outputs: int) -> nn.Sequential:
        act = nn.ReLU() if own else shared
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), act)

    return nn.Sequential(block(3, 8), block(8, 8), nn.Sequential(block(8, 8)))


class Residual(nn.Module):
    """One activation at two places of a container, which runs twice, before a sum."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        shared = nn.ReLU()
        first, second = (nn.ReLU() if own else shared for _ in range(2))
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), first, nn.Conv2d(16, 16, 1), second)
        self.last = nn.Sequential(shared, nn.Conv2d(16, 16, 1), nn.Identity(), nn.Conv2d(16, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.last(self.body(self.body(x))) + x)
        return y


def residual(own: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Residual(own), Residual(own))


@pytest.mark.parametrize("build", [detector, sequential, residual])
def test_as_good_as_with_its_own(build: Callable[[bool], nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    kernels = {}
    for own in (True, False):
        model = build(own).eval()
        fused = pwrewrite.fuse(model, x, thorough=False)
        assert fused.report.passed
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.model.modules())
        kernels[own] = fused.after["kernels"]
        with torch.no_grad():
            torch.testing.assert_close(fused.model(x), model(x), rtol=1e-4, atol=1e-4)
    assert kernels[True] == kernels[False]


def test_a_sum_behind_a_container_that_holds_an_activation_twice_is_fused() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            act = nn.PReLU()
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), act, nn.Conv2d(8, 8, 1), act, nn.Conv2d(8, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x) + x
            return y

    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), Sum()).eval(), torch.randn(1, 3, 12, 12)
    fused = pwrewrite.fuse(model, x, thorough=False)
    assert fused.report.passed
    assert [edit.method for edit in fused.edits if edit.path == "1.body.4"] == ["add"]


def test_one_that_is_also_called_elsewhere_stays_there() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), self.act)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.act(self.body(x) - 1)
            return y

    model, x = Twice().eval(), torch.randn(1, 3, 8, 8)
    fused = pwrewrite.fuse(model, x, thorough=False)
    assert fused.report.passed
    assert isinstance(fused.model.body[1], nn.Identity)  # type: ignore[index]
    assert isinstance(fused.model.act, nn.ReLU)
    with torch.no_grad():
        torch.testing.assert_close(fused.model(x), model(x))
