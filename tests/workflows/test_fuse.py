"""`fuse`: what is folded and fused, what is left and why, and that outputs stay."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pwrewrite.capturing import capture, info
from pwrewrite.core.errors import PwrewriteError, RefusedError
from pwrewrite.core.plan import Plan
from pwrewrite.layers import PointwiseActivation
from pwrewrite.passes import Pass
from pwrewrite.passes.fold_batch_norm import FoldBatchNorm
from pwrewrite.passes.fuse_activation import FusePointwiseActivation
from pwrewrite.passes.merge_pointwise import MergePointwise
from pwrewrite.targets import load
from pwrewrite.verifying.context import Options
from pwrewrite.workflows.fuse import fuse
from pwrewrite.workflows.rewrite import Rewritten


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small operations on busy cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def lively(model: nn.Module) -> nn.Module:
    """Statistics and affine weights that a fold must not ignore."""
    for m in model.modules():
        for name, low, high in (
            ("weight", 0.5, 1.5),
            ("bias", -1, 1),
            ("running_mean", -1, 1),
            ("running_var", 0.5, 2),
        ):
            tensor = getattr(m, name, None)
            if hasattr(m, "running_var") and isinstance(tensor, Tensor):
                tensor.data.uniform_(low, high)
    return model.eval()


def checked(model: nn.Module, x: Any = None, passes: list[Pass] | None = None, **settings: Any) -> Rewritten:
    """Fuses a model, verified, and compares without gradients, where the fused kernels run."""
    x = torch.randn(2, 4, 10, 10) if x is None else x
    before = {k: v.clone() for k, v in model.state_dict().items()}
    done = fuse(model, x, passes, thorough=settings.pop("thorough", False), **settings)
    assert done.report.verification is not None
    assert done.report.passed, done.report.verification.failures
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        # A few layers of float32 sums in another order; norms here may scale by 1.5.
        torch.testing.assert_close(done.model(x), model(x), rtol=1e-4, atol=1e-5)
    return done


def left(model: nn.Module, x: Any = None) -> Counter[str]:
    found = capture(model, torch.randn(2, 4, 10, 10) if x is None else x)
    return Counter(info(n).op for n in found.graph.nodes if not isinstance_fused(model, info(n).path))


def isinstance_fused(model: nn.Module, path: str) -> bool:
    return bool(path) and isinstance(model.get_submodule(path), PointwiseActivation)


def reasons(done: Rewritten) -> dict[str, str]:
    return {skip.path: str(skip.reason) for skip in done.plan.skips if skip.path}


# ------------------------------------------------------------------------------------------------------ folding


@pytest.mark.parametrize(
    ("conv", "norm", "shape"),
    [
        (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 8, 8)),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(8, affine=False), (2, 4, 8, 8)),
        (nn.Conv2d(4, 4, 3, padding="same", groups=4), nn.BatchNorm2d(4, eps=0.1), (2, 4, 8, 8)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6), (2, 4, 8, 8)),
        (nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(8), (2, 4, 8, 8)),
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 8)),
        (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
        (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (3, 4)),
        (nn.Conv2d(4, 6, 3, bias=False), nn.SyncBatchNorm(6), (2, 4, 8, 8)),
    ],
)
def test_a_norm_behind_a_layer_folds(conv: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = lively(nn.Sequential(conv, norm))
    done = checked(model, torch.randn(shape), [FoldBatchNorm()])
    assert isinstance(done.model[1], nn.Identity)  # type: ignore[index]
    assert type(done.model[0]) is type(conv)  # type: ignore[index]
    (edit,) = done.edits
    assert (edit.exact, edit.op.estimate.params_after) == ("eval", sum(p.numel() for p in done.model.parameters()))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=4),
    ],
)
def test_a_norm_before_a_layer_folds_where_the_padding_allows(conv: nn.Module) -> None:
    done = checked(lively(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), conv)), passes=[FoldBatchNorm()])
    assert isinstance(done.model[1], nn.Identity)  # type: ignore[index]
    model = lively(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    assert len(checked(model, torch.randn(2, 5), [FoldBatchNorm()]).edits) == 1


def test_norms_on_both_sides_of_a_layer_fold() -> None:
    model = lively(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)))
    assert [e.path for e in checked(model, passes=[FoldBatchNorm()]).edits] == ["1", "3"]


class Frozen(nn.Module):
    def __init__(self, channels: int, power: float = -0.5) -> None:
        super().__init__()
        self.eps, self.power = 1e-5, power
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps) ** self.power  # type: ignore[operator]
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)  # type: ignore[operator]


def test_norms_are_known_by_what_they_are() -> None:
    done = checked(lively(nn.Sequential(nn.Conv2d(4, 6, 3), Frozen(6))), passes=[FoldBatchNorm()])
    assert isinstance(done.model[1], nn.Identity)  # type: ignore[index]
    done = checked(lively(nn.Sequential(nn.Conv2d(4, 6, 3), Frozen(6, -1.0))), passes=[FoldBatchNorm()])
    assert isinstance(done.model[1], nn.Identity)  # type: ignore[index]  # no batch norm, but a scale and a shift


def test_timm_and_torchvision_norms() -> None:
    layers = pytest.importorskip("timm.layers")
    misc = pytest.importorskip("torchvision.ops.misc")
    model = lively(nn.Sequential(nn.Conv2d(4, 6, 3), layers.BatchNormAct2d(6, act_layer=nn.SiLU), nn.Conv2d(6, 4, 1), misc.FrozenBatchNorm2d(4)))  # fmt: skip # noqa: E501
    done = checked(model)
    assert Counter(e.op.action for e in done.edits) == {"fold": 2, "fuse": 1}
    assert not reasons(done)
    tanh = layers.GELUTanh  # a module of timm's own, with a forward of its own
    done = checked(lively(nn.Sequential(nn.Conv2d(4, 6, 3), layers.BatchNormAct2d(6, act_layer=tanh))))
    assert Counter(e.op.action for e in done.edits) == {"fold": 1, "fuse": 1}


class Same(nn.Conv2d):
    """TensorFlow's padding, as timm's Conv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for n, k, s in reversed(list(zip(x.shape[-2:], self.kernel_size, self.stride))):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


