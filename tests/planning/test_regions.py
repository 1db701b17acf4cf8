"""Modules that a 1×1 map, or nothing, takes the place of: which ones, at what loss, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pwrewrite
from pwrewrite.capturing import capture
from pwrewrite.core.errors import PlanError, RefusedError
from pwrewrite.core.options import Budget
from pwrewrite.core.plan import Op, Plan, SkipReason
from pwrewrite.decompose.nearest_map import nearest_map
from pwrewrite.edit.apply import apply
from pwrewrite.passes.regions import Region, find_regions
from pwrewrite.planning.measuring import exact_loss
from pwrewrite.planning.planner import Planner
from pwrewrite.planning.replaceable import ReplaceableLayers


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", str(tmp_path / "cache"))


def images(count: int, channels: int = 8, size: int = 8) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A residual block; ``small`` makes its branch do next to nothing."""

    def __init__(self, width: int = 8, stride: int = 1, small: float = 1.0) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, width, 3, stride, padding=1), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.short = nn.Conv2d(width, width, 1, stride) if stride > 1 else nn.Identity()
        with torch.no_grad():
            self.second.weight *= small
            assert self.second.bias is not None
            self.second.bias *= small

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.short(x) + self.second(F.relu(self.norm(self.first(x))))
        return out


class Pointwise(nn.Module):
    """Two layers that together are one 1×1 map, in the middle of a kernel that is nothing but its centre."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.wide, self.back = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 6, 3, stride, padding=1)
        with torch.no_grad():
            centre = self.back.weight[:, :, 1, 1].clone()
            self.back.weight.zero_()
            self.back.weight[:, :, 1, 1] = centre

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.back(self.wide(x))
        return out


def network(*blocks: nn.Module, out: int = 8) -> nn.Sequential:
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out, 5)).eval()


def regions(model: nn.Module, x: Tensor) -> dict[str, Region]:
    return {region.path: region for region in find_regions(capture(model, (x,)))[0]}


# ------------------------------------------------------------------------------------------------------- which ones


def test_blocks_stages_and_strides() -> None:
    model = nn.Sequential(nn.Sequential(Block(), Block()), Block(stride=2)).eval()
    found = regions(model, images(1))
    assert list(found) == ["0", "0.0", "0.1", "1"]
    stage, strided = found["0"], found["1"]
    assert [layer.path for layer in stage.layers] == ["0.0.first", "0.0.second", "0.1.first", "0.1.second"]
    assert stage.droppable
    assert stage.mappable
    assert stage.params == sum(p.numel() for p in model[0].parameters())
    assert stage.macs == 4 * 64 * 8 * 8 * 9
    assert (strided.spec.stride, strided.droppable, strided.positions) == ((2, 2), False, 16)
    estimate = strided.op(drop=False).estimate
    assert estimate is not None
    assert (estimate.params_after, estimate.macs_after) == (72, 16 * 64)
    assert estimate.params_before == sum(p.numel() for p in model[1].parameters())


def test_transformers_are_linear_maps_between_tokens() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    found = regions(nn.Sequential(nn.Linear(4, 16), layer, nn.Linear(16, 2)).eval(), torch.randn(2, 5, 4))
    assert found["1"].spec.dims == 0
    assert (found["1"].spec.in_channels, found["1"].droppable) == (16, True)


class Pooled(nn.Module):
    """Halves a map and rounds down, where a stride rounds up."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class Kept(nn.Module):
    """A network of two blocks that somebody else has to do with."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.one, self.two = how, Block(), Block()
        if how == "shared":
            self.two.first.weight = self.one.first.weight
        if how == "hook":
            self.one.norm.register_forward_hook(lambda *_: None)
        self.seen: Tensor | None = None
        if how == "list":
            self.__dict__["again"] = [self.one]

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        if self.how == "twice":
            y = self.one(y)
        if self.how == "inner":
            y = y + self.one.first(x)
        if self.how == "reads":
            y = y * self.one.norm.weight.sum()
        if self.how == "writes":
            y += 1
        z: Tensor = self.two(y)
        return z


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("shared", SkipReason.HELD_ELSEWHERE),
        ("hook", SkipReason.HOOKS),
        ("twice", SkipReason.CALLED_TWICE),
        ("inner", SkipReason.HELD_ELSEWHERE),
        ("reads", SkipReason.HELD_ELSEWHERE),
    ],
)
def test_what_others_have_to_do_with_stays(how: str, reason: SkipReason) -> None:
    found, skips = find_regions(capture(Kept(how).eval(), (images(1),)))
    assert ("two" in {region.path for region in found}) is (how != "shared")
    assert {skip.path: skip.reason for skip in skips}["one"] is reason


def test_what_is_written_into_later_is_not_dropped() -> None:
    found = regions(Kept("writes").eval(), images(1))
    assert found["one"].mappable
    assert not found["one"].droppable
    assert found["two"].droppable


def test_sizes_must_agree_at_every_size() -> None:
    assert "body" not in regions(Pooled().eval(), images(1))
    assert "1" in regions(nn.Sequential(nn.ReLU(), Block(stride=2)).eval(), images(1))


class Turned(nn.Module):
    """Two convolutions over another axis than the second one of the input."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes, kind = axes, nn.Conv1d if len(axes) == 3 else nn.Conv2d
        self.one, self.two = kind(8, 8, 3, padding=1), kind(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x.permute(self.axes)).relu())
        back = [self.axes.index(i) for i in range(len(self.axes))]
        out: Tensor = y.permute(back)
        return out


