"""Convolutions whose own code only runs a padding that they hold, as networks that come from TensorFlow have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pwrewrite


class Padded(nn.Conv2d):
    """Pads by a module of its own, by as much as one size of images needs."""

    def __init__(self, *args: Any, pads: tuple[int, int, int, int] | None, value: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before = nn.Identity() if pads is None else nn.ConstantPad2d(pads, value)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Doubled(Padded):
    """Does more than pad."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


def network(last: type[Padded] = Padded, **settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        Padded(3, 32, 3, stride=2, bias=False, pads=(0, 1, 0, 1)),
        nn.BatchNorm2d(32),
        nn.SiLU(),
        Padded(32, 64, 3, pads=(1, 1, 1, 1)),
        nn.BatchNorm2d(64),
        nn.SiLU(),
        Padded(64, 64, 3, padding=1, pads=(2, 2, 0, 0)),
        nn.ReLU(),
        last(64, 32, 1, pads=None, **settings),
        nn.ReLU(),
    )
    return model.eval()


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_they_are_fused_as_plain_ones(tmp_path: Path) -> None:
    model = network()
    fused = pwrewrite.fuse(model, X)
    assert fused.report.passed
    assert not fused.report.skips
    done = [(edit.op.action, edit.path) for edit in fused.edits]
    assert [path for action, path in done if action == "fuse"] == ["0.1", "3", "6", "8"]
    assert "2 norms folded, 4 layers fused, 4 layers made plain" in str(fused.report)
    torch.testing.assert_close(fused.model(X), model(X), atol=1e-5, rtol=1e-4)
    fused.save(tmp_path / "fused")
    loaded = pwrewrite.load(tmp_path / "fused", network())
    assert torch.equal(loaded(X), fused.model(X))


def test_a_budget_takes_them(tmp_path: Path) -> None:
    made = pwrewrite.rewrite(network(), X, budget={"macs": 0.6})
    assert made.report.passed
    made.save(tmp_path / "small")
    assert torch.equal(pwrewrite.load(tmp_path / "small", network())(X), made.model(X))


@pytest.mark.parametrize(("last", "settings"), [(Doubled, {}), (Padded, {"padding_mode": "reflect"})])
def test_what_does_more_is_left(last: type[Padded], settings: dict[str, Any]) -> None:
    model = network(last, **settings)
    fused = pwrewrite.fuse(model, X)
    assert fused.report.passed
    assert type(fused.model.get_submodule("8")) is last
    torch.testing.assert_close(fused.model(X), model(X), atol=1e-5, rtol=1e-4)


def test_other_values_than_zero_are_left() -> None:
    model = nn.Sequential(Padded(3, 32, 3, pads=(1, 1, 1, 1), value=1.0), nn.ReLU()).eval()
    fused = pwrewrite.fuse(model, X)
    assert type(fused.model[0]) is Padded
    assert torch.equal(fused.model(X), model(X))
