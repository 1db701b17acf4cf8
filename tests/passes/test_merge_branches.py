"""`MergeBranches`: sums of linear branches are one convolution, and what would not be exact, or cost more, is left."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from check_passes import Expected, check_pass
from torch import Tensor, nn

import pwrewrite
from pwrewrite.core.plan import SkipReason
from pwrewrite.passes import FoldBatchNorm, MergeBranches

X = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))


def lively(model: nn.Module) -> nn.Module:
    """Statistics and affine weights that a merge must not ignore."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in ((m.running_mean, -1, 1), (m.running_var, 0.5, 2), (m.weight, 0.5, 1.5)):
                tensor.data.uniform_(low, high)
            m.bias.data.uniform_(-1, 1)
    return model.eval()


class Sum(nn.Module):
    """What some branches make of one input, added; ``tail`` is behind it."""

    def __init__(self, *branches: nn.Module, tail: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.tail = tail or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return self.tail(total)


def conv(k: int | tuple[int, int], **settings: object) -> nn.Conv2d:
    sides = tuple(n // 2 for n in ((k, k) if isinstance(k, int) else k))
    return nn.Conv2d(4, 4, k, **({"padding": sides} | settings))


def normed(layer: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "repvgg": lambda: Sum(normed(conv(3, bias=False)), normed(conv(1, bias=False)), nn.BatchNorm2d(4)),
    "acnet": lambda: Sum(conv(3, bias=False), conv((3, 1), bias=False), conv((1, 3))),
    "depthwise": lambda: Sum(conv(7, groups=4), conv(3, groups=4), nn.Identity(), tail=nn.BatchNorm2d(4)),
    "groups": lambda: Sum(conv(3, groups=2), conv(1, groups=4), conv(3)),
    "strides": lambda: Sum(conv(3, stride=2), conv(1, stride=2), nn.AvgPool2d(3, 2, 1)),
    "dilation": lambda: Sum(conv(3, dilation=2, padding=2), conv(1), conv(3, dilation=2, padding=2)),
    "diverse": lambda: Sum(
        conv(3), nn.Sequential(conv(1, bias=False), conv(3)), nn.Sequential(conv(1, bias=False), nn.AvgPool2d(3, 1, 1))
    ),
    "no padding": lambda: Sum(conv(3, padding=0), nn.Sequential(conv(1), conv(3, padding=0, padding_mode="reflect"))),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_become_one_convolution(name: str) -> None:
    """Norms behind convolutions need no fold before."""
    model = nn.Sequential(lively(BLOCKS[name]()), nn.Conv2d(4, 2, 1)).eval()
    done = check_pass(MergeBranches(), model, X, skips={})
    assert [edit.method for edit in done.edits] == ["branches"]
    assert sum(isinstance(m, nn.Conv2d) for m in done.model.modules()) == 2
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.AvgPool2d)) and m.training for m in done.model.modules())


class Scaled(nn.Module):
    """A residual with a scale for each channel, a difference, a number and a half."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3), conv(3)
        self.gamma = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu((2 - (x - self.gamma * (self.first(x) - self.second(x)))) / 2 + 0.5)


def test_scales_differences_and_numbers() -> None:
    done = check_pass(MergeBranches(), Scaled().eval(), X, edits={"first": "branches"}, skips={})
    assert {name for name, _ in done.model.named_parameters()} == {"first.weight", "first.bias"}
    assert set(done.edits[0].renamed) == {f"{a}.{b}" for a in ("first", "second") for b in ("weight", "bias")} | {
        "gamma"
    }


class LayerScale(nn.Module):
    """A residual block whose code scales its last layer's output."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.norm = conv(3), conv(3), nn.BatchNorm2d(4)
        self.gamma, self.how = nn.Parameter(torch.rand(4, 1, 1)), how
        self.register_buffer("across", torch.rand(9))

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(torch.relu(self.first(x)))
        match self.how:
            case "gamma":
                y = self.gamma * y
            case "number":
                y = y * 0.1
            case "half":
                y = y / 2
            case "norm":
                y = self.norm(y).mul_(self.gamma)
            case "read twice":
                return y * self.gamma + y
            case "shared":
                return torch.relu(y * self.gamma) + self.gamma
            case "columns":
                y = y * self.across
            case "itself":
                y = y * y.mean()
        return torch.relu(y + x)


