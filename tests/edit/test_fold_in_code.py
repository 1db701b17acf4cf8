"""`FoldBatchNorm` on norms that a module's code calls as functions: a graph edit of that module alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pwrewrite.core.errors import PwrewriteError
from pwrewrite.core.plan import Plan
from pwrewrite.edit.apply import apply
from pwrewrite.layers import PointwiseActivation
from pwrewrite.passes import FoldBatchNorm, Pass
from pwrewrite.targets import load
from pwrewrite.workflows.fuse import fuse
from pwrewrite.workflows.rewrite import Rewritten

X = torch.randn(2, 4, 8, 8)


class Own(nn.Module):
    """A norm that holds its own statistics."""

    def __init__(self, channels: int = 6, affine: bool = True, eps: float = 0.1) -> None:
        super().__init__()
        self.conv, self.eps = nn.Conv2d(4, channels, 3, bias=False), eps
        self.scale = nn.Parameter(torch.rand(channels) + 0.5) if affine else None
        self.shift = nn.Parameter(torch.randn(channels)) if affine else None
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)
        self.drop = nn.Dropout()

    def norm(self, x: Tensor, **kwargs: Any) -> Tensor:
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(x, mean, var, weight=self.scale, bias=self.shift, eps=self.eps, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x), training=self.training))


class Held(nn.Module):
    """A norm module that only holds what the function reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.bn.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
        self.bn.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.1, 1e-5)


class Before(Own):
    """Before the convolution."""

    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(F.relu(x)))  # type: ignore[no-any-return]


def checked(model: nn.Module, passes: list[Pass] | None = None) -> Rewritten:
    model.eval()
    done = fuse(model, X, passes, thorough=True)
    assert done.report.passed, done.report.verification
    with torch.no_grad():
        torch.testing.assert_close(done.model(X), model(X), rtol=1e-4, atol=1e-5)
    return done


@pytest.mark.parametrize("model", [Own(), Own(affine=False), Held(), Before()])
def test_a_call_folds(model: nn.Module, tmp_path: Path) -> None:
    whole = nn.Sequential(nn.Conv2d(4, 4, 1), model)
    done = checked(whole, [FoldBatchNorm()])
    (edit,) = done.edits
    assert (edit.kind, edit.graph_module, edit.exact) == ("graph", "1", "eval")
    assert type(done.model) is nn.Sequential
    inner = done.model[1]
    assert isinstance(inner, fx.GraphModule)
    assert not [n for n in inner.graph.nodes if n.target is F.batch_norm or n.op == "get_attr"]
    assert sorted(done.model.state_dict()) == ["0.bias", "0.weight", "1.conv.bias", "1.conv.weight"]
    assert edit.op.estimate is not None
    assert edit.op.estimate.params_after == sum(p.numel() for p in inner.parameters())
    done.save(tmp_path / "out")
    again = load(tmp_path / "out", copy.deepcopy(whole))
    with torch.no_grad():
        assert torch.equal(again(X), done.model(X))


def test_what_follows_fuses() -> None:
    done = checked(nn.Sequential(nn.Conv2d(4, 4, 1), Own()))
    assert isinstance(done.model[1].conv, PointwiseActivation)  # type: ignore[index]
    assert [e.method for e in done.edits] == ["fold", "merge", "relu"]


class Shared(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.norm(self.conv(x + 1))


class Watched(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.get_buffer("running_mean").mean()


class Batch(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), training=True)


class Computed(Own):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(self.conv(x), mean, var * 2)


class Called(Held):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(x.mean(1, keepdim=True).expand(-1, 6, -1, -1))
        return super().forward(x) + out[:, :, 2:, 2:]


class Differs(Own):
    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        return out * 2 if self.training else out


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Shared, "shared-weight"),
        (Watched, "shared-weight"),
        (Batch, "no-statistics"),
        (Computed, "functional"),
        (Called, "shared-weight"),
        (Differs, "not-traced"),
    ],
)
def test_what_must_stay(kind: type[nn.Module], reason: str) -> None:
    done = checked(nn.Sequential(kind()), [FoldBatchNorm()])
    assert not done.edits
    assert reason in {str(skip.reason) for skip in done.plan.skips}


def test_statistics_that_two_modules_hold() -> None:
    first, second = Own(4), Own(4)
    first.scale = second.scale
    done = checked(nn.Sequential(first, second), [FoldBatchNorm()])
    assert not done.edits


def test_errors_of_edited_plans() -> None:
    model = nn.Sequential(Own()).eval()
    text = fuse(model, X, [FoldBatchNorm()]).plan.to_json()
    for old, new, said in (
        ('"scope": "0"', '"scope": "7"', "no module"),
        ('"scope": "0"', '"scope": 7', "scope is not a string"),
        ('"eps": 0.1', '"eps": 0.2', "the eps of the call"),
        ('"eps": 0.1', '"eps": "x"', "eps is not a number"),
        ('"weight": "0.scale"', '"weight": "0.scales"', "no such tensor"),
        ('"weight": "0.scale"', '"weight": "0.shift"', "is another one"),
        ('"running_mean": "0.running_mean"', '"running_mean": 3', "running_mean is not a string"),
    ):
        assert old in text
        with pytest.raises(PwrewriteError, match=said):
            apply(model, Plan.from_json(text.replace(old, new)))
