"""Copies of models that hold tensors with a gradient history."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm, weight_norm

import pwrewrite
from pwrewrite.core.nested import deep_copy


class Remembers(nn.Module):
    """Keeps what it computed, as code for visualisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 4, 3), dict[str, list[Tensor]]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        self.seen["maps"] = [y]
        self.last = y.mean()
        return y


def test_what_a_run_left_behind_is_copied_by_value() -> None:
    model = Remembers()
    model(torch.randn(1, 3, 8, 8))
    copied = deep_copy(model)
    assert copied.last is not model.last
    assert not copied.last.requires_grad
    torch.testing.assert_close(copied.seen["maps"], [model.seen["maps"][0].detach()])
    assert model.last.grad_fn is not None
    assert copied.conv.weight is not model.conv.weight
    assert copied.conv.weight.requires_grad


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
@pytest.mark.parametrize("ran", [False, True])
def test_a_fresh_model_with_an_old_norm_is_fused_and_rewritten(norm: object, ran: bool) -> None:
    assert callable(norm)
    model = nn.Sequential(norm(nn.Conv2d(3, 16, 3)), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    model.eval()
    x = torch.randn(1, 3, 16, 16)
    if ran:
        model(x)
    fused = pwrewrite.fuse(model, x, thorough=False)
    assert fused.report.passed
    assert [edit.path for edit in fused.edits if edit.method == "relu"] == ["3"]
    left = {skip.path: skip.detail for skip in fused.plan.skips}
    assert "computed from other tensors" in left["1"]
    with torch.no_grad():
        torch.testing.assert_close(fused.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert pwrewrite.rewrite(model, x, [pwrewrite.passes.InsertBottleneck(0.25)], thorough=False).report.passed