@pytest.mark.parametrize("how", ["gamma", "number", "half", "norm"])
def test_a_scale_behind_a_layer_is_folded(how: str) -> None:
    model = lively(LayerScale(how))
    check_pass(MergeBranches(), model, X, edits={"last": "scale"}, skips={})
    fused = pwrewrite.fuse(model, X)
    assert fused.report.passed, fused.report.verification
    assert fused.after["kernels"] == 2
    assert "1 scale folded" in str(fused.report)


def test_a_scale_that_is_read_elsewhere_stays_there() -> None:
    done = check_pass(MergeBranches(), lively(LayerScale("shared")), X, edits={"last": "scale"}, skips={})
    assert "gamma" in done.model.state_dict()


@pytest.mark.parametrize("how", ["columns", "itself"])
def test_what_is_no_scale_of_channels_that_could_go_stays(how: str) -> None:
    check_pass(MergeBranches(), lively(LayerScale(how)), X, edits={}, skips={})


def test_heads_that_are_averaged() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) + self.b(x)) / 2

    check_pass(MergeBranches(), Heads().eval(), torch.randn(5, 6), edits={"a": "branches"}, skips={})


def test_two_sums_in_one_code() -> None:
    """What is merged first does not change which calls the second one names."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList([conv(3), conv(1), nn.BatchNorm2d(4)])
            self.second = nn.ModuleList([conv(3), conv(1)])

        def forward(self, x: Tensor) -> Tensor:
            for layers in (self.first, self.second):
                total = 0
                for layer in layers:
                    total += layer(x)
                x = torch.relu(total)
            return x

    model = lively(Twice())
    check_pass(MergeBranches(), model, X, edits={"first.0": "branches", "second.0": "branches"}, skips={})


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


def test_what_follows_is_fused() -> None:
    """The activation behind a sum goes into the merged convolution."""
    model = nn.Sequential(*(lively(BLOCKS["repvgg"]()) for _ in range(2))).eval()
    fused = pwrewrite.fuse(model, X, thorough=True)
    assert fused.report.passed, fused.report.verification
    assert fused.after["kernels"] == 2
    assert [e.op.action for e in fused.edits].count("merge-branches") == 2


def random_branch(rng: random.Random, depth: int = 2) -> nn.Module:
    kind = rng.choice(["conv", "conv", "norm", "identity", "pool", "chain", "sum"][: 7 if depth else 5])
    if kind == "conv":
        k, groups = rng.choice([1, 3, 5]), rng.choice([1, 2, 4])
        return conv(k, groups=groups, bias=rng.random() < 0.5)
    if kind == "sum":
        return Sum(random_branch(rng, depth - 1), random_branch(rng, depth - 1), tail=nn.Identity())
    if kind == "chain":
        return nn.Sequential(random_branch(rng, depth - 1), random_branch(rng, depth - 1))
    return {"norm": nn.BatchNorm2d(4), "identity": nn.Identity(), "pool": nn.AvgPool2d(3, 1, 1)}[kind]


def test_random_graphs() -> None:
    """Whatever is merged is exact; a good part of them is."""
    merged = 0
    for seed in range(60):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        branches = [random_branch(rng) for _ in range(rng.randint(2, 4))]
        model = nn.Sequential(lively(Sum(*branches)), nn.Conv2d(4, 2, 3)).eval().double()
        merged += len(check_pass(MergeBranches(), model, X.double()).edits)
    assert merged > 30


class Shared(nn.Module):
    """Branches of which something is used elsewhere, in a way that ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = conv(3), conv(1), how
        if how == "weight":
            self.c = conv(1)
            self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        total = a + b
        if self.how == "read":
            return total * a
        if self.how == "twice":
            return torch.relu(total) + self.b(total.relu())
        if self.how == "bias":
            return torch.relu(total) * self.b.bias.sum()
        if self.how == "weight":
            return self.c(torch.relu(total))
        if self.how == "values":
            return total if x.shape[0] > 1 else total * 2
        return torch.relu(total)


