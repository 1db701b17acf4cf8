"""Rewrites under a budget: how much is lost, what is told of it, and what comes back from disk."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_networks import KINDS, batches, calibration_digits, digits, made, scored, trained
from torch import nn

import pwrewrite
from pwrewrite import Plan, Rewritten, passes
from pwrewrite.core.errors import PlanError, RefusedError, UsageError
from pwrewrite.core.options import Budget
from pwrewrite.core.plan import SkipReason
from pwrewrite.planning import fitting
from pwrewrite.planning.budget import budgets_of
from pwrewrite.planning.outputs import compare
from pwrewrite.planning.planner import Planner
from pwrewrite.workflows import other_plans
from pwrewrite.workflows.smallest import search

ONE = torch.zeros(1, 1, 8, 8)


@pytest.fixture(autouse=True, scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PWREWRITE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@cache
def digits_at(share: float = 0.5, sensitivity: str = "loss", refit: str = "full") -> Rewritten:
    """The trained network within a budget."""
    return pwrewrite.rewrite(
        trained(),
        ONE,
        budget={"macs": share},
        calibration=calibration_digits(),
        sensitivity=sensitivity,
        refit=refit,
        verify=False,
    )


# ------------------------------------------------------------------------------------------------- what is lost


def test_half_the_macs_of_a_trained_network_keep_its_accuracy() -> None:
    accuracy, divergence = scored(digits_at().model)
    before, _ = scored(trained())
    uniform = pwrewrite.rewrite(trained(), ONE, passes=[passes.InsertBottleneck(rank=0.5)], verify=False)
    plain, far = scored(uniform.model)
    assert before > 0.93
    assert accuracy > before - 0.03
    assert plain < before - 0.2  # the same width everywhere ruins it
    assert divergence < far / 10


def test_the_loss_is_a_better_guide_than_the_weights() -> None:
    for refit in ("full", "none"):
        by_loss, by_weights = (scored(digits_at(0.5, kind, refit).model)[1] for kind in ("loss", "weights"))
        assert by_loss < by_weights
    _, by_weights = scored(digits_at(0.5, "weights", "none").model)
    assert scored(digits_at(0.5, "loss", "none").model)[1] < by_weights / 5


def test_fitting_loses_less() -> None:
    for share in (0.5, 0.3):
        held_out = [digits_at(share, "loss", refit).report.budget for refit in ("full", "none")]
        full, none = (one.measured if one is not None else None for one in held_out)
        assert full is not None
        assert none is not None
        assert full < none
        assert scored(digits_at(share).model)[1] < scored(digits_at(share, refit="none").model)[1]


@pytest.mark.parametrize("share", [0.7, 0.5, 0.4])
def test_the_prediction_is_of_the_order_of_what_is_measured(share: float) -> None:
    found = digits_at(share).report.budget
    assert found is not None
    assert found.predicted is not None
    assert found.measured is not None
    assert found.predicted / 10 < found.measured < 10 * found.predicted
    assert found.predicted / 10 < scored(digits_at(share).model)[1] < 10 * found.predicted
    assert found.kind == "classes"
    assert found.agreement is not None
    assert found.agreement > 0.9
    assert found.held_out + found.samples == 300


def test_smaller_budgets_lose_more() -> None:
    losses = []
    for share in (0.8, 0.5, 0.3):
        found = digits_at(share).report.budget
        assert found is not None
        losses.append((found.predicted, found.measured))
    assert losses == sorted(losses)


@pytest.mark.parametrize("name", ["transposed", "two inputs", "shared", "1-D"])
def test_other_outputs_are_predicted_too(name: str) -> None:
    model, inputs = made(name)
    result = pwrewrite.rewrite(model, inputs, budget={"macs": 0.7}, calibration=batches(name, size=24), verify=False)
    found = result.report.budget
    assert found is not None
    assert found.kind == "values"
    assert found.agreement is None
    assert found.predicted is not None
    assert found.measured is not None
    assert found.predicted / 10 < found.measured < 10 * found.predicted


# ------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("name", KINDS)
def test_the_result_is_verified_and_within_the_budget(name: str) -> None:
    model, inputs = made(name)
    result = pwrewrite.rewrite(model, inputs, budget={"macs": 0.6}, calibration=batches(name))
    assert result.report.passed, result.report
    assert result.report.after["macs"] <= 0.6 * result.report.before["macs"]
    found = result.report.budget
    assert found is not None
    assert found.reached["macs"] == result.report.after["macs"] / result.report.before["macs"]
    assert found.limits == {"macs": "0.6"}
    recounted = pwrewrite.analyze(result.model, inputs)
    assert (recounted.params, recounted.macs) == (result.report.after["params"], result.report.after["macs"])


@pytest.mark.parametrize("name", KINDS)
def test_the_smallest_model_of_all_is_fitted_too(name: str) -> None:
    model, inputs = made(name)
    least = Planner(model, inputs, batches(name), Budget()).frontier("macs", points=3)[-1]
    result = pwrewrite.rewrite(model, inputs, plan=least.plan, calibration=batches(name), verify=False)
    assert result.report.after["macs"] == least.costs["macs"]
    found = result.report.budget
    assert found is not None
    assert found.measured is not None
    assert found.measured < 2  # all of it, and not much more
    assert all(bool(torch.isfinite(p).all()) for p in result.model.parameters())


def test_one_seed_gives_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", "off")
    model, inputs = made("plain")
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        result = pwrewrite.rewrite(model, inputs, budget={"macs": 0.5}, calibration=batches(), verify=False)
        states.append(result.model.state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_gradients_are_those_of_the_original(training: bool) -> None:
    model, inputs = made("plain")
    model.train(training)
    result = pwrewrite.rewrite(model, inputs, budget={"macs": 0.5}, calibration=batches(), verify=False)
    assert all(module.training is training for module in result.model.modules())
    assert all(p.requires_grad for p in result.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in result.model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay(dtype: torch.dtype) -> None:
    model, (x,) = made("plain")
    result = pwrewrite.rewrite(model.to(dtype), x.to(dtype), budget={"macs": 0.5}, calibration=batches())
    assert result.report.passed
    assert all(p.dtype is dtype for p in result.model.parameters())


def test_without_calibration_the_weights_decide() -> None:
    model, inputs = made("plain")
    result = pwrewrite.rewrite(model, inputs, budget={"macs": 0.5})
    found = result.report.budget
    assert found is not None
    assert (found.sensitivity, found.refit, found.samples, found.measured) == ("weights", "none", 0, None)
    assert result.report.passed


def test_a_metric_is_measured_before_and_after() -> None:
    seen: list[nn.Module] = []

    def accuracy(model: nn.Module) -> float:
        seen.append(model)
        return scored(model)[0]

    result = pwrewrite.rewrite(
        trained(), ONE, budget={"macs": 0.5}, calibration=calibration_digits(), metric=accuracy, verify=False
    )
    found = result.report.budget
    assert found is not None
    assert seen == [trained(), result.model]
    assert found.metrics == {"accuracy": (scored(trained())[0], scored(result.model)[0])}
    assert "accuracy" in str(result.report)


def test_labels_beside_the_inputs_give_the_accuracy_held_out() -> None:
    images, labels = digits()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images[1000:1300], labels[1000:1300]), 50)
    result = pwrewrite.rewrite(trained(), ONE, budget={"macs": 0.5}, calibration=loader, verify=False)
    found = result.report.budget
    assert found is not None
    assert found.held_out == 50
    before, after = found.metrics["accuracy on held-out inputs"]
    with torch.no_grad():
        for model, share in ((trained(), before), (result.model, after)):
            right = model(images[1000:1300]).argmax(1) == labels[1000:1300]
            assert share == pytest.approx(float(right.double().mean()), abs=0.1)


def test_a_prediction_far_from_what_is_measured_is_told() -> None:
    told = []
    for share in (0.7, 0.15):
        report = digits_at(share).report
        assert report.budget is not None
        measured, predicted = report.budget.measured, report.budget.predicted
        assert measured is not None
        assert predicted is not None
        told.append(any("measured loss" in note for note in report.notes))
        assert told[-1] is (measured > 4 * predicted and measured > 1e-3)


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ((0.3, None), "(held-out loss: the first plan 0.3, without narrow misses the limits); the first plan is kept"),
        ((0.3, 0.2), "(held-out loss: the first plan 0.3, without narrow 0.2); the plan without narrow is kept"),
    ],
)
def test_other_plans_are_told_by_what_they_are(losses: tuple[float, float | None], told: str) -> None:
    def attempt(loss: float) -> Any:
        planner = SimpleNamespace(settings=SimpleNamespace(sensitivity="loss"), notes=[])
        return other_plans.Attempt(planner, None, None, SimpleNamespace(held_out=SimpleNamespace(loss=loss)))  # type: ignore[arg-type]

    first, other = attempt(losses[0]), None if losses[1] is None else attempt(losses[1])
    ways: dict[str, Any] = {"without narrow": lambda planner: planner}
    best = other_plans.best_attempt(first, ways, [], lambda planner: other, lambda what, share: None)
    (note,) = best.planner.notes
    assert note == f"the loss measured is above the predicted one: planned without narrow {told}"


def test_where_the_prediction_fails_held_out_inputs_choose_among_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every prediction failed: the default loses no more there than the best of the three."""
    share, norms = 0.2, ("loss", "activations", "weights")
    monkeypatch.setattr(other_plans, "FAR", 0.0)
    alone = {norm: digits_at(share, norm).report.budget for norm in norms}  # a norm that is given stays
    losses = {norm: found.measured for norm, found in alone.items() if found is not None and found.measured is not None}
    assert losses.keys() == {found.sensitivity for found in alone.values() if found is not None} == set(norms)
    result = pwrewrite.rewrite(trained(), ONE, budget={"macs": share}, calibration=calibration_digits(), verify=False)
    found = result.report.budget
    assert found is not None
    best = min(losses, key=losses.__getitem__)
    assert (found.sensitivity, found.reached["macs"] <= share) == (best, True)
    assert found.measured == pytest.approx(losses[best], rel=0.02)
    assert result.plan.budget["sensitivity"] == best
    told = [note for note in result.report.notes if "planned in every norm" in note]
    assert len(told) == 1
    assert told[0].endswith(f"; {best} is kept")
    assert all(norm in told[0] for norm in norms)
    ready = Planner(trained(), ONE, calibration_digits(), Budget()).measure(result.model)
    assert ready.loss == pytest.approx(found.measured, rel=1e-4)


