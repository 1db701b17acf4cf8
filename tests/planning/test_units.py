"""Channels between layers under a budget: their ladder, what excludes what, and how they are fitted."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from small_networks import batches
from torch import Tensor, nn
from torch.nn import functional as F

import pwrewrite
from pwrewrite.capturing import capture
from pwrewrite.capturing.records import Layer
from pwrewrite.core.options import Budget
from pwrewrite.core.plan import Plan
from pwrewrite.edit.apply import carry_out
from pwrewrite.planning.budget import budgets_of
from pwrewrite.planning.groups import JointGroup
from pwrewrite.planning.planner import Planner, costs_of
from pwrewrite.planning.units import UnitCandidates


class Mobile(nn.Module):
    """A stem, an inverted residual with a gate, a residual block and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.expand, self.norm1 = nn.Conv2d(12, 48, 1, bias=False), nn.BatchNorm2d(48)
        self.depthwise, self.norm2 = nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False), nn.BatchNorm2d(48)
        self.squeeze, self.excite = nn.Conv2d(48, 8, 1), nn.Conv2d(8, 48, 1)
        self.project, self.norm3 = nn.Conv2d(48, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.conv1, self.conv2 = nn.Conv2d(12, 24, 3, padding=1), nn.Conv2d(24, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu6(self.norm2(self.depthwise(F.relu6(self.norm1(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.norm3(self.project(y))
        x = x + self.conv2(F.relu(self.conv1(x)))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def mobile() -> Mobile:
    """Its norms know what they see."""
    model = Mobile()
    with torch.no_grad():
        for batch in batches():
            model(batch)
    return model.eval()


def layers_of(group: JointGroup) -> tuple[Layer, ...]:
    assert isinstance(group, UnitCandidates)
    return group.unit.layers


def planner(model: nn.Module, **settings: object) -> Planner:
    return Planner(model, X, batches(), Budget(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("sensitivity", ["loss", "activations", "weights"])
def test_the_ladder_falls_in_cost_and_rises_in_loss(sensitivity: str) -> None:
    planned = planner(mobile(), sensitivity=sensitivity, forms=("narrow",))
    assert {each.path for each in planned.joint} == {"expand", "squeeze", "conv1"}
    for each in planned.joint:
        keep, *others = each.candidates
        assert (keep.loss, keep.op, keep.claims) == (0.0, None, frozenset())
        assert len(others) > 3
        for narrower, wider in itertools.pairwise([*others, keep]):
            assert 0 <= wider.loss < narrower.loss
            assert all(narrower.costs[kind] < wider.costs[kind] for kind in wider.costs)
        assert {claim for one in others for claim in one.claims} == {layer.path for layer in layers_of(each)}


@pytest.mark.parametrize("limits", [{"macs": 0.6}, {"params": 0.7}, {"bytes": 0.8, "macs": 0.8}])
@pytest.mark.parametrize("forms", [("narrow",), ("all",)])
def test_budgets_are_met_as_predicted_and_nothing_is_changed_twice(
    limits: dict[str, float], forms: tuple[str, ...]
) -> None:
    model = mobile()
    planned = planner(model, forms=forms)
    choice = planned.choose(budgets_of(limits))
    claims = [
        c for g in (*planned.layers, *planned.joint) for o in g.candidates if o.op in choice.plan.ops for c in o.claims
    ]
    assert len(claims) == len(set(claims))
    assert any(op.action == "narrow" for op in choice.plan.ops) or forms == ("all",)
    changed = carry_out(model, choice.plan, decomposer=planned.decomposer).model
    before, after = costs_of(capture(model, X)), costs_of(capture(changed, X))
    for kind, share in limits.items():
        assert after[kind] <= share * before[kind]
    assert all(after[kind] == choice.costs[kind] for kind in ("macs", "params"))
    assert after["bytes"] <= choice.costs["bytes"]


def test_the_frontier_mixes_both_and_loses_no_more_than_either() -> None:
    model = mobile()
    both, one, other = (
        planner(model, forms=forms).frontier("macs", points=6)
        for forms in (("all",), ("narrow",), ("bottleneck", "reduce", "expand", "spatial", "depthwise", "pair"))
    )
    planned = planner(model)
    for point in (*one[1:], *other[1:]):
        most = budgets_of({"macs": f"{point.costs['macs']:.0f}"})
        assert planned.choose(most).loss <= 1.3 * point.loss  # other positions are sampled, other noise drawn
    actions = {op.action for point in both for op in point.plan.ops}
    assert actions == {"narrow", "factorize"}


def test_a_prediction_is_what_comes_of_it() -> None:
    """One layer behind an activation, whose outputs are those of the model: nothing is assumed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3)).eval()
    planned = planner(model, forms=("narrow",), outputs="values")
    choice = planned.choose(budgets_of({"macs": 0.7}))
    changed = carry_out(model, choice.plan, decomposer=planned.decomposer).model
    x = torch.cat(batches(seed=9))
    with torch.no_grad():
        loss = 0.5 * float((changed(x) - model(x)).square().sum() / model(x).square().sum())
    assert loss == pytest.approx(choice.loss, rel=0.3)
    plain = carry_out(model, choice.plan).model
    with torch.no_grad():
        assert float((plain(x) - model(x)).square().sum() / model(x).square().sum()) > 2 * loss  # nothing made up for


@pytest.mark.parametrize("refit", ["full", "bias"])
def test_what_is_narrowed_is_fitted(refit: str) -> None:
    model = mobile()
    planned = planner(model, forms=("narrow",), refit=refit, sensitivity="activations")
    choice = planned.choose(budgets_of({"macs": 0.5}))
    changed = carry_out(model, choice.plan, decomposer=planned.decomposer).model
    before = planned.measure(changed).loss
    fit = planned.refit(changed, choice.plan)
    assert fit.held_out is not None
    assert fit.held_out.loss <= before
    assert not any("taken back" in note for note in planned.notes)


def test_only_layers_that_are_included_change() -> None:
    model = mobile()
    assert {each.path for each in planner(model, exclude=("excite",)).joint} == {"conv1"}
    assert {each.path for each in planner(model, include=("conv*",)).joint} == {"conv1"}
    planned = planner(model, forms=("narrow",), max_layer_error=0.3)
    assert all(one.error <= 0.3 for each in planned.joint for one in each.candidates)
    skips = {skip.path: skip.detail for skip in planned.replaceable.skips}
    assert "shares them" in skips["stem"]


def test_a_plan_with_calibration_gives_such_weights_again_and_is_saved(tmp_path: Path) -> None:
    model = mobile()
    result = pwrewrite.rewrite(model, X, budget={"macs": 0.6}, calibration=batches(), forms=["narrow"])
    assert result.report.passed
    assert result.report.budget is not None
    assert result.report.budget.reached["macs"] <= 0.6
    again = pwrewrite.rewrite(model, X, Plan.from_json(result.plan.to_json()), calibration=batches())
    plain = pwrewrite.apply(model, result.plan)
    assert torch.allclose(again.model(X), result.model(X), atol=3e-3)  # other positions are sampled
    assert not torch.allclose(plain(X), result.model(X), atol=3e-3)
    result.save(tmp_path / "out")
    assert torch.equal(pwrewrite.load(tmp_path / "out", mobile())(X), result.model(X))


def test_without_calibration_the_norms_decide() -> None:
    model = mobile()
    planned = Planner(model, X, None, Budget(forms=("narrow",)))
    choice = planned.choose(budgets_of({"macs": 0.6}))
    changed = carry_out(model, choice.plan, decomposer=planned.decomposer).model
    assert costs_of(capture(changed, X))["macs"] == choice.costs["macs"] <= 0.6 * planned.original["macs"]


def test_a_flatten_too_wide_for_its_moment_has_a_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("statistics", "refit"):
        monkeypatch.setattr(f"pwrewrite.planning.{where}.LARGEST_ROW", 100)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 5)).eval()
    planned = planner(model, forms=("narrow",))
    (unit,) = planned.joint
    assert unit.candidates[1].loss > unit.candidates[-1].loss > 0
    choice = planned.choose(budgets_of({"macs": 0.6}))
    changed = carry_out(model, choice.plan, decomposer=planned.decomposer).model
    planned.refit(changed, choice.plan)
    assert changed(X).shape == (2, 5)


def test_latencies_of_units_are_those_of_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from pwrewrite.planning.latency import LatencyTable, Variant

    def times(self: LatencyTable, shape: list[int], variants: list[Variant]) -> list[float]:
        assert all(shape[-3] == variant.spec.in_channels for variant in variants)
        return [float(variant.spec.params) for variant in variants]

    monkeypatch.setattr(LatencyTable, "times", times)
    planned = planner(mobile(), forms=("narrow",))
    table = object.__new__(LatencyTable)
    for unit in planned.joint:
        unit.time(table)
        keep, *others = unit.candidates
        assert keep.costs["latency"] == sum(layer.params for layer in layers_of(unit))
        assert others
        assert all(one.costs["latency"] < keep.costs["latency"] for one in others)


def test_without_inputs_what_goes_of_the_layers_before_is_lost_too() -> None:
    model = mobile()
    with torch.no_grad():
        model.conv1.weight[:12] *= 10
    planner = Planner(model, (X,), None, Budget({"macs": 0.5}))
    (unit,) = (
        group for group in planner.allocator.groups if isinstance(group, UnitCandidates) and group.path == "conv1"
    )
    energies = model.conv1.weight.detach().double().square().sum((1, 2, 3))
    for candidate in unit.candidates[1:]:
        assert candidate.op is not None
        gone = [i for i in range(24) if i not in candidate.op.settings["keep"]]
        # The error is that of what the layer behind lacks, whose square is its share of the loss.
        expected = candidate.error**2 + float(energies[gone].sum() / energies.sum())
        assert candidate.loss == pytest.approx(expected, rel=1e-6)
