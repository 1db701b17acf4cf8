"""Projections behind branches of concatenations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from check_passes import check_pass, plan_of
from torch import Tensor, nn

from pwrewrite.capturing import capture
from pwrewrite.core.errors import PlanError, RefusedError, UsageError
from pwrewrite.core.plan import Op, Plan, SkipReason
from pwrewrite.edit.apply import carry_out
from pwrewrite.edit.survival import survives
from pwrewrite.layers.factorized import Projected
from pwrewrite.passes import InsertBottleneck, InsertReduction, ProjectBranch
from pwrewrite.passes.base import Pass

EXAMPLES = Path(__file__).parents[2] / "examples"


class Block(nn.Module):
    """A convolution beside a pool, and what a test puts behind them."""

    def __init__(self, behind: nn.Module, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 3, padding=1)
        self.pool = pool or nn.AvgPool2d(3, 1, 1)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(torch.cat([self.conv(x), self.pool(x)], 1))


X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------- the GoogLeNet figure


def test_the_figure_of_googlenet() -> None:
    sys.path.insert(0, str(EXAMPLES))
    try:
        from inception_naive import build_model, example_inputs
    finally:
        sys.path.remove(str(EXAMPLES))
    model, (x,) = build_model().eval(), example_inputs()
    assert sum(p.numel() for p in model.parameters()) == 387_072
    for one in (
        InsertReduction(96, include=["b3"]),
        InsertReduction(16, include=["b5"]),
        ProjectBranch(["pool"], 32, init="fresh", allow_output_change=True),
    ):
        applied = check_pass(one, model, x)
        model = applied.model
    assert sum(p.numel() for p in model.parameters()) == 163_328
    assert model(x).shape == (1, 256, 28, 28)
    (edit,) = applied.edits
    assert edit.op.settings["outputs"] == [{"output": 0, "before": 416, "after": 256}]
    assert plan_of(one, model, x).ops == ()


# ---------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "behind",
    [
        nn.Conv2d(14, 5, 3, padding=1),
        nn.ConvTranspose2d(14, 5, 3, stride=2),
        nn.Sequential(nn.AvgPool2d(2), nn.Dropout(), nn.Identity(), nn.ZeroPad2d(1), nn.Conv2d(14, 5, (1, 3))),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(14, 9, 1, bias=False)),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(14 * 4, 5)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, 9)),
    ],
)
def test_at_full_width_the_joint_factorisation_is_exact(behind: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = Block(behind).eval().double(), X.double()
    applied = check_pass(ProjectBranch(["pool"], 8, allow_growth=True), model, x)
    (edit,) = applied.edits
    # float64: one SVD of fewer than 100 rows and two sums of fewer than 200 products, 1e-16 each
    assert torch.allclose(applied.model(x), model(x), atol=1e-12)
    assert edit.relative_error < 1e-12
    assert edit.exact == ("eval" if any(isinstance(m, nn.Dropout) for m in behind.modules()) else "both")


class Chain(nn.Module):
    """Two readers, one of them behind a second concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(14, 4, 3, padding=1), nn.Conv2d(18, 3, 1)

    def forward(self, y: Tensor) -> Tensor:
        return self.b(torch.cat([self.a(y), y], 1))


def test_several_readers_share_one_projection() -> None:
    torch.manual_seed(0)
    model, x = Block(Chain()).eval().double(), X.double()
    exact = check_pass(ProjectBranch(["pool"], 8, allow_growth=True), model, x)
    assert torch.allclose(exact.model(x), model(x), atol=1e-12)  # as above
    cut = check_pass(ProjectBranch(["pool"], 3), model, x)
    (edit,) = cut.edits
    assert edit.adapted == ("behind.a", "behind.b")
    assert cut.model.behind.b.in_channels == 13
    stacked = torch.cat(
        [model.behind.a.weight[:, 6:].permute(0, 2, 3, 1).reshape(-1, 8), model.behind.b.weight[:, 10:, 0, 0]]
    )
    spectrum = torch.linalg.svdvals(stacked)
    # Eckart–Young: the joint factorisation is the best there is.
    assert edit.relative_error == pytest.approx(float(spectrum[3:].norm() / spectrum.norm()), rel=1e-6)