@pytest.mark.parametrize("options", [{"max_layer_error": 1.0}, {"sensitivity": "loss"}, {"budget": {"macs": 0.8}}])
def test_one_norm_does_where_it_was_asked_for_or_predicts_well(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Planner, sensitivity: str) -> Planner:
        raise AssertionError(f"planned by {sensitivity}")

    monkeypatch.setattr(Planner, "in_norm", refused)
    if "budget" not in options:
        monkeypatch.setattr(other_plans, "FAR", 0.0)
    given: dict[str, Any] = {"budget": {"macs": 0.2}, "calibration": calibration_digits(), "verify": False, **options}
    result = pwrewrite.rewrite(trained(), ONE, **given)
    assert result.report.budget is not None
    assert result.report.budget.sensitivity == "loss"


# ----------------------------------------------------------------------------------------- plans and folders


def test_a_plan_comes_back_from_json() -> None:
    found = pwrewrite.plan(trained(), ONE, {"macs": 0.5, "params": "90%"}, calibration_digits())
    again = Plan.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert again.budget == found.budget
    assert set(found.budget) >= {"limits", "predicted_loss", "gap", "sensitivity", "refit", "samples", "seed"}
    assert found.budget["limits"] == {"macs": "0.5", "params": "0.9"}
    assert found.model["inputs"]