class Fixed(nn.Module):
    """Gives a map of one size, which is by chance that of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(8)
        )
        self.head = nn.Linear(512, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stage(x).flatten(1))
        return out


def test_channels_are_not_taken_for_sizes() -> None:
    assert "0" not in regions(nn.Sequential(Turned(0, 3, 1, 2), nn.ReLU()).eval(), torch.randn(1, 9, 9, 8))
    assert "0" not in regions(nn.Sequential(Turned(0, 2, 1), nn.ReLU()).eval(), torch.randn(1, 9, 8))
    unbatched = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    assert "0" not in regions(nn.Sequential(unbatched, nn.ReLU()).eval(), torch.randn(8, 9, 9))
    assert "stage" not in regions(Fixed().eval(), images(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strided_blocks_in_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.ReLU(), Block(stride=2)).eval().to(dtype)
    assert regions(model, images(1).to(dtype))["1"].spec.stride == (2, 2)


def test_inputs_of_several_sizes() -> None:
    torch.manual_seed(0)
    batches = [images(16), images(16, size=12), images(16, size=7), images(16)]
    for model in (network(Block(), Block(small=0.1), Block(stride=2)), Fixed().eval()):
        some = batches if isinstance(model, nn.Sequential) else [images(16)] * 4
        result = pwrewrite.rewrite(model, images(2), Budget({"macs": 0.7}, calibration=some))
        assert result.report.passed, result.report.verification.failures  # type: ignore[union-attr]


def test_an_error_that_is_not_known_is_not_within_a_limit() -> None:
    torch.manual_seed(0)

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(16, 2), nn.Linear(2, 16)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.up(F.gelu(self.down(x)))
            return out

    model, x = nn.Sequential(nn.Linear(16, 16), Adapter(), nn.Linear(16, 4)).eval(), torch.randn(200, 16)
    settings = {"forms": ("substitute",), "max_layer_error": 0.5}
    assert [(r.mappable, r.droppable) for r in find_regions(capture(model, (x,)))[0]] == [(False, True)]
    assert Planner(model, x[:2], x, Budget({"macs": 0.9}, forms=("substitute",))).joint
    assert not Planner(model, x[:2], x, Budget({"macs": 0.9}, **settings)).joint  # type: ignore[arg-type]


def test_layers_say_why_the_modules_around_them_stay() -> None:
    forms = ("substitute",)
    pooled = Planner(Pooled().eval(), images(2), images(64), Budget(forms=forms, best_effort=True)).choose([])
    assert {(s.path, s.reason) for s in pooled.plan.skips} == {(f"body.{i}", SkipReason.DATA_DEPENDENT) for i in (0, 2)}
    assert all("other sizes" in skip.detail for skip in pooled.plan.skips)
    few = Planner(network(Block()), images(2), images(2)[:, :, :3, :3], Budget(forms=forms)).choose([]).plan.skips
    inside = [skip for skip in few if skip.path.startswith("0.")]
    assert {skip.reason for skip in inside} == {SkipReason.NO_STATISTICS}
    assert all("9 positions there, and 32 are needed" in skip.detail for skip in inside)
    alone = [skip for skip in few if not skip.path.startswith("0.")]
    assert alone
    assert all("no module around it" in skip.detail for skip in alone)
    without = Planner(network(Block()), images(2), None, Budget(forms=forms)).choose([]).plan.skips
    assert {skip.reason for skip in without} == {SkipReason.NO_STATISTICS}


# ------------------------------------------------------------------------------------------------- maps and their loss


@pytest.mark.parametrize("stride", [1, 2])
def test_a_module_that_is_a_map_is_found_to_be_one(stride: int) -> None:
    torch.manual_seed(0)
    model = network(Pointwise(stride), out=6)
    result = pwrewrite.rewrite(model, images(2), Budget({"macs": 0.2}, calibration=images(64), forms=("substitute",)))
    assert [(edit.path, edit.method) for edit in result.edits] == [("0", "substitute")]
    assert result.report.passed, result.report.verification.failures  # type: ignore[union-attr]
    layer = result.model[0]
    assert type(layer) is nn.Conv2d
    assert (layer.kernel_size, layer.stride) == ((1, 1), (stride, stride))
    other = images(4, size=11)
    torch.testing.assert_close(result.model(other), model(other), atol=2e-3, rtol=1e-3)
    saved = result.report.before["macs"] - result.report.after["macs"]
    assert saved == 2 * (64 * 8 * 24 + 64 // stride**2 * (24 * 6 * 9 - 8 * 6))


@pytest.mark.parametrize("frozen", [("wide.weight",), ("wide.weight", "wide.bias", "back.weight", "back.bias")])
def test_a_map_learns_where_part_of_the_module_did(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = network(Pointwise(), out=6)
    for name in frozen:
        model[0].get_parameter(name).requires_grad_(False)
    result = pwrewrite.rewrite(model, images(2), Budget({"macs": 0.2}, calibration=images(64), forms=("substitute",)))
    assert [(edit.path, edit.method) for edit in result.edits] == [("0", "substitute")]
    assert result.report.passed, result.report.verification.failures  # type: ignore[union-attr]
    assert all(parameter.requires_grad == (len(frozen) == 1) for parameter in result.model[0].parameters())


class Rectified(Block):
    """A block whose outputs are in the range of an activation."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(super().forward(x))
        return out