def test_the_projection_keeps_dtype_flags_and_names() -> None:
    model = Block(nn.Conv2d(14, 5, 1)).bfloat16()
    model.behind.weight.requires_grad_(False)
    model.pool.eval()
    applied = check_pass(ProjectBranch(["pool"], 2), model, X.bfloat16())
    changed: Any = applied.model
    assert changed.pool.project.weight.dtype == changed.behind.weight.dtype == torch.bfloat16
    assert not changed.pool.project.weight.requires_grad
    assert not changed.behind.weight.requires_grad
    assert changed.training
    assert not changed.pool.training
    assert not changed.pool.branch.training
    assert applied.edits[0].renamed["behind.weight"] == ("behind.weight", "pool.project.weight")


# ------------------------------------------------------------------------------------------------------------ fresh


def test_fresh_keeps_what_other_channels_know() -> None:
    torch.manual_seed(0)
    behind = nn.Sequential(nn.BatchNorm2d(14), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(14, 5, 3, padding=1))
    model = Block(behind).eval()
    with torch.no_grad():
        behind[0].running_mean.normal_()  # type: ignore[union-attr, operator]
    changed: Any = check_pass(ProjectBranch(["pool"], 2, "fresh"), model, X).model
    norm, conv = changed.behind[0], changed.behind[3]
    assert norm.num_features == conv.in_channels == 8
    assert torch.equal(norm.running_mean[:6], behind[0].running_mean[:6])
    assert norm.running_mean[6:].tolist() == [0, 0]
    assert norm.running_var[6:].tolist() == [1, 1]
    assert torch.equal(conv.weight[:, :6], behind[3].weight[:, :6])
    assert torch.equal(conv.bias, behind[3].bias)
    # With nothing in the pool's channels both compute the same from the others.
    with torch.no_grad():
        for weight, start in ((conv.weight, 6), (behind[3].weight, 6)):
            weight[:, start:] = 0
    assert torch.allclose(changed(X), model(X), atol=1e-6)  # float32, sums of fewer than 100 products


def test_two_branches_of_one_concatenation() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 5, 1), nn.AvgPool2d(3, 1, 1)
            self.bn, self.out = nn.BatchNorm2d(21), nn.Conv2d(21, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.bn(torch.cat([self.a(x), self.b(x), self.c(x)], 1)))

    model = Three().eval()
    changed: Any = check_pass(ProjectBranch((), 3, "fresh"), model, X).model
    assert isinstance(changed.a, Projected)
    assert isinstance(changed.c, Projected)
    assert changed.out.in_channels == changed.bn.num_features == 11
    assert torch.equal(changed.out.weight[:, 3:8], model.out.weight[:, 8:13])


def test_a_branch_of_several_modules_and_a_rewritten_reader() -> None:
    branch = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
    model = Block(nn.Conv2d(18, 16, 3), pool=branch).eval()
    first = check_pass(InsertBottleneck(4, include=["behind"]), model, X).model
    changed: Any = check_pass(ProjectBranch(["pool"], 2, "fresh"), first, X).model
    assert isinstance(changed.pool.branch[0], nn.Conv2d)
    assert changed.behind.in_channels == changed.behind.reduce.in_channels == 8
    after: Any = check_pass(InsertReduction(2, include=["pool.branch.0"]), changed, X).model
    assert after.pool.branch[0].reduce.out_channels == 2


# ------------------------------------------------------------------------------------------------------------ skips


def check_skip(model: nn.Module, one: Pass, reason: SkipReason, *words: str) -> None:
    """The one branch that the pass looks at is left."""
    (path,) = {skip.path for skip in plan_of(one, model.eval(), X).skips}
    check_pass(one, model, X, edits={}, skips={path: (reason, *words)})