def test_a_plan_with_calibration_is_the_rewrite_it_was_made_for() -> None:
    found = Plan.from_json(pwrewrite.plan(trained(), ONE, {"macs": 0.5}, calibration_digits()).to_json())
    result = pwrewrite.rewrite(trained(), ONE, plan=found, calibration=calibration_digits(), verify=False)
    at_once, budget = digits_at(), result.report.budget
    assert result.plan.ops == at_once.plan.ops
    x = digits()[0][1300:]
    assert torch.allclose(result.model(x), at_once.model(x), atol=1e-3)
    assert budget is not None
    assert at_once.report.budget is not None
    assert budget.predicted == pytest.approx(at_once.report.budget.predicted, rel=1e-5)
    assert budget.measured == pytest.approx(at_once.report.budget.measured, rel=1e-2)
    assert budget.limits == {"macs": "0.5"}
    plain = pwrewrite.rewrite(trained(), ONE, plan=found, verify=False)  # the weights alone
    assert plain.report.budget is None
    assert scored(plain.model)[1] > scored(result.model)[1]


@pytest.mark.parametrize("name", ["plain", "shared", "transposed", "linear", "3-D"])
def test_a_result_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    result = pwrewrite.rewrite(model, inputs, budget={"macs": 0.6}, calibration=batches(name))
    result.save(tmp_path / "out")
    x = batches(name, count=1, seed=5)[0]
    loaded = pwrewrite.load(tmp_path / "out", made(name)[0])
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))
    assert Plan.read(tmp_path / "out" / "plan.json").budget == result.plan.budget
    assert '"budget"' in (tmp_path / "out" / "report.json").read_text()


