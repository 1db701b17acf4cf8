"""From calibration inputs and a budget to a plan: what it costs, what it may touch, and what it leaves as it was."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from safetensors import safe_open
from safetensors.torch import load, save_file
from small_networks import KINDS, Net, batches, made
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pwrewrite
from pwrewrite.core.errors import RefusedError, UsageError
from pwrewrite.core.options import Budget
from pwrewrite.core.plan import Plan, SkipReason
from pwrewrite.forms import FORMS
from pwrewrite.forms.form import Form
from pwrewrite.planning.budget import budgets_of
from pwrewrite.planning.memory import Memory
from pwrewrite.planning.planner import Planner


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PWREWRITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plan(name: str = "plain", budget: dict[str, object] | None = None, **settings: Any) -> Plan:
    model, inputs = made(name)
    given = settings.pop("calibration", batches(name))
    return pwrewrite.plan(model, inputs, budget or {"macs": 0.5}, given, **settings)


def planner(name: str = "plain", **settings: Any) -> Planner:
    model, inputs = made(name)
    return Planner(model, inputs, batches(name), Budget(**settings))


def counted(name: str, found: Plan) -> dict[str, float]:
    """What the model costs with a plan carried out, as shares of the original."""
    model, inputs = made(name)
    before, after = (pwrewrite.analyze(one, inputs) for one in (model, pwrewrite.apply(model, found)))
    return {"params": after.params / before.params, "macs": after.macs / before.macs}


# -------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("name", KINDS)
def test_the_budget_is_met_by_every_kind_of_network(name: str) -> None:
    found = plan(name, {"macs": 0.6})
    assert found.ops
    assert counted(name, found)["macs"] <= 0.6
    assert counted(name, found)["macs"] > 0.3  # and what there is to spend is spent
    assert found.budget["limits"] == {"macs": "0.6"}
    assert found.budget["predicted_loss"] > 0


@pytest.mark.parametrize("share", [0.9, 0.7, 0.4])
def test_budgets_of_parameters_and_macs_are_met(share: float) -> None:
    assert counted("plain", plan(budget={"params": share}))["params"] <= share
    both = counted("plain", plan(budget={"macs": share, "params": share}))
    assert both["macs"] <= share
    assert both["params"] <= share


def test_an_absolute_budget_is_met() -> None:
    model, inputs = made("plain")
    macs = pwrewrite.analyze(model, inputs).macs
    found = plan(budget={"macs": macs // 2})
    assert pwrewrite.analyze(pwrewrite.apply(model, found), inputs).macs <= macs // 2
    assert [op.to_dict() for op in found.ops] == [op.to_dict() for op in plan(budget={"macs": 0.5}).ops]


@pytest.mark.parametrize("budget", [{"macs": 1.0}, {"macs": "100%", "params": 1}, {"params": "12M"}])
def test_a_full_budget_changes_nothing(budget: dict[str, object]) -> None:
    found = plan(budget=budget)
    assert not found.ops
    assert found.budget["predicted_loss"] == 0
    model, inputs = made("plain")
    result = pwrewrite.rewrite(model, inputs, budget=budget, calibration=batches())
    assert not result.edits
    x = torch.randn(2, 3, 10, 10)
    assert torch.equal(result.model(x), model(x))


def test_a_budget_that_cannot_be_met_names_the_smallest() -> None:
    with pytest.raises(RefusedError, match=r"macs=0.001 cannot be met") as told:
        plan(budget={"macs": 0.001})
    found = str(told.value)
    smallest = float(found.partition("at least macs=")[2].partition(",")[0])
    assert 0.001 < smallest < 0.5
    assert counted("plain", plan(budget={"macs": smallest + 1e-4}))["macs"] <= smallest + 1e-4
    with pytest.raises(RefusedError, match="at least"):
        plan(budget={"macs": smallest - 1e-3})
    with pytest.raises(RefusedError, match=r"params=0.0001 cannot be met"):
        plan(budget={"macs": 0.5, "params": 1e-4})


def test_the_frontier_is_monotone() -> None:
    ready = planner()
    points = ready.frontier("macs")
    costs, losses = [p.costs["macs"] for p in points], [p.loss for p in points]
    assert len(points) > 10
    assert costs[0] == ready.original["macs"]
    assert losses[0] == 0
    assert costs == sorted(costs, reverse=True)
    assert losses == sorted(losses)
    for point in points[:: len(points) // 4]:  # each is what a budget of that size would give
        limits = budgets_of({"macs": int(point.costs["macs"])})
        same = ready.allocator.choose(limits, ready.allocator.absolute(limits))
        assert same.loss == pytest.approx(point.loss, rel=1e-3)
    with pytest.raises(RefusedError, match=r"params=0.001 cannot be met\n.*at least params=0\.\d+"):
        ready.frontier("macs", budgets_of({"params": 0.001}))
    within = ready.frontier("macs", budgets_of({"params": 0.6}))
    assert within
    assert all(p.costs["params"] <= 0.6 * ready.original["params"] for p in within)
    losses = [p.loss for p in within]
    assert losses == sorted(losses)


def test_a_planner_predicts_the_costs_that_are_recounted() -> None:
    ready = planner(forms=("all",))
    model, inputs = made("plain")
    for share in (0.8, 0.5, 0.3):
        choice = ready.choose(budgets_of({"macs": share}))
        after = pwrewrite.analyze(pwrewrite.apply(model, choice.plan), inputs)
        assert (after.params, after.macs) == (choice.costs["params"], choice.costs["macs"])


@pytest.mark.parametrize("sensitivity", ["loss", "activations", "weights"])
@pytest.mark.parametrize("name", ["plain", "two inputs", "grouped"])
def test_one_seed_gives_one_plan(name: str, sensitivity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", "off")
    torch.manual_seed(3)
    first = plan(name, sensitivity=sensitivity, seed=7)
    torch.manual_seed(4)
    assert plan(name, sensitivity=sensitivity, seed=7).to_json() == first.to_json()


# ----------------------------------------------------------------------------------------- what is asked of it


def test_include_and_exclude_are_respected() -> None:
    assert {op.path for op in plan(budget={"macs": 0.8}, include=["body"]).ops} == {"body"}
    found = plan(budget={"macs": 0.8}, exclude=["body"])
    assert "body" not in {op.path for op in found.ops}
    assert next(skip for skip in found.skips if skip.path == "body").reason is SkipReason.EXCLUDED
    with pytest.raises(UsageError, match="matches no layer"):
        plan(include=["trunk.*"])


def test_no_layer_exceeds_the_largest_error() -> None:
    free, bounded = planner(), planner(max_layer_error=0.3)
    assert max(c.error for one in free.layers for c in one.candidates) > 0.3
    assert max(c.error for one in bounded.layers for c in one.candidates) <= 0.3
    assert bounded.choose(budgets_of({"macs": 0.9})).plan.ops
    free.choose(budgets_of({"macs": 0.2}))
    with pytest.raises(RefusedError, match="cannot be met"):
        bounded.choose(budgets_of({"macs": 0.2}))


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_widths_are_multiples(multiple: int) -> None:
    found = plan(multiple=multiple)
    chosen = {op.path: op.settings.get("widths") or {"": len(op.settings["keep"])} for op in found.ops}
    widths = [(path, width) for path, each in chosen.items() for width in each.values()]
    assert widths
    full = {"stem": (3, 12), "body": (12, 16), "tail": (16, 16), "head": (16, 5)}
    assert all(width % multiple == 0 or width in full[path] for path, width in widths)


@pytest.mark.parametrize(
    ("forms", "allowed"),
    [
        (["1x1"], {"reduce", "expand", "bottleneck", "pair"}),
        (["reduce"], {"reduce"}),
        (["spatial", "depthwise"], {"spatial", "depthwise"}),
        (["narrow"], {"narrow"}),
        (["all"], {*FORMS, "narrow"}),
    ],
)
def test_forms_are_those_that_are_named(forms: Sequence[str], allowed: set[str]) -> None:
    points = planner(forms=tuple(forms)).frontier("macs", points=9)
    used = {op.settings.get("form", op.action) for point in points for op in point.plan.ops}
    assert used
    assert used <= allowed


def test_more_forms_lose_no_more() -> None:
    every, some = planner(), planner(forms=("1x1",))
    for share in (0.7, 0.5, 0.3):
        budget = budgets_of({"macs": share})
        assert every.choose(budget).loss <= some.choose(budget).loss * (1 + 1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"forms": ["bottlenek"]}, "no form 'bottlenek'"),
        ({"sensitivity": "hessian"}, "unknown sensitivity"),
        ({"refit": "all"}, "unknown refit"),
        ({"max_layer_error": 0.0}, "out of range"),
        ({"multiple": 0}, "multiples of 1 or more"),
        ({"gate": "memory"}, "unknown gate"),
        ({"calibration": None, "sensitivity": "loss"}, "needs calibration inputs"),
        ({"calibration_size": 0}, "1 or more"),
        ({"budget": {}}, "there is no budget"),
        ({"budget": {"macs": 1.5}}, "a ratio above 1"),
        ({"budget": {"joules": 0.5}}, "no budget of the kind"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], said: str) -> None:
    model, inputs = made("plain")
    given = {"budget": {"macs": 0.5}, "calibration": batches(), **settings}
    with pytest.raises(UsageError, match=said):
        pwrewrite.plan(model, inputs, **given)


# ------------------------------------------------------------------------------------------------ calibration


def test_calibration_comes_in_many_forms() -> None:
    images = batches(size=32)
    labels = [torch.zeros(32, dtype=torch.int64)] * 4
    expected = plan(calibration=images).to_json()
    data = TensorDataset(torch.cat(images), torch.cat(labels))
    for given in (
        torch.cat(images),
        torch.cat(images).numpy(),
        (batch for batch in images),
        [(batch,) for batch in images],
        list(zip(images, labels, strict=True)),
        data,
        DataLoader(data, batch_size=32),
        DataLoader(data, batch_size=16),
    ):
        found = plan(calibration=given).to_json()
        if isinstance(given, DataLoader) and given.batch_size == 16:  # other chunks, other draws
            assert json.loads(found)["budget"]["samples"] == pytest.approx(96, abs=16)
        else:
            assert found == expected


def test_inputs_by_name_and_by_place_are_the_same() -> None:
    model, (image, mask) = made("two inputs")
    given = batches("two inputs")
    by_place = pwrewrite.plan(model, (image, mask), {"macs": 0.5}, given)
    named = [{"image": a, "mask": b} for a, b in given]
    by_name = pwrewrite.plan(model, {"image": image, "mask": mask}, {"macs": 0.5}, named)
    assert [op.to_dict() for op in by_place.ops] == [op.to_dict() for op in by_name.ops]
    assert by_name.budget == by_place.budget


def test_only_so_many_inputs_are_used() -> None:
    asked: list[int] = []

    def source() -> Iterator[Tensor]:
        for number, batch in enumerate(batches(count=8)):
            asked.append(number)
            yield batch

    assert plan(calibration=source(), calibration_size=40).budget["samples"] == 32  # one in five is held out
    assert max(asked) < 4


def test_a_map_is_planned_for_without_labels() -> None:
    ready = planner("transposed")
    assert ready.statistics is not None
    assert ready.statistics.outcome == "values"
    one = planner()
    assert one.statistics is not None
    assert one.statistics.outcome == "classes"


def test_too_few_inputs_are_noted() -> None:
    model, inputs = made("plain")
    few = pwrewrite.rewrite(model, inputs, budget={"macs": 0.5}, calibration=batches(count=1, size=3), verify=False)
    assert any("too few calibration inputs" in note for note in few.report.notes)
    many = pwrewrite.rewrite(model, inputs, budget={"macs": 0.5}, calibration=batches(size=32), verify=False)
    assert not any("too few" in note for note in many.report.notes)


def test_a_single_input_does() -> None:
    model, inputs = made("plain")
    given = batches(count=1, size=1)
    result = pwrewrite.rewrite(model, inputs, budget={"macs": 0.5}, calibration=given)
    assert result.report.passed
    assert any("only one calibration sample" in note for note in result.report.notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    given = batches()
    given[2][5, 1, 0, 0] = value
    with pytest.raises(UsageError, match=r"hold (NaN|Inf) in image 5 of batch 2"):
        plan(calibration=given)


def test_a_weight_that_is_nan_is_refused_with_its_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
    model[1].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(RefusedError, match="holds 1 NaN") as caught:
        pwrewrite.plan(model, torch.empty(1, 3, 16, 16), {"macs": 0.6})
    assert caught.value.where == "1"


def test_outputs_that_are_nan_are_refused_with_the_weight_that_is() -> None:
    model, inputs = made("plain")
    *_, (name, weight) = model.named_parameters()
    with torch.no_grad():
        weight.view(-1)[0] = float("nan")
    with pytest.raises(RefusedError, match="outputs hold NaN") as caught:
        pwrewrite.plan(model, inputs, {"macs": 0.5}, batches())
    assert f"NaN in the weight {name}" in str(caught.value)


def test_activations_that_are_not_finite_are_refused() -> None:
    model, inputs = made("plain")
    assert isinstance(model, Net)
    with torch.no_grad():
        model.norm.running_var.fill_(0).sub_(1)  # the root of a negative number
    with pytest.raises(RefusedError, match="not finite"):
        pwrewrite.plan(model, inputs, {"macs": 0.5}, batches())


def test_no_batches_and_wrong_ones_are_refused() -> None:
    with pytest.raises(UsageError, match="are empty"):
        plan(calibration=[])
    with pytest.raises(UsageError, match="another shape"):
        plan(calibration=[torch.zeros(4, 1, 10, 10)])
    with pytest.raises(UsageError, match="another dtype"):
        plan(calibration=[torch.zeros(4, 3, 10, 10, dtype=torch.uint8)])
    with pytest.raises(UsageError, match="not what the model takes"):
        plan("two inputs", calibration=batches())


# ----------------------------------------------------------------------------------------- layers and models


class InCode(nn.Module):
    """A convolution and a linear map with weights of their own; what the code does may depend on training."""

    def __init__(self, checks: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.kernel, self.matrix = nn.Parameter(torch.randn(16, 16, 3, 3) / 10), nn.Parameter(torch.randn(24, 16) / 4)
        self.checks = checks

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(F.conv2d(x, self.kernel, padding=1))
        if self.checks and self.training:
            x = x * 2
        return F.linear(x.mean((2, 3)), self.matrix)


def test_layers_called_as_functions_are_planned_like_modules() -> None:
    """As with modules in their place, when nothing is fitted and no mean is taken off."""
    torch.manual_seed(0)
    code = InCode(checks=False).eval()
    conv, linear = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Linear(16, 24, bias=False)
    conv.weight, linear.weight = code.kernel, code.matrix
    parts = (code.stem, nn.ReLU(), conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    modules = nn.Sequential(*parts).eval()
    inputs, given = torch.zeros(1, 3, 10, 10), batches(count=8)
    found, expected = (
        pwrewrite.plan(model, inputs, {"params": 0.3}, given, refit="none", multiple=1, forms=tuple(FORMS))
        for model in (code, modules)
    )
    names = {"0": "stem", "2": "kernel", "6": "matrix"}
    assert [op.path for op in found.ops] == [names[op.path] for op in expected.ops]
    assert {"kernel", "matrix"} <= {op.path for op in found.ops}
    assert [op.settings["widths"] for op in found.ops] == [op.settings["widths"] for op in expected.ops]
    assert found.budget["predicted_loss"] == pytest.approx(expected.budget["predicted_loss"], rel=1e-3)


def test_layers_called_as_functions_keep_the_budget_and_are_not_fitted() -> None:
    torch.manual_seed(0)
    code, inputs = InCode(checks=False).eval(), torch.zeros(1, 3, 10, 10)
    result = pwrewrite.rewrite(code, inputs, budget={"params": 0.3}, calibration=batches(count=8), multiple=1)
    assert result.report.passed
    assert "called as functions, and therefore not fitted: kernel, matrix" in result.report.notes
    found = result.report.budget
    assert found is not None
    assert found.reached["params"] <= 0.3
    assert found.predicted is not None
    assert found.measured is not None
    assert found.predicted / 10 < found.measured < 10 * found.predicted


def test_functions_in_code_that_is_no_graph_are_left_with_a_reason() -> None:
    code = InCode(checks=True).eval()
    found = pwrewrite.plan(code, torch.zeros(1, 3, 10, 10), {"params": 0.95}, batches(count=8), multiple=1)
    skips = {skip.path: skip for skip in found.skips}
    assert {op.path for op in found.ops} == {"stem"}
    for path in ("kernel", "matrix"):
        assert skips[path].reason is SkipReason.NOT_TRACED
        assert "in training" in skips[path].detail


def test_the_calls_of_a_layer_count_together() -> None:
    ready = planner("shared")
    again = next(one for one in ready.layers if one.layer.path == "again")
    assert again.candidates[0].costs["macs"] == 3 * 12 * 12 * 9 * 100
    assert ready.statistics is not None
    assert ready.statistics.positions("again") == pytest.approx(300)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model, inputs = made("plain")
    model.train(training)
    next(model.modules()).get_submodule("norm").eval()
    model.get_parameter("stem.weight").requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    pwrewrite.plan(model, inputs, {"macs": 0.5}, batches())
    pwrewrite.rewrite(model, inputs, budget={"macs": 0.5}, calibration=batches())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["stem.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------ cache


def runs(model: nn.Module, given: Any = None, **settings: Any) -> int:
    """How often a plan runs a model on calibration inputs."""
    assert isinstance(model, Net)
    before = model.runs
    pwrewrite.plan(model, made("plain")[1], {"macs": 0.5}, batches() if given is None else given, **settings)
    return model.runs - before


def alike(one: Plan, other: Plan) -> bool:
    """Whether two plans do the same at the same predicted loss."""
    same = one.budget["predicted_loss"] == pytest.approx(other.budget["predicted_loss"], rel=1e-5)
    return same and [op.to_dict() for op in one.ops] == [op.to_dict() for op in other.ops]


def test_a_second_plan_runs_the_model_once(cache: Path) -> None:
    model, _ = made("plain")
    first = plan()
    assert len(list(cache.glob("statistics/*.safetensors"))) == 1
    assert runs(model) == 1  # which says what it computes
    assert plan().to_json() == first.to_json()
    assert runs(model, batches(seed=2)) > 1
    assert runs(model, seed=1) > 1
    assert runs(model, sensitivity="activations") > 1
    with torch.no_grad():
        model.get_parameter("head.bias").add_(1)
    assert runs(model) > 1
    model.head = nn.Sequential(model.head, nn.Softplus(0.5))  # type: ignore[assignment]
    assert runs(model) > 1
    model.head[1].beta = 3.0  # type: ignore[index]  # of which neither weights nor operations tell
    assert runs(model) > 1
    assert runs(model) == 1


def test_other_budgets_and_forms_need_no_new_run() -> None:
    model, inputs = made("plain")
    plan()
    pwrewrite.plan(model, inputs, {"params": 0.5}, batches(), refit="none", multiple=2)
    assert isinstance(model, Net)
    assert model.runs == 1


def test_a_second_plan_decomposes_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, made_up = plan(), "decompose nothing"
    (file,) = cache.glob("losses/*.safetensors")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(made_up)

    with monkeypatch.context() as patched:
        for name in ("losses", "fit"):
            patched.setattr(Form, name, refuse)
        patched.setattr("pwrewrite.planning.units.eliminate", refuse)
        assert plan().to_json() == first.to_json()
        for changed in ("multiple", 2), ("sensitivity", "activations"), ("refit", "none"):
            with pytest.raises(AssertionError, match=made_up):
                plan(**dict([changed]))
    assert load(file.read_bytes())


@pytest.mark.parametrize("damage", ["cut", "no file", "NaN", "another shape", "below 0", "another type", "a folder"])
def test_damaged_losses_are_worked_out_anew(cache: Path, damage: str) -> None:
    first = plan()
    (file,) = cache.glob("losses/*.safetensors")
    known = load(file.read_bytes())
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "no file":
        file.write_bytes(b"not what it was")
    elif damage == "NaN":
        save_file({name: torch.full_like(value, math.nan) for name, value in known.items()}, file)
    elif damage == "another shape":
        save_file({name: torch.zeros(7, 2, dtype=torch.float64) for name in known}, file)
    elif damage == "below 0":
        save_file({name: value - 1 for name, value in known.items()}, file)
    elif damage == "another type":
        file.write_bytes(file.read_bytes().replace(b'"F64"', b'"F4"  '))
    else:
        file.unlink()
        file.mkdir()
    assert alike(plan(), first)
    if damage != "a folder":
        found = load(file.read_bytes())
        assert all(torch.allclose(found[name], value, rtol=1e-4, atol=1e-9) for name, value in known.items())


def test_losses_go_with_their_statistics(cache: Path) -> None:
    forms = ("expand",)
    first = plan(forms=forms)
    (file,), (sums,) = cache.glob("losses/*.safetensors"), cache.glob("statistics/*.safetensors")
    known = load(file.read_bytes())
    save_file({name: value * 2 for name, value in known.items()}, file)
    assert plan(forms=forms).budget["predicted_loss"] == pytest.approx(2 * first.budget["predicted_loss"])
    sums.unlink()
    assert alike(plan(forms=forms), first)
    assert alike(plan(forms=forms), first)


def test_an_order_of_channels_that_is_none_is_worked_out_anew(cache: Path) -> None:
    settings = {"forms": ("narrow",), "budget": {"macs": 0.8}}
    first = plan(**settings)  # type: ignore[arg-type]
    (file,) = cache.glob("losses/*.safetensors")
    for order in (0.0, math.inf, 1e9, 0.5):
        known = load(file.read_bytes())
        for value in known.values():
            if value.dim() == 2:
                value[0, 1:] = order
        save_file(known, file)
        assert alike(plan(**settings), first)  # type: ignore[arg-type]


def test_losses_of_two_runs_add_up(tmp_path: Path) -> None:
    file = tmp_path / "losses.safetensors"
    one, other = Memory(file), Memory(file)
    for memory, name in ((one, "a"), (other, "b")):
        memory.once(name, (), lambda: 1.0)
        memory.store()
    both = Memory(file)
    assert all(float(both.once(name, (), lambda: 2.0)) == 1 for name in ("a", "b"))
    fresh = Memory(file, stale=True)
    assert float(fresh.once("a", (), lambda: 2.0)) == 2
    fresh.store()
    assert float(Memory(file).once("b", (), lambda: 3.0)) == 3


def test_the_cache_can_be_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", "off")
    model, _ = made("plain")
    assert runs(model) == runs(model) > 0
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"not what it was", None])
def test_a_damaged_cache_is_gathered_anew(cache: Path, damage: bytes | None) -> None:
    model, _ = made("plain")
    first = plan()
    (file,) = cache.glob("statistics/*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert plan().to_json() == first.to_json()
    assert runs(model) == 1  # it was written again


POISONS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], None]] = {
    "another layer": lambda facts, tensors: facts["layers"][0].update(path="elsewhere"),
    "no list": lambda facts, tensors: facts.update(layers=3),
    "text for a count": lambda facts, tensors: facts.update(samples="many"),
    "an endless weight": lambda facts, tensors: facts["layers"][0].update(weight=1e999),
    "a negative count": lambda facts, tensors: facts["layers"][0].update(rows=-1),
    "another shape": lambda facts, tensors: tensors.update({"0.inputs": torch.zeros(3)}),
    "NaN": lambda facts, tensors: tensors["0.means"].fill_(float("nan")),
    "gradients of another rank": lambda facts, tensors: tensors.update({"0.gradients": torch.zeros(1, 2, 3)}),
}


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_cache_is_dropped_and_named(cache: Path, poison: str) -> None:
    first = plan()
    (file,) = cache.glob("statistics/*.safetensors")
    with safe_open(file, framework="pt") as opened:
        facts = json.loads(opened.metadata()["pwrewrite"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    POISONS[poison](facts, tensors)
    save_file(tensors, file, metadata={"pwrewrite": json.dumps(facts)})
    model, inputs = made("plain")
    planner = Planner(model, inputs, batches(), Budget())
    assert any(f"{file} were damaged and have been removed" in note for note in planner.notes)
    assert alike(plan(), first)


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.write_text("a file, where a folder should be")
    assert plan().ops


class Interrupted:
    """Batches that are interrupted once, when they are gone through the second time."""

    def __init__(self, at: int) -> None:
        self.at, self.passes = at, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for number, batch in enumerate(batches(count=10, size=32)):
            if self.passes == 2 and number == self.at:
                raise KeyboardInterrupt
            yield batch


def test_what_was_gathered_before_an_interruption_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("plain")
    assert isinstance(model, Net)
    given = Interrupted(7)
    with pytest.raises(KeyboardInterrupt):
        pwrewrite.plan(model, inputs, {"macs": 0.5}, given)
    begun = model.runs
    found = pwrewrite.plan(model, inputs, {"macs": 0.5}, given)
    whole, _ = made("plain")
    assert isinstance(whole, Net)
    monkeypatch.setenv("PWREWRITE_CACHE", "off")
    expected = pwrewrite.plan(whole, inputs, {"macs": 0.5}, batches(count=10, size=32))
    assert 0 < begun < whole.runs
    assert model.runs == whole.runs + 1  # none twice but the first, which says what the model computes
    assert alike(found, expected)
    assert found.budget["samples"] == expected.budget["samples"]