class Code(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize(
    ("behind", "word"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv2d(14, 3, 1)), "relu in behind.0"),
        (nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(14, 3, 1)), "max_pool2d in behind.0"),
        (nn.Sequential(nn.BatchNorm2d(14), nn.Conv2d(14, 3, 1)), "batch_norm in behind.0"),
        (nn.Sequential(nn.ConstantPad2d(1, 2.0), nn.Conv2d(14, 3, 1)), "pad"),
        (Code(lambda m, y: m.conv(y + 1), conv=nn.Conv2d(14, 3, 1)), "add"),
        (nn.Identity(), "output"),
    ],
)
def test_weights_need_linear_ways(behind: nn.Module, word: str) -> None:
    check_skip(
        Block(behind), ProjectBranch(["pool"], 2, allow_output_change=True), SkipReason.NOT_LINEAR, word, "fresh"
    )


@pytest.mark.parametrize(
    ("behind", "word"),
    [
        (Code(lambda m, y: m.conv(y + y.flip(0)), conv=nn.Conv2d(14, 3, 1)), "flip"),
        (Code(lambda m, y: m.conv(torch.sigmoid(y) * y), conv=nn.Conv2d(14, 3, 1)), "several copies"),
        (Code(lambda m, y: m.conv(torch.cat([y, y], 1)), conv=nn.Conv2d(28, 3, 1)), "themselves"),
        (Code(lambda m, y: m.conv(torch.cat([y, y * 2], 2)), conv=nn.Conv2d(14, 3, 1)), "several copies"),
        (Code(lambda m, y: m.conv(y[:, 2:]), conv=nn.Conv2d(12, 3, 1)), "getitem"),
        (Code(lambda m, y: m.conv(y.chunk(2, 1)[0]), conv=nn.Conv2d(7, 3, 1)), "chunk"),
        (Code(lambda m, y: m.conv(y + m.first(torch.ones_like(y))), conv=nn.Conv2d(14, 3, 1), first=nn.ReLU()), ""),
        (Code(lambda m, y: m.fc(y.permute(0, 2, 3, 1)), fc=nn.Linear(14, 3)), "permute"),
        (Code(lambda m, y: m.fc(y), fc=nn.Linear(6, 3)), "another axis"),
        (Code(lambda m, y: m.conv(m.conv(y)), conv=nn.Conv2d(14, 14, 1)), "several times"),
        (nn.Conv2d(14, 14, 3, groups=14), "grouped"),
        (nn.Conv2d(14, 14, 3, groups=2), "grouped"),
        (nn.Sequential(nn.GroupNorm(2, 14), nn.Conv2d(14, 3, 1)), "group_norm"),
        (nn.Sequential(nn.PReLU(14), nn.Conv2d(14, 3, 1)), "prelu"),
        (nn.Sequential(nn.Softmax(1), nn.Conv2d(14, 3, 1)), "softmax"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(14, 3, 1)), ""),
    ],
)
def test_ways_on_which_no_width_can_change(behind: nn.Module, word: str) -> None:
    check_skip(
        Block(behind), ProjectBranch(["pool"], 2, "fresh", allow_output_change=True), SkipReason.NOT_LINEAR, word
    )


def test_an_output_changes_only_when_allowed() -> None:
    one = ProjectBranch(["pool"], 2, "fresh")
    words = "8 channels instead of 14", "allow_output_change"
    check_skip(Block(nn.ReLU()), one, SkipReason.NOT_LINEAR, *words)


