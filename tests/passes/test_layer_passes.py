"""The factorising passes: what they propose, how wide, and why they leave a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pwrewrite import passes
from pwrewrite.capturing import capture
from pwrewrite.core.errors import UsageError
from pwrewrite.core.plan import Op, Plan, Skip, SkipReason
from pwrewrite.edit.apply import carry_out

X = torch.zeros(1, 16, 8, 8)


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).eval()


def proposed(model: nn.Module, one: passes.Pass, x: Tensor = X) -> list[Op | Skip]:
    return one.propose(capture(model, x))


def only(model: nn.Module, one: passes.Pass, x: Tensor = X) -> Any:
    (found,) = proposed(model, one, x)
    return found


def reasons(model: nn.Module, one: passes.Pass, x: Tensor = X) -> dict[str, SkipReason]:
    found = proposed(model, one, x)
    for proposal in found:
        assert not isinstance(proposal, Skip) or proposal.detail
    return {p.path: p.reason for p in found if isinstance(p, Skip)}


def widths(model: nn.Module, one: passes.Pass, x: Tensor = X) -> dict[str, dict[str, int]]:
    return {p.path: p.settings["widths"] for p in proposed(model, one, x) if isinstance(p, Op)}


# ------------------------------------------------------------------------------------------------------ widths


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (4, {"rank_in": 4, "rank_out": 4}),
        ((4, 8), {"rank_in": 4, "rank_out": 8}),
        (0.5, {"rank_in": 8, "rank_out": 12}),
        ("25%", {"rank_in": 4, "rank_out": 6}),
        ((0.25, "6"), {"rank_in": 4, "rank_out": 6}),
    ],
)
def test_widths_and_ratios(rank: Any, expected: dict[str, int]) -> None:
    assert widths(net(nn.Conv2d(16, 24, 3)), passes.InsertBottleneck(rank)) == {"0": expected}


def test_computed_widths_are_rounded_and_given_ones_are_not() -> None:
    model, x = net(nn.Conv2d(64, 128, 3)), torch.zeros(1, 64, 8, 8)
    assert widths(model, passes.InsertBottleneck(0.3), x)["0"] == {"rank_in": 16, "rank_out": 40}
    assert widths(model, passes.InsertBottleneck(0.3, multiple=1), x)["0"] == {"rank_in": 19, "rank_out": 38}
    assert widths(model, passes.InsertBottleneck(13), x)["0"] == {"rank_in": 13, "rank_out": 13}


def test_widths_are_per_group() -> None:
    model = net(nn.Conv2d(16, 24, 3, groups=2))
    found = only(model, passes.InsertReduction(0.5))
    assert found.settings["widths"] == {"rank_in": 4}
    edited = carry_out(model, Plan((found,))).model
    assert edited[0].reduce.out_channels == 8
    assert edited[0].reduce.groups == 2


def low_rank_conv(rank: int) -> nn.Conv2d:
    """A convolution whose kernel uses only some of its input and output channels' space."""
    conv = nn.Conv2d(16, 16, 3)
    torch.manual_seed(0)
    core = torch.randn(rank, rank, 3, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("oa,abxy,bi->oixy", torch.randn(16, rank), core, torch.randn(rank, 16)))
    return conv


@pytest.mark.parametrize("one", [passes.InsertBottleneck, passes.InsertReduction, passes.InsertExpansion])
def test_energy_finds_the_rank(one: type[passes.LayerPass]) -> None:
    """Noise-free rank 3 keeps all but rounding with three; all energy short of 1e-6 is in three directions."""
    model = net(low_rank_conv(3))
    found = only(model, one(energy=1 - 1e-6))
    assert set(found.settings["widths"].values()) == {3}
    (edit,) = carry_out(model, Plan((found,))).edits
    assert edit.relative_error < 1e-3


@pytest.mark.parametrize(
    "one", [passes.InsertBottleneck, passes.InsertReduction, passes.InsertExpansion, passes.FactorizeSpatial]
)
def test_vbmf_chooses_a_width_inside(one: type[passes.LayerPass]) -> None:
    conv = low_rank_conv(3)
    with torch.no_grad():
        conv.weight += 0.05 * torch.randn_like(conv.weight)
    (found,) = widths(net(conv), one(vbmf=True)).values()
    assert all(1 <= width <= 8 for width in found.values())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -3}, "rank"),
        ({"rank": 1.5}, "ratio"),
        ({"rank": True}, "rank"),
        ({"rank": "many"}, "rank"),
        ({"rank": (1, 2, 3)}, "2 width"),
        ({"rank": 4, "energy": 0.5}, "exclude each other"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"min_share": 2}, "min_share"),
        ({"init": "zeros"}, "init"),
        ({"activation": "relu"}, "init='fresh'"),
        ({"init": "fresh", "activation": "relux"}, "activation"),
        ({"init": "fresh", "norm": "layer"}, "norm"),
        ({"init": "fresh", "vbmf": True}, "weights"),
    ],
)
def test_settings_that_make_no_sense(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError) as caught:
        passes.InsertBottleneck(**arguments)
    assert word in str(caught.value)


