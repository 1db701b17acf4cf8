"""One reduction for several layers that read the same map: who can share it, who cannot, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from check_passes import check_pass, plan_of
from torch import Tensor, nn
from torch.nn import functional as F

import pwrewrite
from pwrewrite.capturing import capture
from pwrewrite.core.errors import PlanError, RefusedError, UsageError
from pwrewrite.core.plan import Op, Plan, SkipReason
from pwrewrite.edit.apply import apply
from pwrewrite.layers.factorized import Factorized
from pwrewrite.passes import ShareReduction
from pwrewrite.passes.shared_maps import SharedMap, find_shared

X = torch.randn(2, 12, 9, 9, generator=torch.Generator().manual_seed(0))


class Basic(nn.Module):
    """A convolution, a norm and a ReLU, as in torchvision's Inception networks."""

    def __init__(self, *channels: int, **settings: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(*channels, bias=False, **settings), nn.BatchNorm2d(channels[1])  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Branches of other kernels, strides and depth on one map, with a pool that needs all of it."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.one, self.three = Basic(channels, 8, kernel_size=1), Basic(channels, 8, kernel_size=3, padding=1)
        self.five = nn.Sequential(Basic(channels, 6, kernel_size=5, padding=2), Basic(6, 6, kernel_size=3, padding=1))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), Basic(channels, 4, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class Dense(nn.Module):
    """A dense block of two layers that read one concatenation, and a residual block with a shortcut behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(12, 6, 3, padding=1), nn.Conv2d(12, 6, 1)
        self.third, self.fourth = nn.Conv2d(24, 8, 3, padding=1, stride=2), nn.Conv2d(24, 8, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, F.relu(self.first(x)), F.relu(self.second(x))], 1)
        return F.relu(self.third(x)) + self.fourth(x)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def maps_of(model: nn.Module, x: Tensor = X) -> list[SharedMap]:
    return find_shared(capture(model, x))[0]


# --------------------------------------------------------------------------------------------------------- what comes


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [Inception, Dense])
def test_a_reduction_of_full_width_is_exact(make: Callable[[], nn.Module], training: bool) -> None:
    applied = check_pass(ShareReduction(1.0, allow_growth=True), seeded(make).train(training), X)
    assert {edit.exact for edit in applied.edits} == {"both"}
    assert len(applied.edits) == (1 if make is Inception else 2)


@pytest.mark.parametrize("alias", [False, True])
def test_cores_of_the_shape_of_their_layers_have_gradients_of_their_own(alias: bool) -> None:
    model = seeded(lambda: Reads("plainly"))
    if alias:
        model.c = model.b
    result = pwrewrite.rewrite(model, X, passes=[ShareReduction(12, allow_growth=True)])
    assert len(result.edits) == 1
    assert result.model.get_submodule("b").weight.shape == model.get_submodule("b").weight.shape
    assert result.report.passed, result.report


def test_branches_read_one_reduction_and_stay_what_they_are() -> None:
    applied = check_pass(ShareReduction(4), seeded(Inception), X, edits={"one.conv": "share-reduction"})
    (edit,), changed = applied.edits, applied.model
    assert edit.adapted == ("three.conv", "five.0.conv", "shared_one")
    assert edit.renamed["three.conv.weight"] == ("three.conv.weight", "shared_one.weight")
    reduction, three, pooled = (changed.get_submodule(path) for path in ("shared_one", "three.conv", "pool.1.conv"))
    assert isinstance(reduction, nn.Conv2d)
    assert (reduction.in_channels, reduction.out_channels, reduction.bias) == (12, 4, None)
    assert type(three) is nn.Conv2d
    assert (three.in_channels, three.weight.shape, pooled.in_channels) == (4, (8, 4, 3, 3), 12)
    calls = list[int]()
    reduction.register_forward_hook(lambda *_: calls.append(1))
    changed(X)
    assert len(calls) == 1
    assert changed(torch.randn(5, 12, 13, 7)).shape == (5, 26, 13, 7)  # another batch and size


def test_all_readers_and_the_wide_ones_alone_are_found() -> None:
    both = [[layer.path for layer in each.layers] for each in maps_of(seeded(Inception))]
    assert both == [["one.conv", "three.conv", "five.0.conv"], ["three.conv", "five.0.conv"]]
    assert [[layer.path for layer in each.layers] for each in maps_of(seeded(Dense))] == [
        ["first", "second"],
        ["third", "fourth"],
    ]


def test_what_kernels_have_in_common_costs_nothing() -> None:
    model = seeded(Inception)
    assert isinstance(model, Inception)
    used = torch.linalg.qr(torch.randn(12, 5)).Q
    with torch.no_grad():
        for conv in (model.one.conv, model.three.conv, model.five[0].conv):
            conv.weight.copy_(torch.einsum("oi...,ij->oj...", conv.weight, used @ used.T))
    applied = check_pass(ShareReduction(5), model, X, within=1e-5)
    assert applied.edits[0].relative_error == pytest.approx(0, abs=1e-6)
    assert check_pass(ShareReduction(4), model, X, within=1.0).edits[0].relative_error > 0.1  # type: ignore[operator]


@pytest.mark.parametrize("name", ["googlenet", "squeezenet1_1", "resnet18"])
def test_networks_of_torchvision_are_exact_at_full_width(name: str) -> None:
    torch.manual_seed(0)
    settings = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, num_classes=7, **settings).eval()
    applied = check_pass(ShareReduction(1.0, allow_growth=True), model, torch.randn(2, 3, 64, 64))
    assert len(applied.edits) == {"googlenet": 9, "squeezenet1_1": 8, "resnet18": 3}[name]


def test_two_maps_in_one_code() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.inner[0](x)) + self.inner[1](x)
            return F.relu(self.inner[2](x)) + self.inner[3](x)

    applied = check_pass(ShareReduction(1.0, allow_growth=True), seeded(Twice), X)
    assert [edit.adapted for edit in applied.edits] == [
        ("inner.1", "shared_inner_0"),
        ("inner.3", "shared_inner_2"),
    ]


def test_a_name_that_is_taken_is_not_taken_again() -> None:
    model = seeded(Inception)
    model.shared_one = nn.Identity()
    assert maps_of(model)[0].reduction == "shared_one_"


def test_cores_may_have_a_1x1_behind_them() -> None:
    model = seeded(Dense)
    (shared, _) = maps_of(model)
    op = shared.op(12, [3, None])
    changed = apply(model, Plan((op,)))
    assert isinstance(changed.first, Factorized)
    assert changed.first.widths == {"rank_out": 3}
    before, after = capture(model, X), capture(changed, X)
    assert op.estimate is not None
    assert after.params - before.params == op.estimate.params_after - op.estimate.params_before
    whole = apply(model, Plan((shared.op(12, [6, 6]),)))
    torch.testing.assert_close(whole(X), model(X), rtol=1e-4, atol=1e-5)
    for name, parameter in whole.named_parameters():
        assert parameter.requires_grad, name


def test_a_saved_folder_holds_the_same(tmp_path: Path) -> None:
    model = seeded(Inception)
    result = pwrewrite.rewrite(model, X, passes=[ShareReduction(4)])
    assert result.report.passed
    result.save(tmp_path / "out")
    loaded = pwrewrite.load(tmp_path / "out", model=seeded(Inception))
    assert torch.equal(loaded(X), result.model(X))
    assert not (tmp_path / "out").joinpath("model.pt").exists()


# -------------------------------------------------------------------------------------------------------- what cannot


class Reads(nn.Module):
    """Two convolutions that read one map, in some way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        if how == "grouped":
            self.b = nn.Conv2d(12, 8, 3, padding=1, groups=2)
        if how == "parts":
            self.a, self.b = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        if how == "transposed":
            self.b = nn.ConvTranspose2d(12, 8, 3, padding=1)  # type: ignore[assignment]
        if how == "wrapped":
            self.b = _Gated(self.b)  # type: ignore[assignment]
        if how == "beside":
            self.b = _Beside(self.b)  # type: ignore[assignment]
        if how == "hook":
            self.b = nn.Sequential(self.b)  # type: ignore[assignment]
            self.b.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "parts":
            first, second = x.split(6, 1)
            both: Tensor = self.a(first) + self.b(second)
            return both
        y = self.a(x)
        if self.how == "written":
            x.view(-1).add_(1)
        if self.how == "sizes" and x.shape[-1] > 100:
            x = x * 2
        if self.how == "twice":
            y = y + self.b(F.relu(x))
        if self.how == "functional":
            return y + F.conv2d(x, self.b.weight, padding=1)
        z: Tensor = y + self.b(x)
        return z


class _Gated(nn.Module):
    """Does more with what it is given than to hand it on."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) * x.mean((1, 2, 3), keepdim=True)
        return out


class _Beside(nn.Module):
    """Hands its input to a layer, and to a module in which no layer reads it."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.other = conv, nn.Sequential(_Doubled())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) * self.other(x)
        return out


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("how", "path", "reason", "said"),
    [
        ("grouped", "b", SkipReason.WRONG_FORM, "grouped"),
        ("transposed", "b", SkipReason.WRONG_FORM, "transposed"),
        ("wrapped", "b.conv", SkipReason.NOT_LINEAR, "more with the map"),
        ("beside", "b.conv", SkipReason.NOT_LINEAR, "b.other.0 does more with the map"),
        ("hook", "b.0", SkipReason.HOOKS, "would see the reduced map"),
        ("written", "b", SkipReason.WRITTEN, "written into in between"),
        ("sizes", "b", SkipReason.NOT_TRACED, "hands the map on"),
        ("twice", "b", SkipReason.CALLED_TWICE, "several"),
        ("parts", "b", SkipReason.WRONG_FORM, "no other convolution"),
        ("functional", "b", SkipReason.FUNCTIONAL, "as a function"),
    ],
)
def test_who_cannot_share_is_left_with_a_reason(how: str, path: str, reason: SkipReason, said: str) -> None:
    model = seeded(lambda: Reads(how))
    maps, skips = find_shared(capture(model, X))
    assert not maps
    (skip,) = [skip for skip in skips if skip.path == path]
    assert skip.reason is reason
    assert said in skip.detail
    if how not in ("written", "sizes"):
        assert "no other convolution" in next(skip for skip in skips if skip.path == "a").detail
    applied = check_pass(ShareReduction(4), model, X, edits={})
    assert torch.equal(applied.model(X.clone()), model(X.clone()))