def test_a_fit_that_was_held_against_none_is_put_back() -> None:
    model, inputs = made("plain")
    result = pwrewrite.rewrite(model, inputs, budget={"macs": 0.6}, calibration=batches(), verify=False)
    assert not any("taken back" in note for note in result.report.notes)
    assert result.report.budget is not None
    ready = Planner(model, inputs, batches(), Budget())
    assert ready.batches is not None
    now = compare(model, result.model, ready.batches.held_out(), ready.outputs)
    assert now.loss == pytest.approx(result.report.budget.measured, rel=1e-3)


@pytest.mark.parametrize("harm", [1.15, 50])
def test_a_fit_that_does_harm_is_taken_back(harm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Much harm, and so little that the loss is still near the predicted one."""
    model, inputs = made("plain")
    plain = pwrewrite.rewrite(model, inputs, budget={"macs": 0.6}, calibration=batches(), refit="none")
    real = fitting.refit

    def spoiled(original: nn.Module, rewritten: nn.Module, *args: Any, **kwargs: Any) -> dict[str, float]:
        errors = real(original, rewritten, *args, **kwargs)
        with torch.no_grad():
            for path in (step.path for step in args[0] if not isinstance(step, str)):
                for parameter in rewritten.get_submodule(path).parameters():
                    parameter.mul_(harm)
        return errors

    monkeypatch.setattr(fitting, "refit", spoiled)
    result = pwrewrite.rewrite(model, inputs, budget={"macs": 0.6}, calibration=batches(), verify=False)
    assert "fitting made the held-out loss larger, and was taken back" in result.report.notes
    assert result.report.budget is not None
    assert plain.report.budget is not None
    assert result.report.budget.measured == pytest.approx(plain.report.budget.measured, rel=0.5)


def test_what_is_rewritten_already_is_left() -> None:
    half = digits_at()
    found = pwrewrite.plan(half.model, ONE, {"macs": 0.97}, calibration_digits())
    done = {op.path for op in half.plan.ops}
    assert not any(op.path.startswith(tuple(f"{path}." for path in done)) for op in found.ops)
    assert any(skip.reason is SkipReason.ALREADY_BOTTLENECK for skip in found.skips)


def test_what_excludes_each_other_is_refused() -> None:
    model, inputs = made("plain")
    found = pwrewrite.plan(model, inputs, {"macs": 0.5})
    given: dict[str, Any] = {"calibration": batches()}
    with pytest.raises(UsageError, match="exclude each other"):
        pwrewrite.rewrite(model, inputs, plan=found, budget={"macs": 0.5}, **given)
    with pytest.raises(UsageError, match="goes with passes, not with"):
        pwrewrite.rewrite(model, inputs, passes=[passes.InsertBottleneck(rank=0.5)], budget={"macs": 0.5}, **given)
    with pytest.raises(UsageError, match="serve a budget or a plan"):
        pwrewrite.rewrite(model, inputs, **given)
    with pytest.raises(PlanError):
        pwrewrite.rewrite(made("transposed")[0], inputs, plan=found, **given)


# ------------------------------------------------------------------------------------------------- by a metric


def _planner() -> Planner:
    return Planner(trained(), ONE, calibration_digits(), Budget())


def test_the_smallest_model_that_keeps_a_metric() -> None:
    seen: list[str] = []

    def say(what: str, share: float | None) -> None:
        seen.append(what)

    ready = Planner(trained(), ONE, calibration_digits(), Budget(), say=say)

    def accuracy(model: nn.Module) -> float:
        return scored(model)[0]

    found = search(ready, accuracy, 0.02, steps=5)
    assert found.before == scored(trained())[0]
    assert found.after >= found.before - 0.02
    assert found.choice.costs["macs"] < 0.8 * ready.original["macs"]
    assert 1 <= len(found.tried) <= 5
    kept = [share for share, value in found.tried if value >= found.before - 0.02]
    assert min(kept) == pytest.approx(found.choice.costs["macs"] / ready.original["macs"])
    assert any(what.startswith("trying") for what in seen)


def test_a_search_stays_within_other_budgets() -> None:
    found = search(_planner(), lambda model: 1.0, 0.0, budgets=budgets_of({"params": 0.7}), steps=2)
    ready = _planner()
    assert found.choice.costs["params"] <= 0.7 * ready.original["params"]


def test_no_model_that_keeps_a_metric() -> None:
    original = trained()

    def strict(model: nn.Module) -> float:
        return float(model is original)

    with pytest.raises(RefusedError, match="no smaller model keeps the metric"):
        search(_planner(), strict, 0.0, steps=3)


class Scaled(nn.Module):
    """Takes images, a number and a table that is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, image: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(image).relu() * scale) + table.mean()


