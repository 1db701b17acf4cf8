"""Fitting in lock-step: forwards stop where they should, and what is fitted comes nearer to the original."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pwrewrite.capturing import capture
from pwrewrite.core.convolution import ConvSpec
from pwrewrite.core.options import Budget
from pwrewrite.edit.apply import carry_out
from pwrewrite.forms import FORMS
from pwrewrite.forms.specs import linear_spec
from pwrewrite.forms.weighted import WeightedLayer
from pwrewrite.layers.factorized import build
from pwrewrite.passes import InsertBottleneck, ShareReduction
from pwrewrite.planning.budget import budgets_of
from pwrewrite.planning.fit_steps import changed_places, fit_steps, off_mean, residuals, shift_biases
from pwrewrite.planning.gathering import Gathering, gather
from pwrewrite.planning.lockstep import Lockstep
from pwrewrite.planning.planner import Planner
from pwrewrite.planning.refit import Residual, Target, refit
from pwrewrite.workflows.rewrite import rewrite


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(x + self.bn2(self.conv2(y)), inplace=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.train()
    for _ in range(20):
        net(torch.randn(16, 3, 10, 10))
    return net.eval()


def inputs(count: int = 6, seed: int = 2) -> list[tuple[tuple[Tensor], dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    return [((torch.randn(16, 3, 10, 10, generator=generator),), {}) for _ in range(count)]


LAYERS = ("blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2")
ORDER = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("conv1", "bn1", "conv2", "bn2")]


def steps(targets: list[Target]) -> list[Target | str]:
    """The layers and the norms in the order in which they run."""
    layers = {target.path: target for target in targets}
    return [layers.get(path, path) for path in ORDER if path in layers or "bn" in path]


def reduced(model: Net) -> tuple[Net, list[Target]]:
    """The model with every block convolution cut to a third, and what to fit."""
    changed = copy.deepcopy(model)
    where = residuals(capture(model, inputs()[0][0][0]), LAYERS)
    targets = []
    for path in LAYERS:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Conv2d)
        spec = ConvSpec.of_module(layer)
        new = build(spec, "expand", {"rank_out": 3})
        new.load_factors(FORMS["expand"].fit(WeightedLayer(layer.weight, spec, None, None), {"rank_out": 3}), None)
        parent, _, name = path.rpartition(".")
        setattr(changed.get_submodule(parent), name, new)
        targets.append(Target(path, spec, layer.weight.detach(), None, where.get(path)))
    return changed, targets


def distance(one: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((one(*args) - other(*args)).square().sum()) for args, _ in inputs(4, seed=9))


def test_residual_branches_are_found(model: Net) -> None:
    found = residuals(capture(model, inputs()[0][0][0]), LAYERS)
    assert found == {
        "blocks.0.conv2": Residual("blocks.0.bn2", ("blocks.0.conv1", "input")),
        "blocks.1.conv2": Residual("blocks.1.bn2", ("blocks.1.conv1", "input")),
    }


class Unmended(nn.Module):
    """Layers without biases before a group norm, before nothing and, in a sum, before a batch and an instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.group = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.GroupNorm(4, 24)
        self.bare, self.out = (nn.Conv2d(24, n, 3, padding=1, bias=False) for n in (24, 4))
        self.left, self.right = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.batch, self.instance = nn.BatchNorm2d(4), nn.InstanceNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.out(self.bare(self.group(self.grouped(x + 1)).relu() + 1).relu())
        total = self.left(x) + self.right(x)
        return x + self.batch(total) + self.instance(total)


def test_the_mean_is_taken_off_where_a_norm_makes_up_for_it(model: Net) -> None:
    assert off_mean(capture(model, inputs()[0][0][0])) >= {"blocks.0.conv1", "blocks.1.conv1"}
    convolutions = {"grouped", "bare", "out", "left", "right"}
    assert off_mean(capture(Unmended().eval(), inputs()[0][0][0])) & convolutions == {"left", "right"}


def test_what_nothing_makes_up_for_keeps_its_mean() -> None:
    torch.manual_seed(0)
    original = Unmended().eval()
    planner = Planner(original, inputs()[0][0][0], [args[0] for args, _ in inputs()], Budget(forms=("expand",)))
    plan = planner.choose(budgets_of({"macs": 0.5})).plan
    changed = carry_out(original, plan, decomposer=planner.decomposer).model
    plain = distance(original, changed)
    order = fit_steps(planner.captured, changed, plan, planner.replaceable.specs, planner.statistics)
    assert refit(original, changed, order, inputs())
    assert distance(original, changed) < plain