def test_layers_that_pad_as_tensorflow() -> None:
    model = lively(nn.Sequential(Same(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU()))
    done = checked(model)
    assert Counter(e.op.action for e in done.edits) == {"fold": 1, "fuse": 1}
    for size in ((9, 9), (6, 11)):
        x = torch.randn(1, 4, *size)
        with torch.no_grad():
            torch.testing.assert_close(done.model(x), model(x), rtol=1e-4, atol=1e-5)
    layers = pytest.importorskip("timm.layers")
    model = lively(nn.Sequential(layers.Conv2dSame(4, 6, 5, stride=2, bias=False), layers.BatchNormAct2d(6)))
    done = checked(model)
    assert Counter(e.op.action for e in done.edits) == {"fold": 1, "fuse": 1}


class Odd(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.flip(2), self.weight, self.bias, self.stride)


def test_layers_that_do_something_else_by_their_own_code() -> None:
    done = checked(nn.Sequential(Odd(4, 6, 3), nn.ReLU()).eval())
    assert reasons(done)["0"] == "overridden-forward"


class Twice(nn.Module):
    """pytorch#104593: one convolution, called with a norm behind it and without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.relu(self.norm(self.conv(x))))


class Read(Twice):
    """The convolution's output goes elsewhere, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.relu(self.norm(y)) * y


class NormTwice(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.relu(self.norm(self.conv(x))))


class NormOfTwo(Twice):
    """One norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.other(x))


class Thrice(Twice):
    """Two of three calls of a convolution are normalised."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.conv(-x)) + self.conv(x * 2)


class ReadOnce(Twice):
    """One of two calls of a convolution is read elsewhere, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + self.norm(self.conv(-x)) + y


class Tied(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x))) + self.other(x)


class WeightRead(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x))) * self.conv.weight.mean()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Twice, "called-twice"),
        (Read, "several-readers"),
        (NormTwice, "called-twice"),
        (NormOfTwo, "called-twice"),
        (Thrice, "called-twice"),
        (ReadOnce, "several-readers"),
        (Tied, "shared-weight"),
        (WeightRead, "weight-read"),
    ],
)
def test_what_must_not_fold(kind: type[nn.Module], reason: str) -> None:
    done = checked(lively(kind()))
    assert reasons(done)["norm"] == reason
    assert not any(e.op.action == "fold" for e in done.edits)


class Siamese(Twice):
    """One encoder for two inputs, of which the second is smaller."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.relu(self.norm(self.conv(t))) for t in (x, x[..., 2:]))
        return torch.cat((a, b), -1)


def test_a_pair_that_is_called_twice_folds() -> None:
    model = lively(Siamese())
    done = checked(model, thorough=True)
    assert {(e.op.action, e.op.path) for e in done.edits} >= {("fold", "norm"), ("fuse", "conv")}
    assert done.report.after["params"] == sum(p.numel() for p in model.conv.parameters())  # type: ignore[union-attr]
    assert not left(done.model)["batch_norm"]
    assert not left(done.model)["relu"]


def test_other_reasons_not_to_fold() -> None:
    def reason(*layers: nn.Module, x: Any = None) -> str:
        done = checked(lively(nn.Sequential(*layers)), x, [FoldBatchNorm()])
        assert not done.edits
        return reasons(done)["1"]

    conv = nn.Conv2d(4, 4, 3, padding=1)
    assert reason(conv, nn.BatchNorm2d(4, track_running_stats=False)) == "no-statistics"
    assert reason(nn.ReLU(), nn.BatchNorm2d(4), conv) == "padding"
    assert reason(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()) == "not-behind-layer"
    assert reason(nn.Linear(10, 10), nn.BatchNorm2d(4)) == "not-behind-layer"
    hooked = nn.BatchNorm2d(4)
    hooked.register_forward_hook(lambda m, i, o: o * 2)
    assert reason(conv, hooked) == "hooks"
    assert reason(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)) == "parametrized"


