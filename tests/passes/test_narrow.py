"""Fewer channels between layers: what can be narrowed, what has to stay, and what comes of it."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from check_passes import check_pass, plan_of
from hypothesis import HealthCheck, given, settings
from random_networks import Network, networks
from torch import Tensor, nn
from torch.nn import functional as F

import pwrewrite
from pwrewrite.capturing import capture
from pwrewrite.core.errors import PlanError, RefusedError, UsageError
from pwrewrite.core.plan import Op, Plan, SkipReason
from pwrewrite.edit.actions.narrow import channel_spread
from pwrewrite.edit.apply import apply
from pwrewrite.passes import InsertReduction, Narrow
from pwrewrite.passes.channel_units import find_units

quick = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
X = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))


def seen(model: nn.Module) -> nn.Module:
    """A model in eval mode whose norms have statistics, gains and shifts."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                assert tensor is not None
                tensor.data.normal_(generator=generator)
            for tensor in (module.running_var, module.weight):
                assert tensor is not None
                tensor.data.uniform_(0.5, 2, generator=generator)
    return model.eval()


class Inverted(nn.Module):
    """An inverted residual with a gate, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(6, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise, self.norm2 = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.squeeze, self.excite = nn.Conv2d(24, 4, 1), nn.Conv2d(4, 24, 1)
        self.project, self.norm3 = nn.Conv2d(24, 6, 1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm1(self.expand(x)))
        y = F.hardswish(self.norm2(self.depthwise(y)))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.norm3(self.project(y))


def vgg() -> nn.Module:
    return seen(
        nn.Sequential(
            nn.Conv2d(6, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 12, 3, padding=1), nn.PReLU(12), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(48, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5),
        )
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- widths


def test_the_middle_of_an_inverted_residual_with_its_gate() -> None:
    model = seen(Inverted())
    applied = check_pass(
        Narrow(0.5),
        model,
        X,
        edits={"expand": "narrow", "squeeze": "narrow"},
        skips={"project": (SkipReason.SHARED_CHANNELS, "add joins them with another tensor")},
    )
    changed = applied.model
    assert isinstance(changed, Inverted)
    assert [changed.expand.out_channels, changed.depthwise.groups, changed.project.in_channels] == [12] * 3
    assert [changed.squeeze.in_channels, changed.squeeze.out_channels, changed.excite.in_channels] == [12, 2, 2]
    assert changed.norm1.num_features == len(changed.norm2.running_mean) == changed.excite.out_channels == 12
    assert type(changed.expand) is nn.Conv2d


def test_a_chain_with_a_flatten_and_slopes() -> None:
    applied = check_pass(Narrow(0.5), vgg(), X, edits=dict.fromkeys(("0", "4", "8"), "narrow"))
    shapes = [tuple(p.shape) for name, p in applied.model.named_parameters() if name.endswith("weight")]
    assert shapes == [(8, 6, 3, 3), (8,), (6, 8, 3, 3), (6,), (10, 24), (5, 10)]
    assert applied.model(X).shape == (2, 5)


def test_all_channels_are_exact_and_change_nothing() -> None:
    for model in (seen(Inverted()), vgg()):
        applied = check_pass(Narrow(1.0), model, X)
        assert {edit.exact for edit in applied.edits} == {"both"}
        assert torch.equal(applied.model(X), model(X))


def test_channels_that_nobody_hears_go_first_and_are_not_missed() -> None:
    model = vgg()
    conv, head = model[4], model[8]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        conv.weight[:, ::2] = 0  # of what the first layer makes
        head.weight[:, :20] = 0  # of what the second one makes, by 4
    applied = check_pass(Narrow(0.5, include=["0"]), model, X, within=1e-5)
    assert applied.edits[0].op.settings["keep"] == list(range(1, 16, 2))
    applied = check_pass(Narrow(7, include=["4"]), model, X, within=1e-5)
    assert applied.edits[0].op.settings["keep"] == list(range(5, 12))


def test_what_a_norm_says_of_channels_decides_and_makes_up_for_their_mean() -> None:
    model = seen(nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1)))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight[[1, 6]], norm.bias[[1, 6]] = 0, 2  # always 2: all of it is mean
        norm.bias[3] = -50  # never anything
    applied = check_pass(Narrow(5), model, X, within=1e-5)
    assert applied.edits[0].op.settings["keep"] == [0, 2, 4, 5, 7]


def test_a_layer_without_a_bias_shifts_the_norm_behind_it() -> None:
    model = seen(
        nn.Sequential(
            nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        )
    )
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight[[1, 6]], norm.bias[[1, 6]] = 0, 2
    applied = check_pass(Narrow(6), model, X, within=1e-5)
    assert applied.edits[0].op.settings["keep"] == [0, 2, 3, 4, 5, 7]


def test_a_norm_that_has_seen_nothing_says_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))
    assert channel_spread(model, "1", ("relu", ()), 8) is None
    assert channel_spread(model, "0", None, 8) is None
    spread = channel_spread(seen(model), "1", None, 8)
    norm = model[1]
    assert spread is not None
    assert isinstance(norm, nn.BatchNorm2d)
    assert torch.allclose(spread[0].float(), norm.bias)
    assert torch.allclose(spread[1].float(), norm.weight.square())
    relu = channel_spread(nn.Sequential(nn.InstanceNorm2d(3)), "0", ("relu", ()), 3)
    assert relu is not None  # mean and variance of a half normal distribution
    assert float(relu[0][0]) == pytest.approx(0.3989, abs=5e-3)
    assert float(relu[1][0]) == pytest.approx(0.3408, abs=2e-2)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose2d, nn.Conv3d])
def test_other_dimensions_and_transposed_layers(kind: type[nn.Conv2d]) -> None:
    dims = {nn.Conv1d: 1, nn.ConvTranspose2d: 2, nn.Conv3d: 3}[kind]  # type: ignore[index]
    model = nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 5, 3)).eval()
    x = torch.randn(2, 3, *(6,) * dims)
    applied = check_pass(Narrow(3), model, x, edits={"0": "narrow"})
    layer = applied.model[2]
    assert isinstance(layer, kind)
    assert layer.in_channels == 3


def test_linear_layers_in_sequences() -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6)).eval()
    applied = check_pass(Narrow("50%"), model, torch.randn(2, 7, 6), edits={"1": "narrow"})
    assert isinstance(applied.model[3], nn.Linear)
    assert applied.model[3].in_features == 12


# ------------------------------------------------------------------------------------------------ what has to stay


class Join(nn.Module):
    """Two convolutions whose outputs meet."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.left, self.right = how, nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Conv2d(16 if how == "cat" else 8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x).relu(), self.right(x).relu()
        if self.how == "values" and float(a.mean()) > 100:
            return self.right(a[:, :6])
        joined = {
            "cat": lambda: torch.cat([a, b], 1),
            "add": lambda: a + b,
            "maximum": lambda: torch.maximum(a, b),
            "softmax": lambda: a.softmax(1),
            "group": lambda: self.norm(a),
            "split": lambda: a[:, :4].repeat(1, 2, 1, 1),
            "transposed": lambda: a.transpose(1, 2).reshape(a.shape),
            "output": lambda: a,
            "values": lambda: a,
        }[self.how]()
        return joined if self.how == "output" else self.head(joined)