class Around(nn.Module):
    """Holds a module whose layers share a map."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.blocks = block, nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


class Layer(Around):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block.a(F.relu(x)) if x.mean() > 100 else self.block(x)
        return y


class Loop(Around):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        for block in self.blocks if self.training else ():
            y = y + block.a.weight.mean()
        return y


class Method(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self._more(x) if x.mean() > 100 else super().forward(x)

    def _more(self, x: Tensor) -> Tensor:
        return torch.stack([self.block.b(x) for _ in range(2)]).sum(0)


class Shape(Around):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x) * self.block.a.in_channels
        return y


class OfClass(Around):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block.encode(x) if x.mean() > 100 else self.block(x)
        return y


class Encodes(Reads):
    def encode(self, x: Tensor) -> Tensor:
        return F.relu(self(x))


class Plainly(nn.Module):
    """Calls a layer of its own, and one inside, that are called like those that share a map."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.a = nn.Conv2d(12, 12, 1)
        self.inner = nn.ModuleDict({"a": nn.Conv2d(12, 12, 1), "block": block})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner.block(self.inner.a(self.a(x)))
        return y


@pytest.mark.parametrize("kind", [Layer, Loop, Method, Shape, OfClass])
def test_layers_that_code_around_may_use_by_themselves_share_nothing(kind: type[Around]) -> None:
    model = seeded(lambda: kind(Encodes("plainly")))
    assert len(maps_of(seeded(lambda: Around(Encodes("plainly"))))) == 1
    maps, skips = find_shared(capture(model, X))
    assert not maps
    assert {skip.reason for skip in skips} == {SkipReason.NOT_TRACED}
    assert all("by itself" in skip.detail for skip in skips)