class Written(nn.Module):
    """What the branches read is written into between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3), conv(1), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x).relu()
        a = self.a(x)
        y = x.view(x.shape)
        y.mul_(2)
        return torch.relu(a + self.b(x))


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Expected]]] = {
    "norm before padding": (
        lambda: Sum(nn.Sequential(nn.BatchNorm2d(4), conv(3)), conv(1)),
        {"branches.0.1": (SkipReason.PADDING, "shift")},
    ),
    "reflect": (
        lambda: Sum(conv(3, padding_mode="reflect"), conv(1)),
        {"branches.0": (SkipReason.PADDING, "pads by reflect")},
    ),
    "pool without its padding": (
        lambda: Sum(conv(3), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        {"branches.0": (SkipReason.PADDING, "does not count")},
    ),
    "grows": (
        lambda: Sum(conv(5, groups=4), conv(1)),
        {"branches.0": (SkipReason.NO_GAIN, "MACs against")},
    ),
    "two kernels in a row": (
        lambda: Sum(nn.Sequential(conv(3), conv(3)), conv(1)),
        {"branches.0.0": (SkipReason.NOT_LINEAR, "neither is 1×1")},
    ),
    "grids": (
        lambda: Sum(conv(3, dilation=2, padding=2), conv(3)),
        {"branches.0": (SkipReason.NOT_LINEAR, "grids")},
    ),
    "hook": (lambda: Sum(conv(3), hooked(conv(1))), {"branches.1": SkipReason.HOOKS}),
    "hook on a norm": (lambda: Sum(conv(3), hooked(nn.BatchNorm2d(4))), {"branches.0": SkipReason.HOOKS}),
    "hook around": (lambda: Sum(conv(3), hooked(nn.Sequential(conv(1)))), {"branches.0": SkipReason.HOOKS}),
    "forward": (lambda: Sum(conv(3), OwnForward(4, 4, 1)), {"branches.1": SkipReason.OVERRIDDEN_FORWARD}),
    "parametrized": (
        lambda: Sum(conv(3), nn.utils.parametrizations.weight_norm(conv(1))),
        {"branches.1": SkipReason.PARAMETRIZED},
    ),
    "training": (lambda: Sum(conv(3), nn.BatchNorm2d(4).train()), {}),
    "read elsewhere": (lambda: Shared("read"), {}),
    "called twice": (lambda: Shared("twice"), {"b": SkipReason.CALLED_TWICE}),
    "bias read": (lambda: Shared("bias"), {"b": SkipReason.WEIGHT_READ}),
    "weight shared": (lambda: Shared("weight"), {"b": SkipReason.SHARED_WEIGHT}),
    "decisions": (lambda: Shared("values"), {"a": SkipReason.NOT_TRACED}),
    "written": (Written, {"a": SkipReason.WRITTEN}),
    "other inputs": (lambda: Residual(nn.Sequential(conv(3), nn.ReLU(), conv(1))), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_and_why(name: str) -> None:
    make, skips = REFUSED[name]
    model = make()
    training = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] if name == "training" else []
    model.eval()
    for norm in training:
        norm.train()
    assert not check_pass(MergeBranches(), model, X.clone(), edits={}, skips=skips, within=0).edits


def test_a_padded_kernel_behind_a_shift_is_merged_once_the_fold_took_it() -> None:
    """A norm before an unpadded kernel has a bias in its place afterwards, and the sum is exact."""
    model = nn.Sequential(lively(Sum(nn.Sequential(nn.BatchNorm2d(4), conv(3, padding=0)), conv(3, padding=0))))
    fused = pwrewrite.fuse(model.eval(), X, [FoldBatchNorm(), MergeBranches()])
    assert [e.op.action for e in fused.edits] == ["fold", "merge-branches"]
    assert fused.report.passed


timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "sums"),
    [("repvgg_a0", 22), ("mobileone_s0", 15), ("repvit_m0_9", 24), ("fastvit_t8", 20), ("repghostnet_050", 32)],
)
def test_families_equal_their_own_reparameterization(name: str, sums: int) -> None:
    """As close as float32 rounding in another order leaves it: 1e-5 of the norm of the scores."""
    from timm.utils import reparameterize_model

    model = lively(timm.create_model(name, num_classes=10))
    if name == "mobileone_s0":  # whose further pairs of blocks are like the second of their stage
        for stage in model.stages:
            del stage[4:]
    x = torch.randn(1, 3, 64, 64)
    fused = pwrewrite.fuse(model, x, ["fold-batch-norm", "merge-branches"], verify=False)
    assert [e.op.action for e in fused.edits].count("merge-branches") == sums
    own = reparameterize_model(copy.deepcopy(model))
    with torch.no_grad():
        expected, result = own(x), fused.model(x)
    assert float((result - expected).norm()) < 1e-5 * float(expected.norm())
    layers = [sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in each.modules()) for each in (fused.model, own)]
    assert layers[0] == layers[1]