def test_a_width_beyond_every_layer_is_an_error() -> None:
    with pytest.raises(UsageError, match="rank_in 64") as caught:
        proposed(net(nn.Conv2d(16, 16, 3)), passes.InsertBottleneck(64))
    assert caught.value.where == "0"
    assert "16" in str(caught.value.expected)


def test_a_width_beyond_some_layers_skips_those() -> None:
    model = net(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3))
    found = proposed(model, passes.InsertBottleneck(16), torch.zeros(1, 3, 8, 8))
    assert [type(p) for p in found] == [Skip, Op]
    assert found[0].reason is SkipReason.TOO_SMALL  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------- which layers


def test_include_exclude_and_select() -> None:
    model = net(*(nn.Conv2d(16, 16, 3) for _ in range(4)))

    def chosen(**settings: Any) -> list[str]:
        found = proposed(model, passes.InsertBottleneck(4, **settings), torch.zeros(1, 16, 16, 16))
        return [p.path for p in found if isinstance(p, Op)]

    assert chosen() == ["0", "1", "2", "3"]
    assert chosen(include=["1", "[23]"], exclude=["3"]) == ["1", "2"]
    assert chosen(select=lambda layer: layer.macs == 16 * 16 * 9 * 14 * 14) == ["0"]
    assert chosen(min_share=0.25) == ["0", "1"]  # 14², 12², 10² and 8² positions


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(key: str) -> None:
    model = nn.ModuleDict({"layer1": nn.Conv2d(16, 16, 3)})
    model.forward = model["layer1"].forward  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="'layr1' matches no layer") as caught:
        proposed(net(nn.Sequential(nn.Conv2d(16, 16, 3))), passes.InsertBottleneck(4, **{key: ["layr1"]}))
    assert "0.0" in str(caught.value.hint)


def test_an_alias_is_matched() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(16, 16, 3)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x)

    (found,) = proposed(Model(), passes.InsertBottleneck(4, include=["b"]))
    assert isinstance(found, Op)
    assert found.path == "a"


def test_every_reason_of_shape_and_share() -> None:
    model = net(
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 1, 3),
        nn.Conv2d(1, 8, (1, 3)),
    )
    x = torch.zeros(1, 16, 12, 12)
    assert reasons(model, passes.InsertBottleneck(1.0)) == {
        "0": SkipReason.POINTWISE,
        "1": SkipReason.DEPTHWISE,
        "2": SkipReason.NO_GAIN,
        "3": SkipReason.NO_GAIN,
    }
    assert reasons(model, passes.InsertBottleneck(0.5, min_share=0.9), x)["2"] is SkipReason.BELOW_SHARE
    assert reasons(model, passes.InsertBottleneck(1, include=["2"]), x)["0"] is SkipReason.EXCLUDED
    assert reasons(model, passes.FactorizePointwise(2))["2"] is SkipReason.WRONG_FORM
    assert reasons(model, passes.FactorizePointwise(2))["1"] is SkipReason.DEPTHWISE
    assert reasons(model, passes.FactorizeSpatial(2))["3"] is SkipReason.WRONG_FORM


def test_growth_is_a_skip_unless_allowed_or_fresh() -> None:
    model = net(nn.Conv2d(16, 16, 3))
    assert reasons(model, passes.InsertBottleneck(1.0)) == {"0": SkipReason.NO_GAIN}
    assert reasons(model, passes.InsertBottleneck(1.0, allow_growth=True)) == {}
    assert reasons(model, passes.InsertBottleneck(1.0, init="fresh")) == {}


def test_weights_on_meta_have_no_energy() -> None:
    with torch.device("meta"):
        model = net(nn.Conv2d(16, 16, 3))
    assert reasons(model, passes.InsertBottleneck(energy=0.9)) == {"0": SkipReason.WRONG_FORM}
    assert reasons(model, passes.InsertBottleneck(4)) == {}