# ------------------------------------------------------------------------------------------------------- fusing


# ------------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize(
    ("first", "second", "shape"),
    [
        (nn.Conv2d(4, 16, 1), nn.Conv2d(16, 6, 1, stride=2), (2, 4, 10, 10)),
        (nn.Conv2d(4, 16, 1, stride=2), nn.Conv2d(16, 6, 1, bias=False), (2, 4, 10, 10)),
        (nn.Conv2d(4, 32, 1, bias=False), nn.Conv2d(32, 6, 3, padding=1, stride=2, dilation=2), (2, 4, 10, 10)),
        (nn.Conv2d(4, 32, 1), nn.Conv2d(32, 6, (1, 3)), (2, 4, 10, 10)),
        (nn.Conv2d(4, 32, 1), nn.Conv2d(32, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 10, 10)),
        (nn.Conv2d(4, 32, 3, padding=1, stride=2), nn.Conv2d(32, 6, 1, stride=2), (2, 4, 10, 10)),
        (nn.Conv1d(4, 32, 3, padding=1), nn.Conv1d(32, 6, 1), (2, 4, 10)),
        (nn.Linear(10, 32), nn.Linear(32, 3), (2, 4, 10)),
    ],
)
def test_neighbours_merge(first: nn.Module, second: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(first, nn.Dropout(), second).eval()
    done = checked(model, torch.randn(shape), [MergePointwise()], thorough=True)
    assert [e.method for e in done.edits] == ["merge"]
    assert isinstance(done.model[0], nn.Identity)  # type: ignore[index]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.Conv2d(4, 32, 1), nn.Conv2d(32, 6, 3, padding=1)),  # zeros where the bias is
        (nn.Conv2d(4, 32, 1, stride=2), nn.Conv2d(32, 6, 3)),
        (nn.Conv2d(4, 32, 1, bias=False), nn.Conv2d(32, 8, 3, groups=2)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),
        (nn.Conv2d(4, 1, 1), nn.Conv2d(1, 4, 1)),  # a bottleneck that pays
        (nn.Conv2d(4, 32, (1, 2), padding="same"), nn.Conv2d(32, 6, 1, stride=2)),  # uneven and strided
    ],
)
def test_neighbours_that_stay(first: nn.Module, second: nn.Module) -> None:
    assert not checked(nn.Sequential(first, second).eval(), passes=[MergePointwise()]).edits