def test_inputs_that_are_no_batch_are_not_cut() -> None:
    torch.manual_seed(0)
    images, scale, table = torch.randn(4, 16, 3, 8, 8), torch.tensor(2.0), torch.randn(5, 3)
    example = (torch.zeros(1, 3, 8, 8), scale, table)
    result = pwrewrite.rewrite(
        Scaled(), example, budget={"macs": 0.6}, calibration=[(batch, scale, table) for batch in images]
    )
    assert result.report.after["macs"] <= 0.6 * result.report.before["macs"]
    assert next(check for check in result.report.verification.checks if "numerics" in check.name).passed


def test_a_metric_that_fails_does_so_before_anything_else() -> None:
    asked: list[int] = []

    def source() -> Any:
        asked.append(1)
        yield from batches()

    def broken(model: nn.Module) -> float:
        raise ZeroDivisionError("no images")

    model, inputs = made("plain")
    with pytest.raises(ZeroDivisionError):
        pwrewrite.rewrite(model, inputs, budget={"macs": 0.5}, calibration=source(), metric=broken)
    assert not asked


def test_a_plan_brings_its_own_forms_and_layers() -> None:
    found = pwrewrite.plan(trained(), ONE, {"macs": 0.5}, calibration_digits())
    given: dict[str, Any] = {"plan": found, "calibration": calibration_digits(), "verify": False}
    for more in ({"forms": ["pair"]}, {"exclude": ["conv2"]}):
        with pytest.raises(UsageError, match="exclude each other"):
            pwrewrite.rewrite(trained(), ONE, **given, **more)