@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6, nn.Sigmoid])
@pytest.mark.parametrize("refit", ["full", "none"])
def test_outputs_stay_in_the_range_of_an_activation(kind: type[nn.Module], refit: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Rectified(kind()), nn.Conv2d(8, 4, 1)).eval()
    region = regions(model, images(1))["0"]
    assert region.activation == {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(kind)
    plan = Plan((region.op(drop=False),))
    result = pwrewrite.rewrite(model, images(2), plan, calibration=images(64), refit=refit)
    assert result.report.passed, result.report.verification.failures  # type: ignore[union-attr]
    put_in = result.model[0]
    assert type(put_in) is (nn.Conv2d if kind is nn.Sigmoid else nn.Sequential)
    if kind is not nn.Sigmoid:
        assert float(put_in(images(16)).min()) == 0
    planner = Planner(model, images(2), images(64), Budget({"macs": 0.9}, forms=("substitute",), refit=refit))
    assert planner.meter is not None
    assert planner.batches is not None
    if refit == "none":
        x = planner.batches.first()[0][0][0][:16]
        expected = exact_loss(model(x), result.model(x), planner.outputs)
        (group,) = [each for each in planner.measured if each.path == "0"]
        assert planner.meter.loss(group, plan.ops[0]) == pytest.approx(expected, rel=1e-3)
    result.save(tmp_path / "out")
    assert torch.equal(pwrewrite.load(tmp_path / "out", model)(images(3)), result.model(images(3)))


def test_a_module_whose_activation_others_share_is_replaced() -> None:
    torch.manual_seed(0)
    shared = nn.Tanh()
    model = network(Rectified(shared), Rectified(shared), Block(small=1e-3))
    region = regions(model, images(1))["1"]
    for drop in (False, True):
        result = pwrewrite.rewrite(model, images(2), Plan((region.op(drop=drop),)), calibration=images(64))
        assert [edit.path for edit in result.edits] == ["1"]
        assert result.report.passed, result.report.verification.failures  # type: ignore[union-attr]
        assert result.model[0].activation is not shared  # type: ignore[union-attr]
        assert isinstance(result.model[0].activation, nn.Tanh)  # type: ignore[union-attr]


def test_a_block_that_does_next_to_nothing_is_dropped_first() -> None:
    torch.manual_seed(0)
    model = network(Block(), Block(small=1e-3), Block())
    planner = Planner(model, images(2), images(64), Budget({"macs": 0.7}, forms=("substitute",)))
    losses = {found.path: {c.op.settings["drop"]: c.loss for c in found.candidates if c.op} for found in planner.joint}
    assert losses["1"][True] < 1e-3 * min(losses["0"][True], losses["2"][True])
    assert all(each[False] < each[True] for path, each in losses.items() if path != "1")
    tight = Budget({"macs": 0.67}, calibration=images(64), forms=("substitute",))
    result = pwrewrite.rewrite(model, images(2), tight)
    assert [(edit.path, edit.method) for edit in result.edits] == [("1", "drop")]
    assert type(result.model[1]) is nn.Identity


def test_the_loss_is_what_the_outputs_lose() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(small=0.2), nn.Conv2d(8, 4, 1)).eval()
    planner = Planner(model, images(2), images(256), Budget({"macs": 0.7}, forms=("substitute",), refit="none"))
    (found,) = [each for each in planner.joint if each.path == "1"]
    for candidate in found.candidates[1:]:
        assert candidate.op is not None
        rewritten = pwrewrite.rewrite(
            model, images(2), Plan((candidate.op,)), calibration=images(256), refit="none", verify=False
        ).model
        measured = planner.measure(rewritten).loss
        assert 0.8 < candidate.loss / measured < 1.25