def test_fitting_comes_nearer_on_inputs_it_has_not_seen(model: Net) -> None:
    changed, targets = reduced(model)
    biased = copy.deepcopy(changed)
    plain = distance(model, changed)
    refit(model, biased, steps([replace(target, factors=False) for target in targets]), inputs())
    errors = refit(model, changed, steps(targets), inputs())
    assert distance(model, biased) < plain
    assert distance(model, changed) < 0.7 * plain
    assert distance(model, changed) < distance(model, biased)
    assert set(errors) == set(LAYERS)
    for target in targets:
        made: nn.Module = changed.get_submodule(target.path)
        kernel = torch.einsum("or,rikl->oikl", made.expand.weight[:, :, 0, 0], made.core.weight)  # type: ignore[union-attr, index]
        error = float((kernel - target.weight).norm() / target.weight.norm())
        assert errors[target.path] == pytest.approx(error, rel=1e-4)


def test_looking_at_the_other_side_of_a_sum_helps(model: Net) -> None:
    with_sums, targets = reduced(model)
    without = copy.deepcopy(with_sums)
    refit(model, with_sums, steps(targets), inputs())
    alone = [Target(t.path, t.spec, t.weight, t.gradients) for t in targets]
    refit(model, without, steps(alone), inputs())
    assert distance(model, with_sums) < distance(model, without)


def test_a_full_width_is_fitted_to_itself(model: Net) -> None:
    changed = copy.deepcopy(model)
    layer = model.blocks[0].conv1
    spec = ConvSpec.of_module(layer)  # type: ignore[arg-type]
    new = build(spec, "expand", {"rank_out": 8})
    new.load_factors(FORMS["expand"].fit(WeightedLayer(layer.weight, spec, None, None), {"rank_out": 8}), None)  # type: ignore[arg-type]
    changed.blocks[0].conv1 = new
    refit(model, changed, steps([Target("blocks.0.conv1", spec, layer.weight.detach(), None)]), inputs())  # type: ignore[operator]
    x = inputs(1, seed=9)[0][0][0]
    torch.testing.assert_close(changed(x), model(x), rtol=1e-4, atol=1e-4)


def test_linear_and_transposed_layers_are_fitted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6)).eval()
    changed = copy.deepcopy(model)
    spec = linear_spec(12, 16, True)
    weight = model[0].weight.detach()
    assert isinstance(weight, Tensor)
    new = build(spec, "pair", {"rank": 4})
    new.load_factors(FORMS["pair"].fit(WeightedLayer(weight, spec, None, None), {"rank": 4}), None)
    changed[0] = new
    mixing = torch.randn(12, 12)
    data: list[tuple[tuple[Tensor], dict[str, Tensor]]] = [((torch.randn(40, 12) @ mixing + 1,), {}) for _ in range(5)]
    with torch.no_grad():
        before = float((changed(data[0][0][0]) - model(data[0][0][0])).norm())
        refit(model, changed, [Target("0", spec, weight, None)], data)
        assert float((changed(data[0][0][0]) - model(data[0][0][0])).norm()) < before
    transposed = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2)).eval()
    changed = copy.deepcopy(transposed)
    tspec = ConvSpec.of_module(transposed[0])  # type: ignore[arg-type]
    tweight = transposed[0].weight.detach()
    assert isinstance(tweight, Tensor)
    changed[0] = build(tspec, "expand", {"rank_out": 2})
    changed[0].load_factors(FORMS["expand"].fit(WeightedLayer(tweight, tspec, None, None), {"rank_out": 2}), None)  # type: ignore[operator]
    maps: list[tuple[tuple[Tensor], dict[str, Tensor]]] = [((torch.rand(3, 4, 5, 5),), {}) for _ in range(3)]
    refit(transposed, changed, [Target("0", tspec, tweight, None)], maps)
    with torch.no_grad():
        for axis_mean in [(changed(x) - transposed(x)).mean((0, 2, 3)) for (x,), _ in maps[:1]]:
            assert float(axis_mean.abs().max()) < 0.05


def test_models_and_threads_are_left_as_they_were(model: Net) -> None:
    before = copy.deepcopy(model.state_dict())
    threads = threading.active_count()
    changed, targets = reduced(model)
    changed.train()
    refit(model, changed, steps(targets), inputs(2))
    assert threading.active_count() == threads
    assert changed.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    for net in (model, changed):
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_lockstep_stops_every_forward_in_turn(model: Net) -> None:
    with Lockstep(model, inputs(3), before=["blocks.0.conv2"], behind=["head"]) as steps:
        assert all(forward.advance_to("blocks.0.conv2") for forward in steps.forwards)
        assert [forward.path for forward in steps.forwards] == ["blocks.0.conv2"] * 3
        assert all(forward.advance_to("head") for forward in steps.forwards)
        values = [forward.value for forward in steps.forwards]
        for (args, _), value in zip(inputs(3), values):
            torch.testing.assert_close(value, model(*args))
        assert not any(forward.advance_to("blocks.0.conv2") for forward in steps.forwards)
        assert all(forward.finished for forward in steps.forwards)