def test_branches_that_are_none() -> None:
    class Elsewhere(Block):
        def forward(self, x: Tensor) -> Tensor:
            pooled = self.pool(x)
            return self.behind(torch.cat([self.conv(x), pooled], 1)) + pooled.mean()

    class Again(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.behind(torch.cat([self.conv(x), self.pool(self.pool(x))], 1))

    class Double(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.behind(torch.cat([self.pool(x), self.pool(x * 2)], 1))

    conv = nn.Conv2d(14, 3, 1)
    one = ProjectBranch(["pool"], 2, "fresh")
    for model, word in ((Elsewhere(conv), "also used"), (Again(conv), "several times")):
        check_skip(model, one, SkipReason.WRONG_FORM, word)
    plan = plan_of(one, Double(nn.Conv2d(16, 3, 1)), X)
    assert not plan.ops
    assert {skip.reason for skip in plan.skips} == {SkipReason.WRONG_FORM}
    check_skip(Block(conv), ProjectBranch(["behind"], 2), SkipReason.WRONG_FORM)
    check_skip(Block(conv), ProjectBranch(["pool"], 8), SkipReason.NO_GAIN)
    check_skip(Block(conv), ProjectBranch(["pool"], 4), SkipReason.NO_GAIN, "3 values")
    check_skip(Block(nn.Conv2d(14, 7, 1)), ProjectBranch(["pool"], 7), SkipReason.NO_GAIN)


def test_patterns() -> None:
    model = Block(nn.Conv2d(14, 30, 3)).eval()
    with pytest.raises(UsageError, match="'pol' matches no branch") as caught:
        plan_of(ProjectBranch(["pol"], 2), model, X)
    assert "pool" in str(caught.value.hint)
    assert [op.path for op in plan_of(ProjectBranch((), 2), model, X)] == ["pool"]
    assert [op.path for op in plan_of(ProjectBranch(["*"], 2), model, X)] == ["conv", "pool"]
    assert not plan_of(ProjectBranch((), 2, exclude=["pool"]), model, X).ops


@pytest.mark.parametrize("arguments", [{"channels": 0}, {"channels": 2.5}, {"channels": True}, {"init": "zeros"}])
def test_settings_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ProjectBranch(**arguments)


def test_a_branch_held_elsewhere() -> None:
    model = Block(nn.Conv2d(14, 30, 3)).eval()
    model.listed = [model.pool]  # type: ignore[assignment]
    (skip,) = carry_out(model, plan_of(ProjectBranch((), 2), model, X)).skips
    assert skip.reason is SkipReason.HELD_ELSEWHERE


def test_code_that_reads_the_branch() -> None:
    class Reads(Block):
        def forward(self, x: Tensor) -> Tensor:
            assert self.pool.kernel_size == 3
            return super().forward(x)

    model = Reads(nn.Conv2d(14, 30, 3)).eval()
    applied = carry_out(model, plan_of(ProjectBranch((), 2), model, X), probe=survives(capture(model, X), X))
    assert [skip.reason for skip in applied.skips] == [SkipReason.BROKE_MODEL]
    assert applied.model.behind.in_channels == 14


def test_nan_weights() -> None:
    model = Block(nn.Conv2d(14, 30, 3)).eval()
    plan = plan_of(ProjectBranch((), 2), model, X)
    with torch.no_grad():
        model.behind.weight[0, 9] = float("nan")
    with pytest.raises(RefusedError) as caught:
        carry_out(model, plan)
    assert caught.value.where == "behind"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("channels", 0),
        ("channels", 9),
        ("channels", "2"),
        ("branch_channels", 80),
        ("dims", 4),
        ("init", "zeros"),
        ("consumers", {}),
        ("consumers", [{"path": "behind"}]),
        ("norms", [{"path": "conv", "offset": 0, "channels": 14}]),
        ("norms", [{"offset": 0, "channels": 14}]),
    ],
)
def test_a_plan_edited_into_nonsense(key: str, value: Any) -> None:
    model = Block(nn.Conv2d(14, 30, 3)).eval()
    (op,) = plan_of(ProjectBranch((), 2), model, X)
    text = Plan((Op(op.action, op.path, op.pass_name, {**op.settings, key: value}),)).to_json()
    with pytest.raises(PlanError) as caught:
        carry_out(model, Plan.from_json(text, "plan.json"))
    assert "plan.json, line" in str(caught.value.where)