def test_a_pointless_bottleneck_is_taken_back(tmp_path: Path) -> None:
    from pwrewrite.passes import InsertBottleneck
    from pwrewrite.workflows.rewrite import rewrite

    x = torch.randn(2, 8, 10, 10)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    wide = rewrite(model, x, [InsertBottleneck(8, allow_growth=True)])
    assert wide.edits
    done = checked(wide.model, x)
    assert Counter(e.op.action for e in done.edits)["merge"] == 2
    assert sum(p.numel() for p in done.model.parameters()) == 8 * 8 * 9 + 8
    done.save(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out", wide.model)(x), done.model(x))


class Calls(nn.Module):
    """An activation as one kind of call behind one convolution."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 6, 3), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)).flatten(1)


@pytest.mark.parametrize(
    ("act", "method"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.Hardtanh(-0.5, 0.5), "hardtanh"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.LeakyReLU(0.3, inplace=True), "leaky_relu"),
        (nn.SiLU(), "silu"),
        (nn.Hardswish(), "hardswish"),
        (nn.Hardsigmoid(), "hardsigmoid"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Tanh(), "tanh"),
        (F.relu, "relu"),
        (torch.relu_, "relu"),
        (lambda x: F.relu(x, inplace=True), "relu"),
        (lambda x: x.relu(), "relu"),
        (lambda x: x.clamp(0, 6), "hardtanh"),
        (lambda x: x.clamp_(min=0.0, max=1.0), "hardtanh"),
        (lambda x: F.hardtanh(x, -2, 2), "hardtanh"),
        (lambda x: F.leaky_relu(x, 0.2), "leaky_relu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (lambda x: F.silu(input=x), "silu"),
        (lambda x: torch.sigmoid(x), "sigmoid"),
    ],
)
def test_every_kind_of_call(act: Any, method: str) -> None:
    done = checked(Calls(act).eval())
    assert [e.method for e in done.edits][:1] == [method]
    assert isinstance(done.model.conv, PointwiseActivation)
    assert left(done.model)[method.removesuffix("_tanh")] == 0


@pytest.mark.parametrize(
    ("act", "path", "reason"),
    [
        (nn.ELU(), "act", "no-kernel"),
        (nn.Mish(), "act", "no-kernel"),
        (F.elu, "elu", "no-kernel"),
        (nn.PReLU(), "act", "no-kernel"),
    ],
)
def test_activations_without_a_kernel_stay(act: Any, path: str, reason: str) -> None:
    done = checked(Calls(act).eval())
    assert reasons(done) == {path: reason}


class Residual(nn.Module):
    """torchvision's block: one relu, called three times, and an addition in place."""

    def __init__(self, down: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if down else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


@pytest.mark.parametrize("down", [False, True])
def test_residual_blocks(down: bool) -> None:
    model = lively(nn.Sequential(nn.Conv2d(4, 4, 1), Residual(down), Residual()))
    done = checked(model, thorough=True)
    assert Counter(e.method for e in done.edits)["add+relu"] == 2
    assert not reasons(done)
    assert type(done.model) is nn.Sequential
    assert all(isinstance(block, fx.GraphModule) for block in list(done.model)[1:])
    assert {e.graph_module for e in done.edits if e.kind == "graph"} == {"1", "2"}
    for shape in ((1, 4, 7, 9), (5, 4, 12, 6)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(done.model(x), model(x), rtol=1e-4, atol=1e-5)


class Inverted(nn.Module):
    """MobileNet's block: the convolution is the last of a child, the addition the parent's."""

    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        self.swapped = swapped
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
            nn.Conv2d(8, 4, 1),
            nn.BatchNorm2d(4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x if self.swapped else x + self.conv(x)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_layer_deeper_than_the_addition(swapped: bool) -> None:
    model = lively(nn.Sequential(Inverted(swapped), nn.Conv2d(4, 4, 1)))
    done = checked(model, thorough=True)
    assert Counter(e.method for e in done.edits)["add"] == 1
    assert list(done.model.state_dict()) == [n for n in model.state_dict() if ".bn" not in n and "running" not in n and "num_b" not in n and not n.startswith(("0.conv.0.1", "0.conv.2"))]  # fmt: skip # noqa: E501


class Written(nn.Module):
    """The convolution's input changes before the addition, which therefore cannot take the convolution along."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.conv, self.way = nn.Conv2d(4, 4, 1), way

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.conv(x)
        if self.way == 0:
            return y + x.mul_(3)
        if self.way == 1:
            x += y
            return x * x
        if self.way == 2:
            return y + y
        return torch.add(y, x, alpha=2)


@pytest.mark.parametrize("way", range(4))
def test_additions_that_must_stay(way: int) -> None:
    done = checked(Written(way).eval())
    assert not any(e.method.startswith("add") for e in done.edits)


class Summed(nn.Module):
    """GhostNet's branches: each is added into the sum of those before it."""

    def __init__(self, kept: bool = False) -> None:
        super().__init__()
        self.convs, self.relu, self.kept = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3)), nn.ReLU(), kept

    def forward(self, x: Tensor) -> Tensor:
        out = torch.sin(x)
        first = out if self.kept else 0
        for conv in self.convs:
            out += conv(x)
        return self.relu(out) + first


def test_sums_in_place() -> None:
    done = checked(Summed().eval(), thorough=True)
    assert Counter(e.method for e in done.edits) == {"add": 2, "add+relu": 1}
    done = checked(Summed(kept=True).eval())
    assert not any(e.op.settings.get("residual") for e in done.edits)


class ThroughView(nn.Module):
    """``+=`` on a view: a trace of this code shows no write at all."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.conv, self.act, self.way = nn.Conv2d(4, 4, 1), nn.ReLU(), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        view = x[:, :2]
        if self.way == 0:
            view += 1
        elif self.way == 1:
            view *= 2
            x = x + view.sum()
        else:
            other = x
            other -= 1
            x = x * other
        return x + self.act(x)


@pytest.mark.parametrize("way", range(3))
def test_writes_that_a_trace_does_not_show(way: int) -> None:
    done = checked(ThroughView(way).eval())
    assert not any(e.kind == "graph" for e in done.edits)
    assert reasons(done)["conv"] == "not-traced"


class Optional(nn.Module):
    """timm's DLA: a plain trace of this code knows only the call with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: list[Tensor] | None = None) -> Tensor:
        if shortcut is None:
            shortcut = x
        out = self.last(self.relu(self.norm(self.conv(x))))
        out += shortcut
        return self.relu(out)


class Tree(nn.Module):
    """Calls its blocks in both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.project = Optional(), Optional(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x, self.project(x))
        return self.second(y, None, [x]) + self.second.last(x)  # type: ignore[no-any-return]


def test_optional_inputs_are_not_baked_in() -> None:
    done = checked(lively(nn.Sequential(Optional(), nn.Conv2d(4, 4, 1))), thorough=True)
    assert [e.method for e in done.edits] == ["fold", "relu", "add+relu"]
    model: Any = done.model
    x, y = torch.randn(2, 2, 4, 6, 6)
    block: Any = lively(Optional())
    fused: Any = fuse(block, {"x": x}).model
    with torch.no_grad():
        for given in ((x,), (x, y), (x, y, [x]), (x, None, [y])):
            torch.testing.assert_close(fused(*given), block(*given), rtol=1e-4, atol=1e-5)
    assert isinstance(model[0], fx.GraphModule)
    done = checked(lively(Tree()))
    methods = {e.path: e.method for e in done.edits}
    assert methods["first.last"] == "add+relu"
    assert "second.last" not in methods  # called twice, by different code
    assert reasons(done)["second.relu"] == "not-behind-layer"


class Writes(Optional):
    """``+=`` into what the caller may hold."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: list[Tensor] | None = None) -> Tensor:
        if shortcut is None:
            shortcut = x
        shortcut += self.last(x)
        return torch.sigmoid(self.conv(shortcut))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y, z = x * 2, x * 3
        return self.inner(y) + y * z  # type: ignore[no-any-return]


def test_an_optional_input_that_the_code_writes_into() -> None:
    done = checked(Around(Writes()).eval())
    assert not [e for e in done.edits if e.op.action == "fuse"]
    assert "+=" in {s.path: s.detail for s in done.plan.skips}["inner.conv"]


class Items(nn.Module):
    """timm's HRNet: maps are items of the caller's list, which the code assigns."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(3))
        self.down, self.act, self.way = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), way

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        if self.way == 0:
            x[0] = self.branches[0](x[0])
            x[1] = self.branches[1](x[1])
        y = self.down(x[0])
        if self.way == 1:  # what the layer has read is written over before the sum
            x[0][:, :2] = x[1][:, :2]
        elif self.way == 2:  # what is added is
            x[1][:, :2] = 0.5
        elif self.way == 3:  # the caller sees the layer's output, and that 1 is added to it
            x[0] = y
            y += 1
        elif self.way == 4:
            x[0] = x[1]
        out = self.act(y + x[1])
        return [out, self.act(self.branches[2](x[0]) + out)]


class Lists(nn.Module):
    def __init__(self, way: int) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(4, 4, 1), Items(way)

    def forward(self, x: Tensor) -> Tensor:
        maps = [torch.sin(self.first(x)), torch.cos(x)]
        a, b = self.inner(maps)
        return torch.cat([a, b, *maps], 1)


@pytest.mark.parametrize(
    ("way", "methods"),
    [
        (0, {"inner.down": "add+relu", "inner.branches.2.0": "add+relu"}),
        (1, {"inner.branches.2.0": "add+relu"}),
        (2, {"inner.branches.2.0": "add+relu"}),
        (3, {}),
        (4, {"inner.down": "add+relu", "inner.branches.2.0": "add+relu"}),
    ],
)
def test_code_that_assigns_items(way: int, methods: dict[str, str]) -> None:
    done = checked(lively(Lists(way)), thorough=True)
    assert {e.path: e.method for e in done.edits if e.op.action == "fuse"} == methods
    if not methods:
        assert "+=" in {s.path: s.detail for s in done.plan.skips}["inner.branches.2.0"]


class Chooses(nn.Module):
    """A detector in small: values decide what comes out, and of equal scores rounding decides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        scores = self.head(x).mean(1).flatten() * 1e-8 + 1
        order = torch.stack([scores, 1 + (scores - 1).sin()]).max(0).values.argsort()
        chosen: Tensor = x.mean(1).flatten()[order[: max(1, int((scores > 0.5).sum()))]]
        return chosen


def test_layers_before_a_choice_are_compared_but_for_those_that_were_folded() -> None:
    model = lively(Chooses())
    done = fuse(model, torch.randn(1, 4, 12, 12), [FoldBatchNorm()], thorough=False)
    proof = done.report.verification
    assert proof is not None
    assert proof.passed, proof.failures
    assert Options(edits=done.edits).edited == ("norm", "conv")


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.flag = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), True

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x)) if x.sum() > -1e9 else x
        return self.relu(y * 2)