def test_layers_of_the_same_name_elsewhere_are_no_hindrance() -> None:
    assert len(maps_of(seeded(lambda: Plainly(Reads("plainly"))))) == 1


class Clips(nn.Module):
    """Writes into what it is given, but not into small values."""

    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 100:
            x.clamp_(max=100)
        return x


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Between(nn.Module):
    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.between = nn.Sequential(between, nn.MaxPool2d(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.between(x)
        out: Tensor = y + self.b(x) + z.mean()
        return out


def test_what_may_be_written_in_between_on_other_values_is_not_shared() -> None:
    assert len(maps_of(seeded(lambda: Between(Squares())))) == 1
    maps, skips = find_shared(capture(seeded(lambda: Between(Clips())), X))
    assert not maps
    assert {skip.reason for skip in skips} == {SkipReason.WRITTEN}
    assert all("given to between in between" in skip.detail for skip in skips)


class Averages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) / self.conv.in_channels
        return out


def test_a_layer_whose_width_is_asked_for_is_left_out() -> None:
    model = seeded(Inception)
    model.three = Averages()
    maps, skips = find_shared(capture(model, X))
    assert [[layer.path for layer in each.layers] for each in maps] == [["one.conv", "five.0.conv"]]
    (skip,) = [skip for skip in skips if skip.path == "three.conv"]
    assert skip.reason is SkipReason.WEIGHT_READ
    assert "in_channels of three.conv" in skip.detail


def test_plain_sharing_is_found_in_the_same_network() -> None:
    assert len(maps_of(seeded(lambda: Reads("plainly")))) == 1


def test_others_share_where_one_cannot() -> None:
    model = seeded(Inception)
    model.get_submodule("three").register_forward_hook(lambda *_: None)
    (shared,) = maps_of(model)
    assert [layer.path for layer in shared.layers] == ["one.conv", "five.0.conv"]


def test_what_is_left_out_and_what_does_not_pay_stays() -> None:
    model = seeded(Inception)
    plan = plan_of(ShareReduction(4, exclude=["three.*"]), model, X)
    assert not plan.ops
    assert {skip.reason for skip in plan.skips if skip.path == "one.conv"} == {SkipReason.EXCLUDED}
    check_pass(ShareReduction(1.0), seeded(Dense), X, edits={})
    grown = {skip.path: skip.reason for skip in plan_of(ShareReduction(1.0), seeded(Dense), X).skips}
    assert grown["first"] is SkipReason.NO_GAIN
    below = plan_of(ShareReduction(4, min_share=1.0), model, X)
    assert {skip.reason for skip in below.skips if skip.path == "one.conv"} == {SkipReason.BELOW_SHARE}
    wide = plan_of(ShareReduction(13), model, X)
    assert {skip.reason for skip in wide.skips if skip.path == "one.conv"} == {SkipReason.TOO_SMALL}
    with pytest.raises(UsageError):
        ShareReduction(0)


def wrong(**changes: object) -> Op:
    (shared, *_) = maps_of(seeded(Inception))
    op = shared.op(4)
    return Op(op.action, op.path, op.pass_name, {**op.settings, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 13}, "wider than it can be"),
        ({"rank": 0}, "rank"),
        ({"readers": []}, "several layers"),
        ({"calls": []}, "several layers"),
        ({"reduction": "three"}, "cannot have this name"),
        ({"reduction": "a.b"}, "cannot have this name"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        apply(seeded(Inception), Plan((wrong(**changes),)))


def test_a_plan_for_readers_that_cannot_share_is_refused() -> None:
    readers = [dict(each) for each in wrong().settings["readers"]]
    readers[0]["layer"] = {**readers[0]["layer"], "groups": 2}
    with pytest.raises(PlanError, match="cannot share"):
        apply(seeded(Inception), Plan((wrong(readers=readers),)))
    readers = [dict(each) | {"width": 9} for each in wrong().settings["readers"]]
    with pytest.raises(PlanError, match="more than it can use"):
        apply(seeded(Inception), Plan((wrong(readers=readers),)))
    with pytest.raises(PlanError, match="do not lead to its readers"):
        apply(seeded(Inception), Plan((wrong(calls=["one", "pool", "three"]),)))
    op = maps_of(seeded(lambda: Reads("plainly")))[0].op(4)
    for how, said in (("sizes", "does not trace"), ("twice", "hands no one value")):
        with pytest.raises(RefusedError, match=said):
            apply(Reads(how).eval(), Plan((op,)))
