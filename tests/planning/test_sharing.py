"""One reduction for several layers under a budget: what it costs and loses, when it is chosen, and how it is fitted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_networks import batches
from torch import Tensor, nn
from torch.nn import functional as F

import pwrewrite
from pwrewrite.capturing import capture
from pwrewrite.core.names import JOINT_FORM_NAMES
from pwrewrite.core.options import Budget
from pwrewrite.core.plan import Plan, SkipReason
from pwrewrite.edit.apply import carry_out
from pwrewrite.layers.factorized import Factorized
from pwrewrite.planning.budget import budgets_of
from pwrewrite.planning.fit_steps import fit_steps
from pwrewrite.planning.joint import JOINT
from pwrewrite.planning.planner import Planner, costs_of
from pwrewrite.planning.refit import Target
from pwrewrite.planning.sharing import SharedCandidates


def test_every_kind_of_several_layers_has_a_name_that_help_knows() -> None:
    assert tuple(JOINT) == JOINT_FORM_NAMES


class Branches(nn.Module):
    """Kernels of several sizes and rates on one wide map, without a reduction, as in an ASPP (Chen et al. 2017)."""

    def __init__(self, channels: int, *, bias: bool) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, 8, 1, bias=bias)
        self.three = nn.Conv2d(channels, 8, 3, padding=1, bias=bias)
        self.apart = nn.Conv2d(channels, 8, 3, padding=2, dilation=2, bias=bias)
        self.norm = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(torch.cat([self.one(x), self.three(x), self.apart(x)], 1)))


def inception(*, bias: bool = True) -> nn.Module:
    """Two modules behind a stem; what the branches of one need of its map is much the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 96, 3, padding=1), nn.ReLU(), Branches(96, bias=bias), Branches(24, bias=bias), nn.Conv2d(24, 5, 1)
    )
    with torch.no_grad():
        for module in model:
            if isinstance(module, Branches):
                used = torch.linalg.qr(torch.randn(module.one.in_channels, 8)).Q
                for conv in (module.one, module.three, module.apart):
                    common = torch.einsum("oi...,ij->oj...", conv.weight, used @ used.T)
                    conv.weight.copy_(3 * common + 0.1 * conv.weight)
        for batch in batches():
            model(batch)
    return model.eval()


X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", str(tmp_path / "cache"))


