"""Weight standardisation folds into the weight; activations at the head of a module behind a layer fuse with it."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from check_passes import check_pass
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pwrewrite.core.errors import PwrewriteError
from pwrewrite.core.plan import Plan, SkipReason
from pwrewrite.edit.apply import apply
from pwrewrite.layers import PointwiseActivation
from pwrewrite.passes import FoldBatchNorm, FusePointwiseActivation, Pass
from pwrewrite.targets import load
from pwrewrite.workflows.fuse import fuse
from pwrewrite.workflows.rewrite import Rewritten

X = torch.randn(2, 4, 9, 10)


class Standard(nn.Conv2d):
    """A convolution that normalises its weight in each call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels) + 0.5)

    def weigh(self) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(flat, None, None, self.gain, training=True, momentum=0.0).reshape_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weigh(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class Same(Standard):
    """The same with TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for n, k, s in reversed(list(zip(x.shape[-2:], self.kernel_size, self.stride))):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class Squared(Standard):
    """One that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * x)


class Depends(Standard):
    """One whose weight depends on what it is given."""

    def weigh(self) -> Tensor:
        return super().weigh() * self.factor

    def forward(self, x: Tensor) -> Tensor:
        self.factor = x.shape[-1] / 10
        return super().forward(x)


class Gamma(nn.Module):
    """timm's GammaAct: not nothing but its activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x).mul_(1.7)


def checked(model: nn.Module, passes: list[Pass] | None = None) -> Rewritten:
    model.eval()
    done = fuse(model, X, passes, thorough=True)
    assert done.report.passed, done.report.verification
    for x in (X, torch.randn(1, 4, 12, 11)):
        with torch.no_grad():
            torch.testing.assert_close(done.model(x), model(x), rtol=1e-4, atol=1e-5)
    return done


def test_layers_that_share_a_gain_are_left_with_the_reason() -> None:
    model = nn.Sequential(Standard(4, 6, 3), nn.ReLU(), Standard(6, 6, 3))
    model[2].gain = model[0].gain
    done = checked(model)
    assert not [edit for edit in done.edits if edit.method == "fold"]
    left = {skip.path: skip for skip in done.plan.skips if skip.reason is SkipReason.SHARED_WEIGHT}
    assert set(left) == {"0", "2"}
    assert left["0"].detail == "0.gain, from which it computes its weight, is also used elsewhere"


@pytest.mark.parametrize(
    "conv",
    [
        Standard(4, 6, 3, padding=1),
        Standard(4, 6, 3, stride=2, bias=False),
        Standard(4, 8, 3, groups=2, dilation=2),
        Same(4, 6, 3, stride=2),
        Same(4, 6, 5, stride=2, bias=False),
    ],
)
def test_a_normalised_weight_is_kept(conv: nn.Conv2d, tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(conv.out_channels)
    norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    model = nn.Sequential(conv, norm, nn.ReLU())
    done = checked(model)
    assert [e.method for e in done.edits][:3] == ["fold", "fold", "relu"]
    assert isinstance(done.model[0], PointwiseActivation)  # type: ignore[index]
    assert list(done.model.state_dict()) == ["0.weight", "0.bias"]
    assert done.edits[0].renamed["0.gain"] == ("0.weight",)
    assert str(done.report).count("1 norm folded, 1 layer fused, 1 weight baked") == 1
    done.save(tmp_path / "out")
    again = load(tmp_path / "out", copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(again(X), done.model(X))


def test_a_stock_layer_comes_out() -> None:
    done = check_pass(FoldBatchNorm(), nn.Sequential(Standard(4, 6, 3)).eval(), X, edits={"0": "fold"}, skips={})
    assert type(done.model[0]) is nn.Conv2d  # type: ignore[index]
    model = nn.Sequential(conv := Standard(4, 4, 1), nn.Tanh(), conv).eval()
    double = check_pass(FoldBatchNorm(), model, X, edits={"0": "fold"}, skips={})
    assert double.model[0] is double.model[2]  # type: ignore[index]


@pytest.mark.parametrize("conv", [Squared(4, 6, 3), Depends(4, 6, 3)])
def test_what_does_more_stays(conv: nn.Module) -> None:
    skips = {"0": SkipReason.OVERRIDDEN_FORWARD}
    check_pass(FoldBatchNorm(), nn.Sequential(conv).eval(), X, edits={}, skips=skips)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Standard(4, 6, 3), Standard(4, 6, 3)
        self.b.gain = self.a.gain

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


def test_shared_and_hooked_ones_stay() -> None:
    check_pass(FoldBatchNorm(), Tied().eval(), X, edits={})
    model = nn.Sequential(Standard(4, 6, 3)).eval()
    model[0].register_forward_hook(lambda m, i, o: o * 2)
    check_pass(FoldBatchNorm(), model, X, edits={}, skips={"0": SkipReason.HOOKS})


def test_timm_layers() -> None:
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(
        layers.ScaledStdConv2dSame(4, 6, 3, stride=2), nn.SiLU(), layers.ScaledStdConv2d(6, 6, 3), nn.ReLU()
    )
    done = checked(model)
    assert Counter(e.op.action for e in done.edits) == {"fold": 2, "fuse": 2}
    assert not done.plan.skips or {str(s.reason) for s in done.plan.skips} == {"no-gain"}


def test_an_activation_at_the_head_of_a_module() -> None:
    check_pass(
        FusePointwiseActivation(), nn.Sequential(nn.Conv2d(4, 6, 3), nn.Dropout(), nn.GELU()).eval(), X, edits={}
    )
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Identity(), Gamma()).eval()
    done = check_pass(FusePointwiseActivation(), model, X)
    (edit,) = done.edits
    assert (edit.method, edit.kind, edit.graph_module) == ("gelu", "graph", "2")
    assert isinstance(done.model[2], fx.GraphModule)  # type: ignore[index]


class Both(Gamma):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) + torch.sin(x)


class Later(Gamma):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + 1)


def test_what_is_not_at_the_head() -> None:
    shared = Gamma()
    twice = nn.Sequential(nn.Conv2d(4, 6, 3), shared, nn.Conv2d(6, 6, 3), nn.Sin() if hasattr(nn, "Sin") else nn.ELU())
    for model in (
        nn.Sequential(*twice, shared),
        nn.Sequential(nn.Conv2d(4, 4, 1), shared, nn.Conv2d(4, 4, 1), shared),
        nn.Sequential(nn.Conv2d(4, 6, 3), Both()),
        nn.Sequential(nn.Conv2d(4, 6, 3), Later()),
    ):
        check_pass(FusePointwiseActivation(), model.eval(), X, edits={})
    hooked = nn.Sequential(nn.Conv2d(4, 6, 3), Gamma())
    hooked[1].register_forward_pre_hook(lambda m, args: None)
    check_pass(FusePointwiseActivation(), hooked.eval(), X, edits={})


def test_errors_of_edited_plans() -> None:
    model = nn.Sequential(Standard(4, 6, 3), Gamma()).eval()
    text = fuse(model, X, [FoldBatchNorm(), FusePointwiseActivation()], verify=False).plan.to_json()
    for old, new, said in (
        ('"out_channels": 6', '"out_channels": 7', "another layer"),
        ('"same": false', '"same": true', "does more than normalise"),
        ('"scope": "1"', '"scope": "0"', "does not apply gelu"),
        ('"activation": "gelu"', '"activation": "relu"', "does not apply relu"),
    ):
        assert old in text
        with pytest.raises(PwrewriteError, match=said):
            apply(model, Plan.from_json(text.replace(old, new, 1)))