class Holder(nn.Module):
    """Holds what a test gives it and runs it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Own(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Reader(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer.weight.mean()


class Shared(Holder):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(16, 16, 3))
        self.other = nn.Conv2d(16, 16, 3)
        self.other.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.other(x)


class SharedBias(Shared):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(16, 16, 3)
        self.other.bias = self.layer.bias


class Uncalled(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 16, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.weight), self.weight, stride=2)


def hooked() -> nn.Module:
    layer = nn.Conv2d(16, 16, 3)
    layer.register_forward_hook(lambda *_: None)
    return Holder(layer)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Holder(Own(16, 16, 3)), SkipReason.OVERRIDDEN_FORWARD),
        (Holder(parametrizations.weight_norm(nn.Conv2d(16, 16, 3))), SkipReason.PARAMETRIZED),
        (hooked(), SkipReason.HOOKS),
        (Shared(), SkipReason.SHARED_WEIGHT),
        (SharedBias(), SkipReason.SHARED_WEIGHT),
        (Reader(nn.Conv2d(16, 16, 3)), SkipReason.WEIGHT_READ),
        (Uncalled(nn.Conv2d(16, 16, 3)), SkipReason.NOT_CALLED),
        (Repeated(), SkipReason.FUNCTIONAL),
    ],
)
def test_what_must_not_be_rewritten(model: nn.Module, reason: SkipReason) -> None:
    found = reasons(model.eval(), passes.InsertBottleneck(4))
    assert found
    assert set(found.values()) == {reason}


# -------------------------------------------------------------------------------------------- what is put in


def test_fresh_chains_have_norms_and_activations() -> None:
    model = net(nn.Conv2d(16, 16, 3))
    one = passes.InsertBottleneck(4, init="fresh", norm="batch_norm", activation="relu")
    applied = carry_out(model, Plan((only(model, one),)))
    (edit,) = applied.edits
    inner = [type(m).__name__ for m in applied.model[0].children()]
    assert inner == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]
    assert edit.relative_error is None
    assert edit.exact is None


def test_second_run_does_nothing_and_replan_does() -> None:
    x = torch.randn(2, 16, 8, 8)
    model = net(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3))
    one = passes.InsertBottleneck(8)
    first = carry_out(model, Plan(tuple(p for p in proposed(model, one) if isinstance(p, Op)))).model
    assert reasons(first, one)["0.core"] is SkipReason.ALREADY_BOTTLENECK
    assert len(reasons(first, one)) == 6

    again = passes.InsertBottleneck(4, replan=True)
    plan = Plan(tuple(p for p in proposed(first, again) if isinstance(p, Op)))
    assert [op.path for op in plan] == ["0.core", "2.core"]
    second = carry_out(first, plan).model
    assert second[0].core.reduce.in_channels == 8
    assert second[0].in_channels == 16
    assert second[0].bias is second[0].expand.bias
    assert second(x).shape == model(x).shape
    exact = passes.FactorizePointwise(1.0, replan=True, allow_growth=True)
    plan = Plan(tuple(p for p in proposed(second, exact) if isinstance(p, Op)))
    third = carry_out(second, plan)
    assert len(third.edits) == 8
    # Full rank in float32: some 10 chained products of fewer than 100 terms, 1e-7 each.
    assert torch.allclose(third.model(x), second(x), atol=1e-5)


def test_replan_of_a_transposed_core_takes_an_output_size() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[2 * n for n in x.shape[2:]])

    model, x = Up().double(), torch.randn(1, 16, 5, 7).double()
    for one in (
        passes.InsertBottleneck(1.0, allow_growth=True),
        passes.InsertBottleneck(1.0, allow_growth=True, replan=True),
    ):
        found = one.propose(capture(model, x))
        changed = carry_out(model, Plan(tuple(p for p in found if isinstance(p, Op)))).model
        assert changed(x).shape == (1, 16, 10, 14)
        assert torch.allclose(changed(x), model(x), atol=1e-10)  # float64, some 1e-15 per stage
        model = changed


def test_estimates_know_shared_layers() -> None:
    """Parameters once, MACs per call."""

    class Twice(Holder):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    estimate = only(Twice(nn.Conv2d(16, 16, 3, padding=1, bias=False)), passes.InsertReduction(4)).estimate
    assert (estimate.params_before, estimate.params_after) == (16 * 16 * 9, 16 * 4 + 16 * 4 * 9)
    assert (estimate.macs_before, estimate.macs_after) == (2 * 64 * 16 * 16 * 9, 2 * 64 * (16 * 4 + 16 * 4 * 9))


def test_every_pass_says_what_it_is() -> None:
    assert len({one.name for one in passes.ALL}) == len(passes.ALL)
    for one in passes.ALL:
        assert one.summary
        assert one().name == one.name


def test_a_rewrite_pays_by_a_least_gain() -> None:
    stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)  # at half width it saves 4.6% of its MACs
    model, x = net(stem, nn.ReLU(), nn.Conv2d(32, 64, 3)), torch.zeros(1, 3, 32, 32)
    default = passes.InsertBottleneck()
    (skip,) = [p for p in proposed(model, default, x) if isinstance(p, Skip)]
    assert (skip.path, skip.reason) == ("0", SkipReason.NO_GAIN)
    assert "less than 10.0% (--min-gain)" in skip.detail
    assert "at rank-in 2, rank-out 16 " in skip.detail
    assert "_" not in skip.detail
    assert set(widths(model, default, x)) == {"2"}
    for asked in (
        passes.InsertBottleneck(min_gain=0.0),
        passes.InsertBottleneck((2, 16)),  # a width is what its user wants
        passes.InsertBottleneck(allow_growth=True),
        passes.InsertBottleneck(init="fresh"),
    ):
        assert set(widths(model, asked, x)) == {"0", "2"}
    assert reasons(model, passes.InsertBottleneck(2, min_gain=0.99), x)["2"] is SkipReason.NO_GAIN
    with pytest.raises(UsageError, match="min_gain"):
        passes.InsertBottleneck(min_gain=2.0)