def planner(model: nn.Module, **settings: object) -> Planner:
    return Planner(model, X, batches(), Budget(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("sensitivity", ["loss", "activations", "weights"])
def test_candidates_cost_less_and_lose_more_and_claim_all_readers(sensitivity: str) -> None:
    planned = planner(inception(), sensitivity=sensitivity, forms=("share-reduction",))
    assert [group.path for group in planned.joint] == ["2.one", "2.three", "3.one", "3.three"]  # all, the wide alone
    for group in planned.joint:
        keep, *others = group.candidates
        assert (keep.loss, keep.op, keep.claims) == (0.0, None, frozenset())
        assert len(others) > 20
        for one in others:
            assert one.op is not None
            assert one.loss >= 0
            assert one.claims == {each["path"] for each in one.op.settings["readers"]}
            assert all(one.costs[kind] < keep.costs[kind] for kind in ("macs", "params"))
    cheapest = min(planned.joint[0].candidates[1:], key=lambda c: c.costs["macs"])
    assert cheapest.loss > 10 * min(c.loss for c in planned.joint[0].candidates[1:])


@pytest.mark.parametrize("forms", [("share-reduction",), ("all",)])
@pytest.mark.parametrize("limits", [{"macs": 0.4}, {"params": 0.4, "bytes": 0.9}])
def test_budgets_are_met_as_predicted_and_it_is_chosen(limits: dict[str, float], forms: tuple[str, ...]) -> None:
    model = inception()
    planned = planner(model, forms=forms)
    choice = planned.choose(budgets_of(limits))
    assert any(op.action == "share-reduction" for op in choice.plan.ops)
    claims = [c for g in planned.allocator.groups for o in g.candidates if o.op in choice.plan.ops for c in o.claims]
    assert len(claims) == len(set(claims))
    changed = carry_out(model, choice.plan, decomposer=planned.decomposer).model
    before, after = costs_of(capture(model, X)), costs_of(capture(changed, X))
    for kind, share in limits.items():
        assert after[kind] <= share * before[kind]
    assert all(after[kind] == choice.costs[kind] for kind in ("macs", "params"))
    assert after["bytes"] == pytest.approx(choice.costs["bytes"], rel=0.02)


def test_less_is_lost_with_it_than_without() -> None:
    planned = planner(inception())
    without = planned.without({"share-reduction"})
    assert {group.action for group in planned.joint} - {group.action for group in without.joint} == {"share-reduction"}
    for share in (0.5, 0.4, 0.3):
        limits = budgets_of({"macs": share})
        assert planned.choose(limits).loss < 0.8 * without.choose(limits).loss


class Heads(nn.Module):
    """Two layers on one map, whose outputs are those of the model: nothing is assumed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.boxes, self.scores = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 8, 3), nn.Conv2d(24, 12, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        return self.boxes(x), self.scores(x)


@pytest.mark.parametrize("refit", ["full", "none"])
def test_a_prediction_is_what_comes_of_it(refit: str) -> None:
    model = Heads().eval()
    planned = planner(model, forms=("share-reduction",), exclude=("stem",), refit=refit)
    (group,) = planned.joint
    x = torch.cat(batches(seed=9))
    for candidate in group.candidates[1::12]:
        assert candidate.op is not None
        changed = carry_out(model, Plan((candidate.op,)), decomposer=planned.decomposer).model
        with torch.no_grad():
            pairs = list(zip(model(x), changed(x)))
        loss = sum(0.5 * float((b - a).square().sum() / a.square().sum()) for a, b in pairs)
        assert loss == pytest.approx(candidate.loss, rel=0.3)


class Featured(Heads):
    """A model that people call by a method of its own, too."""

    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.stem(x))


def test_a_model_with_methods_becomes_a_graph_only_where_the_form_is_named() -> None:
    model = Featured().eval()
    left = planner(model)
    assert not any(isinstance(group, SharedCandidates) for group in left.joint)
    (group,) = planner(model, forms=("share-reduction",)).joint
    assert isinstance(group, SharedCandidates)
    result = pwrewrite.rewrite(model, X, Budget({"macs": 0.4}, calibration=batches()))
    assert result.report.passed
    assert type(result.model) is Featured
    assert result.model.forward_features(X).dim() == 4
    named = pwrewrite.rewrite(model, X, Budget({"macs": 0.4}, calibration=batches(), forms=("share-reduction",)))
    assert {edit.op.action for edit in named.edits} == {"share-reduction"}
    again = pwrewrite.rewrite(model, X, Budget(plan=Plan.from_json(named.plan.to_json()), calibration=batches()))
    assert again.report.passed


@pytest.mark.parametrize("bias", [False, True])
def test_cores_are_fitted(bias: bool) -> None:
    model = inception(bias=bias)
    planned = planner(model, forms=("share-reduction",))
    choice = planned.choose(budgets_of({"macs": 0.25}))
    changed = carry_out(model, choice.plan, decomposer=planned.decomposer).model
    readers = {each["path"]: each.get("width") for op in choice.plan.ops for each in op.settings["readers"]}
    narrower = {path for path, width in readers.items() if width is not None}
    assert narrower
    assert {path for path, module in changed.named_modules() if isinstance(module, Factorized)} == narrower
    steps = fit_steps(planned.captured, changed, choice.plan, planned.replaceable.specs, planned.statistics)
    assert {step.path for step in steps if isinstance(step, Target)} == set(readers)
    before = planned.measure(changed).loss
    fit = planned.refit(changed, choice.plan)
    assert fit.held_out is not None
    assert fit.held_out.loss < before or any("taken back" in note for note in planned.notes)


def test_a_plan_is_verified_saved_and_carried_out_again_at_another_size(tmp_path: Path) -> None:
    model = inception()
    result = pwrewrite.rewrite(model, X, budget={"macs": 0.4}, calibration=batches(), forms=["share-reduction"])
    assert result.report.passed
    assert result.report.budget is not None
    assert result.report.budget.reached["macs"] <= 0.4
    assert {edit.kind for edit in result.edits} == {"graph"}
    result.save(tmp_path / "out")
    assert torch.equal(pwrewrite.load(tmp_path / "out", inception())(X), result.model(X))
    plan, larger = Plan.from_json(result.plan.to_json()), torch.randn(5, 3, 13, 11)
    again = pwrewrite.rewrite(model, larger, plan, calibration=batches())
    assert again.report.passed
    assert torch.allclose(again.model(X), result.model(X), atol=3e-2)  # other positions are sampled
    plain = pwrewrite.rewrite(model, larger, plan)
    assert plain.report.passed
    assert [edit.path for edit in plain.edits] == [edit.path for edit in result.edits]


def test_without_calibration_the_weights_decide() -> None:
    model = inception()
    planned = Planner(model, X, None, Budget(forms=("share-reduction",)))
    choice = planned.choose(budgets_of({"macs": 0.5}))
    changed = carry_out(model, choice.plan, decomposer=planned.decomposer).model
    assert costs_of(capture(changed, X))["macs"] == choice.costs["macs"] <= 0.5 * planned.original["macs"]


def test_layers_say_why_they_share_nothing() -> None:
    planned = planner(inception(), forms=("share-reduction",), exclude=("3.apart",))
    assert {group.path for group in planned.joint} == {"2.one", "2.three"}
    skips = {skip.path: skip for skip in planned.choose([]).plan.skips}
    assert skips["0"].reason is SkipReason.WRONG_FORM
    assert "no other convolution" in skips["0"].detail
    assert skips["3.apart"].reason is SkipReason.EXCLUDED
    assert {skips[path].reason for path in ("2.one", "2.three")} == {SkipReason.NO_GAIN}


def test_latencies_are_those_of_the_reduction_and_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from pwrewrite.planning.latency import LatencyTable, Variant

    def times(self: LatencyTable, shape: list[int], variants: list[Variant]) -> list[float]:
        assert all(shape[-3] == variant.spec.in_channels for variant in variants)
        parameters = [variant.make(torch.device("cpu"), torch.float32).parameters() for variant in variants]
        return [float(sum(p.numel() for p in each)) for each in parameters]

    monkeypatch.setattr(LatencyTable, "times", times)
    for group in planner(inception(), forms=("share-reduction",)).joint:
        assert isinstance(group, SharedCandidates)
        group.time(object.__new__(LatencyTable))
        assert 1 < len(group.candidates) <= 8
        assert all(candidate.costs["latency"] == candidate.costs["params"] for candidate in group.candidates)