@pytest.mark.parametrize(
    ("how", "reason", "detail"),
    [
        ("cat", SkipReason.SHARED_CHANNELS, "cat shares them"),
        ("add", SkipReason.SHARED_CHANNELS, "add shares them"),
        ("maximum", SkipReason.SHARED_CHANNELS, "maximum shares them"),
        ("output", SkipReason.SHARED_CHANNELS, "an output of the model"),
        ("softmax", SkipReason.WRONG_FORM, "softmax is not known to treat each channel alone"),
        ("group", SkipReason.WRONG_FORM, "group_norm in norm is not known"),
        ("split", SkipReason.WRONG_FORM, "is not known to treat each channel alone"),
        ("transposed", SkipReason.WRONG_FORM, "transpose is not known"),
        ("values", SkipReason.DATA_DEPENDENT, "decides by values or sizes"),
    ],
)
def test_channels_that_others_have_stay(how: str, reason: SkipReason, detail: str) -> None:
    proposed = plan_of(Narrow(0.5), Join(how).eval(), X)
    assert proposed.ops == ()
    found = {skip.path: skip for skip in proposed.skips}
    assert found["left"].reason is reason
    assert detail in found["left"].detail


def test_layers_that_cannot_change() -> None:
    twice = nn.Conv2d(8, 8, 1)
    for model, path, reason in (
        (nn.Sequential(nn.Conv2d(6, 8, 1), twice, twice, nn.Conv2d(8, 2, 1)), "0", SkipReason.CALLED_TWICE),
        (nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, groups=2)), "0", SkipReason.WRONG_FORM),
        (nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 16, 3, groups=8)), "0", SkipReason.WRONG_FORM),
    ):
        (skip,) = [s for s in plan_of(Narrow(0.5), model.eval(), X).skips if s.path == path]
        assert skip.reason is reason
    hooked = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    hooked[1].register_forward_hook(lambda *_: None)
    assert {s.path: s.reason for s in plan_of(Narrow(0.5), hooked, X).skips} == {
        "0": SkipReason.HOOKS,
        "1": SkipReason.HOOKS,
        "2": SkipReason.SHARED_CHANNELS,
    }
    shared = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval()
    shared[3].weight = shared[1].weight
    (skip,) = [s for s in plan_of(Narrow(0.5), shared, X).skips if s.path == "0"]
    assert "1 shares its parameters" in skip.detail