def test_code_that_is_no_graph_is_left() -> None:
    done = checked(Branches().eval())
    assert reasons(done)["conv"] == "not-traced"


def test_shared_and_multiply_read() -> None:
    conv, relu = nn.Conv2d(4, 4, 1), nn.ReLU()
    for layers in ((conv, relu, conv), (conv, relu, conv, nn.Tanh()), (conv, relu, conv, nn.Tanh(), relu)):
        done = checked(nn.Sequential(*layers).eval())
        assert reasons(done)["0"] == "called-twice"
    alias = Residual()
    alias.again = alias.conv1
    done = checked(lively(alias))
    assert done.model.again is done.model.conv1


class Loop(nn.Module):
    """One block, called as often as there are steps, with an activation in code."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), Gate()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.gate(self.body(x))
        return x


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(x))


def test_layers_called_several_times_with_the_same_activation() -> None:
    done = checked(Loop().eval())
    assert sorted(e.method for e in done.edits) == ["relu", "sigmoid"]
    shared = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    done = checked(nn.Sequential(shared, shared).eval())
    assert [e.method for e in done.edits] == ["relu"]
    assert done.model[0] is done.model[1]  # type: ignore[index]


def test_training_goes_on_where_nothing_was_folded() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 3), nn.Sigmoid()).train()
    done = checked(model, passes=[FusePointwiseActivation()], thorough=True)
    assert done.model.training
    assert len(done.edits) == 2
    done.model(torch.randn(2, 4, 10, 10)).sum().backward()
    assert all(p.grad is not None for p in done.model.parameters())


def test_refusals() -> None:
    x = torch.randn(1, 4, 10, 10)
    with pytest.raises(RefusedError, match=r"training mode[\s\S]*model.eval"):
        fuse(Residual().train(), x)
    with pytest.raises(RefusedError, match="complex"):
        fuse(nn.Conv2d(4, 4, 1, dtype=torch.complex64).eval(), x)
    mixed = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, device="meta")).eval()
    with pytest.raises(RefusedError, match="several devices"):
        fuse(mixed, x)
    broken = lively(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    broken[1].running_var.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(RefusedError, match="not finite"):
        fuse(broken, x)


def test_saved_and_loaded_without_folding_again(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1))
    model = lively(nn.Sequential(wide, nn.Dropout(), Residual(True), Inverted()))
    done = checked(model)
    done.save(tmp_path / "out")
    other = lively(copy.deepcopy(model))
    again = load(tmp_path / "out", other)
    x = torch.randn(2, 4, 10, 10)
    with torch.no_grad():
        assert torch.equal(again(x), done.model(x))
    plan = Plan.from_json(done.plan.to_json())
    assert plan.ops == done.plan.ops
    assert isinstance(again[0][0], PointwiseActivation)
    assert again[0][0].channels_last


def test_export_compile_and_half_precision() -> None:
    model = lively(nn.Sequential(nn.Conv2d(4, 4, 1), Residual(True), Inverted()))
    done, x = checked(model), torch.randn(2, 4, 10, 10)
    sizes = {0: torch.export.Dim("n", min=2), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    program = torch.export.export(done.model, (x,), dynamic_shapes=(sizes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again, wide = torch.export.load(file).module(), torch.randn(3, 4, 12, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(wide), model(wide), rtol=1e-4, atol=1e-5)
        compiled = torch.compile(done.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        half, low = copy.deepcopy(done.model).bfloat16(), copy.deepcopy(model).bfloat16()
        # Both round to 8 bits after every layer, in different places; the exact output is of the order of 10.
        torch.testing.assert_close(half(x.bfloat16()), low(x.bfloat16()), rtol=0.1, atol=0.2)


def test_onnx_export(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    model = lively(nn.Sequential(nn.Conv2d(4, 4, 1), Residual(True), Inverted()))
    done, x = checked(model), torch.randn(2, 4, 10, 10)
    path = tmp_path / "model.onnx"
    torch.onnx.export(done.model, (x,), str(path), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), rtol=1e-4, atol=1e-5)


class ViewsMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 16, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)).view(len(x), -1)  # which no graph has


def test_a_format_that_the_code_does_not_survive_is_taken_back() -> None:
    done = checked(ViewsMap().eval())
    assert [e.method for e in done.edits] == ["relu"]
    assert [str(skip.reason) for skip in done.plan.skips] == ["broke-model"]


def test_a_second_run_finds_nothing() -> None:
    done = checked(lively(nn.Sequential(nn.Conv2d(4, 4, 1), Residual(True), Inverted())))
    again = fuse(done.model, torch.randn(2, 4, 10, 10))
    assert not again.edits


def test_errors_of_edited_plans() -> None:
    from pwrewrite.edit.apply import apply

    model = lively(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()))
    plan = checked(model).plan
    text = plan.to_json()
    for old, new, said in (
        ('"side": "behind"', '"side": "left"', "unknown side"),
        ('"layer": "0"', '"layer": "9"', "no module"),
        ('"activation": "relu"', '"activation": "mish"', "unknown activation"),
        ('"remove": "2"', '"remove": "7"', "no module"),
        ('"remove": "2"', '"remove": "0"', "activation that is another one here"),
        ('"activation": "relu"', '"activation": "silu"', "activation that is another one here"),
        ('"kind": "Dropout"', '"kind": "Linear"', "removes a module"),
    ):
        assert old in text
        with pytest.raises(PwrewriteError, match=said):
            apply(model, Plan.from_json(text.replace(old, new)))


def test_values_that_nearly_vanish_do_not_fail_the_proof() -> None:
    """As in models whose first weights are small and whose norms have no statistics yet."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        conv, norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        nn.init.normal_(conv.weight, std=1e-13)
        nn.init.uniform_(norm.weight, 5e-3, 1.5e-2)
        layers += [conv, norm, nn.ReLU()]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        assert 0 < model(x).max() < torch.finfo(torch.float32).tiny
    fused = fuse(model, x, thorough=False)
    assert fused.report.passed, fused.report.verification
    assert [edit.method for edit in fused.edits].count("fold") == 3