def test_the_nearest_map_is_the_least_squares_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(4, 3, generator=generator, dtype=torch.float64) + 2 + 0.1 * torch.randn(500, 3).double()
    both = torch.cat([x, y], 1)
    found = nearest_map(both.T.cov(correction=0), both.mean(0), 4, 0, 1e-12)
    design = torch.cat([x, torch.ones(500, 1).double()], 1)
    solution = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(torch.cat([found.kernel.T, found.bias[None]]), solution)
    rest = y - design @ solution
    torch.testing.assert_close(found.missed, rest.T @ rest / 500)


# ------------------------------------------------------------------------------------------- plans, folders, conflicts


def rewritten(**options: object) -> tuple[nn.Module, pwrewrite.Rewritten]:
    torch.manual_seed(0)
    model = network(Block(), Block(small=1e-3), Block(stride=2))
    budget = Budget({"macs": 0.45}, calibration=images(64), **options)  # type: ignore[arg-type]
    return model, pwrewrite.rewrite(model, images(2), budget)


def test_a_saved_result_is_loaded_and_its_plan_carried_out_again(tmp_path: Path) -> None:
    model, result = rewritten(forms=("substitute",))
    assert "substitute" in {edit.method for edit in result.edits}
    result.save(tmp_path / "out")
    assert torch.equal(pwrewrite.load(tmp_path / "out", model)(images(3)), result.model(images(3)))
    again = pwrewrite.rewrite(model, images(2), Plan.from_json(result.plan.to_json()), calibration=images(64))
    torch.testing.assert_close(again.model(images(3)), result.model(images(3)))
    with pytest.raises(RefusedError, match="fitted on calibration inputs"):
        apply(model, result.plan)
    dropped = apply(model, Plan((regions(model, images(1))["1"].op(drop=True),)))
    torch.testing.assert_close(dropped(images(2)), model(images(2)), atol=1e-3, rtol=1e-2)


def test_every_form_competes_and_no_layer_is_changed_twice() -> None:
    _, result = rewritten()
    assert result.report.passed, result.report.verification.failures  # type: ignore[union-attr]
    whole = [edit.path for edit in result.edits if edit.op.action == "substitute"]
    assert not [e.path for e in result.edits for path in whole if e.path != path and e.path.startswith(f"{path}.")]


def test_layers_that_are_left_out_keep_their_regions() -> None:
    _, result = rewritten(forms=("substitute",), exclude=["1.second"], best_effort=True)
    assert "1" not in {edit.path for edit in result.edits}


def test_moments_are_held_of_the_largest_regions_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(Block(), Block(stride=2), Block())  # 16 numbers a row each, 8 bytes
    captured, budget = capture(model, (images(1),)), Budget(sensitivity="loss")
    assert [region.path for region in ReplaceableLayers(captured, budget).regions] == ["0", "1", "2"]
    monkeypatch.setattr("pwrewrite.planning.replaceable._ROOM", 2 * 16 * 16 * 8)
    assert [region.path for region in ReplaceableLayers(captured, budget).regions] == ["0", "1"]


def wrong(change: Callable[[dict[str, object]], object]) -> Op:
    region = regions(network(Block()), images(1))["0"]
    op = region.op(drop=True)
    settings = {**op.settings, "layer": dict(op.settings["layer"])}
    change(settings)
    return Op(op.action, op.path, op.pass_name, settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["layer"].update(out_channels=4), "shape of its input"),
        (lambda s: s["layer"].update(kernel_size=[3, 3]), "no such layer is put"),
        (lambda s: s["layer"].update(bias=False), "no such layer is put"),
        (lambda s: s.update(drop="yes"), "drop"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(change: Callable[[dict[str, object]], object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        apply(network(Block()), Plan((wrong(change),)))


def test_a_module_held_elsewhere_stays() -> None:
    model = Kept("list").eval()
    op = regions(model, images(1))["one"].op(drop=True)
    with pytest.raises(RefusedError, match="held by"):
        apply(model, Plan((op,)))