class Deciding(nn.Module):
    """Looks at values, but not where the channels are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = seen(nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y * 2 if float(y.mean()) > 100 else y


def test_code_that_decides_by_values_reads_no_norm() -> None:
    check_pass(Narrow(0.5), Deciding().eval(), X, edits={"body.0": "narrow"})


class Reads(nn.Module):
    """Code that takes the width of a layer, or a norm's tensors, for itself."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.conv, self.norm, self.head = what, nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.what == "norm":
            return self.head(y) + self.norm.running_mean.sum()
        return self.head(y.view(x.shape[0], 8, x.shape[2], x.shape[3]))


class BySize(nn.Module):
    """Hands channels on to one layer or another, or only some of them, as the size of an image says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.make = how, nn.Conv2d(6, 16, 3, padding=1)
        self.small, self.large = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x).relu()
        if self.how == "pooled":
            return self.small(F.max_pool2d(y, 2) if x.shape[-1] > 100 else y)
        if x.shape[-1] < 100:
            return self.small(y)
        return self.large(y) if self.how == "layer" else self.small(torch.cat([y[:, :8], y[:, :8]], 1))


class Around(nn.Module):
    """What decides lies around what makes the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(6, 16, 3, padding=1), nn.ReLU())
        self.small, self.large = nn.Sequential(nn.Conv2d(16, 4, 1)), nn.Sequential(nn.Conv2d(16, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.small(y) if x.size(2) * x.size(3) < 10_000 else self.large(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "path"), [(BySize("layer"), "make"), (BySize("part"), "make"), (Around(), "first.0")]
)
def test_channels_that_go_elsewhere_at_another_size_stay(model: nn.Module, path: str) -> None:
    proposed = plan_of(Narrow(0.5), model.eval(), X)
    assert proposed.ops == ()
    (skip,) = [s for s in proposed.skips if s.path == path]
    assert skip.reason is SkipReason.DATA_DEPENDENT
    assert "decides by values or sizes what becomes of them" in skip.detail


class Past(nn.Module):
    """Code that reaches past a block's own for some inputs: to a layer of it, or to a layer's width in a loop."""

    def __init__(self, how: str) -> None:
        super().__init__()
        layers = {"a": nn.Conv2d(6, 16, 3, padding=1), "r": nn.ReLU(), "b": nn.Conv2d(16, 6, 3, padding=1)}
        self.how, self.block = how, nn.Sequential(OrderedDict(layers))
        self.head, self.other = nn.Conv2d(6, 4, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "call" and float(x.mean()) > 5:
            return self.other(self.block.a(x))  # type: ignore[no-any-return]
        if self.how == "loop" and x.shape[-1] > 100:
            x = x * sum(block.a.out_channels for block in self.children() if isinstance(block, nn.Sequential))
        return self.head(self.block(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["call", "loop"])
def test_layers_that_code_around_them_may_use_by_themselves_stay(how: str) -> None:
    model = Past(how).eval()
    proposed = plan_of(Narrow(0.5), model, X)
    assert proposed.ops == ()
    (skip,) = [s for s in proposed.skips if s.path == "block.a"]
    assert skip.reason is SkipReason.DATA_DEPENDENT
    assert skip.detail == "the code of the model may use a of block by itself"


def test_channels_that_are_pooled_at_another_size_may_go() -> None:
    model = BySize("pooled").eval()
    check_pass(Narrow(0.5), model, X, edits={"make": "narrow"})


def test_code_that_would_not_survive() -> None:
    proposed = plan_of(Narrow(0.5), Reads("norm").eval(), X)
    assert "reads the tensors of norm, too" in {s.path: s.detail for s in proposed.skips}["conv"]
    result = pwrewrite.rewrite(Reads("view").eval(), X, [Narrow(0.5)])
    assert result.edits == ()
    assert {s.path: s.reason for s in result.report.skips}["conv"] is SkipReason.BROKE_MODEL


# ------------------------------------------------------------------------------------------ the pass, plans and folders


def test_which_units_and_how_wide() -> None:
    model = vgg()
    assert [op.path for op in plan_of(Narrow(0.5, exclude=["8"]), model, X).ops] == ["0"]
    assert [op.path for op in plan_of(Narrow(0.5, min_share=0.1), model, X).ops] == ["0", "4"]
    few = plan_of(Narrow(14), model, X)
    assert [(op.path, len(op.settings["keep"])) for op in few.ops] == [("0", 14), ("8", 14)]
    assert {s.path: s.reason for s in few.skips}["4"] is SkipReason.TOO_SMALL
    wide = nn.Sequential(nn.Conv2d(6, 100, 1), nn.Conv2d(100, 4, 1)).eval()
    assert [len(op.settings["keep"]) for op in plan_of(Narrow(0.5), wide, X).ops] == [48]
    assert [len(op.settings["keep"]) for op in plan_of(Narrow(0.5, multiple=10), wide, X).ops] == [50]
    with pytest.raises(UsageError, match="rank"):
        Narrow(1.5)
    with pytest.raises(UsageError, match="matches no layer"):
        plan_of(Narrow(0.5, include=["x"]), model, X)
    inverted = plan_of(Narrow(0.5, include=["depthwise"]), seen(Inverted()), X)
    assert {s.path: s.detail for s in inverted.skips}["depthwise"].endswith("expand makes; name that")


def test_a_saved_result_is_loaded_and_its_plan_carried_out_again(tmp_path: Path) -> None:
    model = seen(Inverted())
    result = pwrewrite.rewrite(model, X, passes=["narrow"], rank=0.5)
    assert result.report.passed
    result.save(tmp_path / "narrow")
    loaded = pwrewrite.load(tmp_path / "narrow", seen(Inverted()))
    assert torch.equal(loaded(X), result.model(X))
    plan = Plan.from_json(result.plan.to_json())
    assert torch.equal(apply(model, plan)(X), result.model(X))
    for other in (X, X[:1], torch.randn(2, 6, 16, 12)):  # what it costs depends on the inputs
        again = pwrewrite.rewrite(model, other, plan)
        assert again.report.passed, again.report.verification.failures  # type: ignore[union-attr]
        assert torch.equal(again.model(X), result.model(X))


def test_before_and_after_other_passes() -> None:
    model = nn.Sequential(nn.Conv2d(6, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    result = pwrewrite.rewrite(model, X, [Narrow(8), InsertReduction(4)])
    assert result.report.passed
    assert [(edit.method, edit.path) for edit in result.edits][:2] == [("narrow", "0"), ("narrow", "2")]
    assert {edit.path for edit in result.edits if edit.method == "reduce"} == {"0", "2"}
    assert torch.equal(pwrewrite.rewrite(model, X, result.plan).model(X), result.model(X))
    behind = plan_of(Narrow(0.5), pwrewrite.rewrite(model, X, [InsertReduction(4, include=["2"])]).model, X)
    assert {s.path: s.reason for s in behind.skips}["0"] is SkipReason.ALREADY_BOTTLENECK


def test_a_width_for_one_layer() -> None:
    result = pwrewrite.rewrite(vgg(), X, settings=["0=narrow:0.25", "4=reduce:3"])
    assert {edit.path: (edit.method, edit.rank_in) for edit in result.edits} == {"0": ("narrow", 4), "4": ("reduce", 3)}
    assert pwrewrite.rewrite(vgg(), X, passes=["narrow"], rank=5, include=["4"]).edits[0].rank_in == 5
    with pytest.raises(UsageError, match="gives 2 widths"):
        pwrewrite.rewrite(vgg(), X, settings=["0=narrow:4,4"])
    with pytest.raises(UsageError, match="--energy means nothing to narrow"):
        pwrewrite.rewrite(vgg(), X, passes=["narrow"], energy=0.9)


def test_plans_that_make_no_sense() -> None:
    model = vgg()
    (op, *_) = plan_of(Narrow(0.5), model, X).ops

    def changed(**settings: object) -> Plan:
        return Plan((Op(op.action, op.path, op.pass_name, {**op.settings, **settings}),))

    for wrong, message in (
        ({"keep": []}, "these channels cannot stay"),
        ({"keep": [3, 1]}, "these channels cannot stay"),
        ({"keep": [0, 16]}, "these channels cannot stay"),
        ({"channels": 20}, "has other channels"),
        ({"norms": ["3"]}, "made for another norm"),
        ({"readers": []}, "layers that read"),
    ):
        with pytest.raises(PlanError, match=message):
            apply(model, changed(**wrong))
    with pytest.raises(PlanError, match="made for another layer"):
        apply(apply(model, Plan((op,))), Plan((op,)))


def test_what_is_named_and_cannot_be_done_is_an_error() -> None:
    from pwrewrite.workflows.rewrite import check_rewritten
    from pwrewrite.workflows.what import what_from_keywords

    what, _ = what_from_keywords("rewrite", None, {"settings": ["project=narrow:3"]})
    result = pwrewrite.rewrite(seen(Inverted()), X, what)
    with pytest.raises(RefusedError, match="'project=narrow' could not be done"):
        check_rewritten(result, what, "")


@quick
@given(networks())
def test_random_networks_at_full_width_are_the_same(network: Network) -> None:
    applied = check_pass(Narrow(1.0), network.model, network.x)
    units, _ = find_units(capture(network.model, network.x))
    assert len(applied.edits) == len(units)


@quick
@given(networks())
def test_random_networks_run_with_fewer_channels(network: Network) -> None:
    check_pass(Narrow(0.5), network.model, network.x)


class AddsWhatIsWritten(nn.Module):
    """Adds to a layer's output, multiplies and joins it with, a map into which code has assigned items."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.last, self.how = nn.Conv2d(12 if how == "cat" else 6, 4, 1), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x[:, :1] = 0.0
        y = F.relu(self.second(x))
        y = self.third(y)
        if self.how == "matmul":
            return self.last(x @ y)
        return self.last(torch.cat([x, y], 1) if self.how == "cat" else y + x if self.how == "add" else x * y)


@pytest.mark.parametrize("how", ["add", "mul", "cat", "matmul"])
def test_maps_into_which_items_are_assigned_are_other_tensors(how: str) -> None:
    model, x = AddsWhatIsWritten(how).eval(), torch.randn(2, 6, 8, 8)
    rewritten = pwrewrite.rewrite(model, x, budget={"macs": 0.9})
    assert rewritten.report.passed
    assert all("third" not in op.path for op in rewritten.plan.ops if op.action == "narrow")
    assert pwrewrite.analyze(model, x).layers


class Assigned(nn.Module):
    """Code that assigns to some of the channels of a map, and joins the map with others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.part = nn.Conv2d(6, 16, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.gate, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x[:, :4] = self.part(x[:, :4])
        y = x * torch.sigmoid(self.gate(x))
        return self.last(torch.cat([x, y], 1))  # type: ignore[no-any-return]


def test_maps_with_items_that_were_assigned_are_planned() -> None:
    result = pwrewrite.rewrite(Assigned().eval(), X, budget={"macs": 0.6})
    assert result.report.passed