def test_an_error_inside_a_forward_comes_out(model: Net) -> None:
    bad: list[tuple[tuple[Tensor], dict[str, Tensor]]] = [((torch.randn(2, 4, 10, 10),), {})]
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="channels"), Lockstep(model, bad, before=["head"]) as steps:
        steps.forwards[0].advance_to("head")
    assert threading.active_count() == threads


def test_a_norm_that_is_switched_off_makes_up_for_nothing(model: Net) -> None:
    """As residual branches are often initialised: their last norm's weight is zero."""
    with torch.no_grad():
        model.blocks[0].bn2.weight.zero_()  # type: ignore[union-attr, operator]
    changed, targets = reduced(model)
    refit(model, changed, steps(targets), inputs())
    assert all(bool(torch.isfinite(p).all()) for p in changed.parameters())
    assert distance(model, changed) < float("inf")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 12, (3, 5), stride=(2, 3), padding=(1, 4), dilation=(2, 1), groups=2),
        nn.Conv1d(8, 8, 5, padding=2, padding_mode="circular"),
        nn.Linear(8, 8),
    ],
    ids=str,
)
def test_what_is_called_several_times_keeps_the_mean_of_its_outputs(layer: Any) -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = copy.deepcopy(layer)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.layer(x), 2 * self.layer(2 - x)])

    torch.manual_seed(0)
    model = Repeats().eval()
    spec = ConvSpec.of_module(layer) if hasattr(layer, "kernel_size") else linear_spec(8, 8, True)
    x = torch.randn(16, 8, *(7,) * spec.dims) + 1  # few positions, of which none is left out
    statistics = gather(model, {"layer": spec}, [((x,), {})], Gathering(None))
    form, widths = ("reduce", {"rank_in": 2}) if spec.dims else ("pair", {"rank": 3})
    rewritten, made = copy.deepcopy(model), build(spec, form, widths)
    factors = FORMS[form].fit(WeightedLayer(model.layer.weight, spec, None, None), widths)
    made.load_factors(factors, model.layer.bias)
    rewritten.layer = made
    with torch.no_grad():
        want, before = ([m.layer(t) for t in (x, 2 - x)] for m in (model, rewritten))
        shift_biases(model, rewritten, ["layer"], {"layer": spec}, statistics)
        after = [rewritten.layer(t) for t in (x, 2 - x)]
    rest = [i for i in range(spec.dims + 2) if i != 1] if spec.dims else [0]
    gap, closed = (torch.cat(found).mean(rest) - torch.cat(want).mean(rest) for found in (before, after))
    assert gap.abs().max() > 0.05
    assert closed.abs().max() < 1e-5


def test_the_planner_says_what_was_fitted_in_its_bias_only() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(4, 16, 3, padding=1)
            self.deeper = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            first, second = (self.deeper(F.relu(self.encoder(t))) for t in (a, b))
            return (first - second).mean((2, 3))

    torch.manual_seed(0)
    model = Siamese().eval()
    pairs = [(torch.randn(8, 4, 8, 8), torch.randn(8, 4, 8, 8)) for _ in range(6)]
    made = rewrite(model, pairs[0], budget={"macs": 0.6}, calibration=pairs, thorough=False)
    assert "deeper" in {e.op.path for e in made.edits}
    assert any("called several times" in note and "deeper" in note for note in made.report.notes)
    assert made.report.passed


class Mixer(nn.Module):
    """Two branches that read one map, and a layer behind whose sum has that map on its other side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.a, self.b, self.c = (nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return x + self.c((self.a(x) + self.b(x)).relu())


def test_the_other_side_of_a_sum_is_not_read_where_a_reduction_comes_first() -> None:
    torch.manual_seed(0)
    model, x = Mixer().eval(), torch.randn(32, 3, 8, 8)
    assert residuals(capture(model, x), ["c"])["c"].place == ("a", "input")
    result = rewrite(model, x, [ShareReduction(4), InsertBottleneck(0.5, include=["c"])])
    assert [edit.op.action for edit in result.edits] == ["share-reduction", "factorize"]
    planner = Planner(model, x, x, Budget())
    before = planner.measure(result.model).loss
    assert planner.refit(result.model, result.plan).errors.keys() == {"c"}
    assert planner.measure(result.model).loss < before


class Behind(nn.Module):
    """A branch, and a layer behind it whose sum has on its other side what the branch reads."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 1))
        self.c = nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        return x + self.c(self.branch(x))


def test_the_other_side_of_a_sum_is_not_read_inside_of_what_was_replaced() -> None:
    captured = capture(Behind().eval(), torch.randn(2, 12, 8, 8))
    assert residuals(captured, ["c"])["c"].place == ("branch.0", "input")
    gone = changed_places(captured, [], {"branch"})
    assert ("branch.2", "output") in gone
    assert residuals(captured, ["c"], gone) == {}
