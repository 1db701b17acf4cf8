"""What people really have: odd loaders and outputs, random forwards, weight norms, limits that cannot be met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import pwrewrite
from pwrewrite.core.errors import RefusedError, UsageError
from pwrewrite.core.options import Budget
from pwrewrite.engines.timing import Timing
from pwrewrite.planning.planner import Planner
from pwrewrite.workflows import end_to_end
from pwrewrite.workflows.plan import make_plan

HALF = {"macs": 0.5}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", str(tmp_path / "cache"))


def network(outputs: int = 10, *behind: nn.Module, channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, outputs)]
    return nn.Sequential(*layers, *head, *behind).eval()


def images(count: int, size: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def budget_of(result: pwrewrite.Rewritten) -> Any:
    assert result.report.budget is not None
    return result.report.budget


# ------------------------------------------------------------------------------------- one cost check, one input


@pytest.mark.parametrize(
    ("example", "calibration"),
    [
        (images(32), images(128).split(32)),
        (images(2), images(1)),
        (images(8), images(30)),
        (images(1, 24), images(60).split(20)),
        (images(1, 8), images(60).split(20)),
    ],
    ids=["fewer held out", "a single image", "one batch", "a larger example", "a smaller example"],
)
def test_the_example_may_be_another_batch_and_size_than_the_calibration(example: Tensor, calibration: Any) -> None:
    result = pwrewrite.rewrite(network(), (example,), budget=HALF, calibration=calibration)
    assert result.report.passed, [(check.name, check.detail) for check in result.report.verification.failures]  # type: ignore[union-attr]
    assert result.edits


# -------------------------------------------------------------------------------------------- outputs and labels


def test_a_single_logit_has_its_own_accuracy() -> None:
    model, x = network(1), images(200)
    with torch.no_grad():
        logits = model(x)[:, 0]
        model[-1].bias -= logits.median()  # type: ignore[operator, arg-type]
        labels = (model(x)[:, 0] > 0).long()
    loader = list(zip(x.split(20), labels.split(20)))
    result = pwrewrite.rewrite(model, (x[:1],), budget={"macs": 0.7}, calibration=loader, verify=False)
    before, after = budget_of(result).metrics["accuracy on held-out inputs"]
    assert before == 1
    assert 0.5 < after <= 1
    assert budget_of(result).agreement is None


class Residual(nn.Module):
    """A residual block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.second, self.head = nn.Conv2d(32, 32, 3, padding=1), network(4, channels=32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        scores: Tensor = self.head((x + self.second(self.first(x).relu())).relu())
        return scores


class Scores(nn.Module):
    """One score for each image, without an axis of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x).mean(1)
        return scores


@pytest.mark.parametrize(
    "model", [Scores(), nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3)).eval()]
)
def test_labels_that_do_not_fit_are_told_before_the_work(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    loader = [(images(8), torch.arange(8) % 5) for _ in range(6)]
    steps: list[str] = []

    def progress(step: str, share: float | None) -> None:
        steps.append("told" if caplog.records and "told" not in steps else step)

    result = pwrewrite.rewrite(
        model, (images(2),), budget={"macs": 0.8}, calibration=loader, verify=False, progress=progress
    )
    assert not budget_of(result).metrics
    (note,) = [note for note in result.report.notes if "no accuracy is measured" in note]
    assert note in caplog.text
    assert steps.index("told") < min(place for place, step in enumerate(steps) if step.startswith("looking at"))


@pytest.mark.parametrize("cached", [True, False])
def test_a_label_beyond_the_classes_is_refused_before_the_work(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cached:
        monkeypatch.setenv("PWREWRITE_CACHE", "off")
    labels = torch.arange(48) % 4
    labels[45] = 4  # as of a data set that counts from 1
    loader = list(zip(images(48).split(8), labels.split(8)))
    steps: list[str] = []
    with pytest.raises(
        UsageError, match=r"beyond the classes(.|\n)*calibration sample 45(.|\n)*from 0 to 3(.|\n)*got: 4"
    ):
        pwrewrite.rewrite(
            network(4), (images(2),), budget={"macs": 0.8}, calibration=loader,
            progress=lambda step, share: steps.append(step),
        )  # fmt: skip
    assert "calibrating" not in steps


@pytest.mark.parametrize("ignored", [-1, -100])
def test_negative_labels_and_masks_are_noted(ignored: int) -> None:
    labels = torch.arange(48) % 4
    labels[::7] = ignored
    masks = torch.full((48, 8, 8), 255)  # the number of what is ignored, in segmentation
    for each in (labels, masks):
        loader = list(zip(images(48).split(8), each.split(8)))
        model = network(4)
        result = pwrewrite.rewrite(model, (images(2),), budget={"macs": 0.8}, calibration=loader, verify=False)
        assert not budget_of(result).metrics
        assert result.edits


@pytest.mark.parametrize(
    ("behind", "outputs", "kind", "taken"),
    [
        ([], None, "classes", "logits"),
        ([nn.Softmax(1)], None, "classes", "probabilities"),
        ([nn.Sigmoid()], None, "values", None),
        ([], "values", "values", None),
        ([nn.Softmax(1)], "values", "values", None),
    ],
)
def test_probabilities_are_not_taken_for_logits(behind: Any, outputs: Any, kind: str, taken: Any) -> None:
    loader = images(60).split(20)
    result = pwrewrite.rewrite(
        network(10, *behind), (images(2),), budget={"macs": 0.7}, calibration=loader, outputs=outputs, verify=False
    )
    budget = budget_of(result)
    assert budget.kind == kind
    assert (budget.agreement is None) == (kind == "values")
    assert budget.outputs == (taken or "values")
    assert (f"outputs taken for {taken}" in " ".join(str(result.report).split())) == (taken is not None)


def test_the_losses_of_logits_and_of_their_probabilities_are_one() -> None:
    loader = images(60).split(20)
    found = []
    for behind in ([], [nn.Softmax(1)]):
        model = network(10, *behind)
        found.append(budget_of(pwrewrite.rewrite(model, (images(2),), budget=HALF, calibration=loader, verify=False)))
    assert found[0].measured == pytest.approx(found[1].measured, rel=1e-2)
    assert found[0].predicted == pytest.approx(found[1].predicted, rel=1e-2)


# ----------------------------------------------------------------------------------------------- random forwards


class Noisy(nn.Module):
    """A variational autoencoder's draw in the middle, by torch's own random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mean = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.decode = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(self.encode(x).relu())
        decoded: Tensor = self.decode(mean + torch.randn_like(mean))
        return decoded


def test_a_random_forward_is_compared_at_the_same_draws() -> None:
    torch.manual_seed(0)
    model, loader = Noisy().eval(), images(48).split(8)
    whole = pwrewrite.rewrite(model, (images(2),), budget={"macs": 1.0}, calibration=loader, verify=False)
    assert not whole.edits
    assert budget_of(whole).measured == 0
    half = pwrewrite.rewrite(model, (images(2),), budget={"macs": 0.7}, calibration=loader, verify=False)
    assert 0 < budget_of(half).measured < 0.2
    again = pwrewrite.rewrite(model, (images(2),), budget={"macs": 0.7}, calibration=loader, verify=False)
    assert budget_of(again).measured == budget_of(half).measured


# -------------------------------------------------------------------------------------- limits that are not met


def baked(norm: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(norm(nn.Conv1d(8, 64, 5, padding=2)), nn.LeakyReLU(), norm(nn.Conv1d(64, 64, 5, padding=2)))


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.3)  # type: ignore[no-untyped-call, no-any-return]


NORMS = {
    "parametrized": parametrizations.weight_norm,
    "spectral": parametrizations.spectral_norm,
    "old weight norm": weight_norm,
    "old spectral norm": spectral_norm,
    "pruned": pruned,
}


@pytest.mark.parametrize("name", NORMS)
def test_computed_weights_are_a_reason_with_a_remedy(name: str, tmp_path: Path) -> None:
    model, x = baked(NORMS[name]), torch.randn(2, 8, 64)
    with torch.no_grad():
        model(x)
    model.eval()
    before = model(x).detach()
    parameters = {key: value.detach().clone() for key, value in model.state_dict().items()}
    with pytest.raises(RefusedError, match="2 layers are left as they are") as caught:
        pwrewrite.rewrite(model, x, budget=HALF, calibration=torch.randn(32, 8, 64))
    assert "2 parametrized" in str(caught.value)
    assert "--bake" in str(caught.value)
    result = pwrewrite.rewrite(model, x, budget=HALF, calibration=torch.randn(32, 8, 64), bake=True)
    assert result.report.passed, result.report.verification.failures  # type: ignore[union-attr]
    assert {"bake"} < {edit.op.action for edit in result.edits} <= {"bake", "factorize", "narrow"}
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, parameters[key]) for key, value in model.state_dict().items())
    assert not any(parametrize.is_parametrized(module) for module in result.model.modules())
    result.save(tmp_path / "baked")
    loaded = pwrewrite.load(tmp_path / "baked", model)
    torch.testing.assert_close(loaded(x), result.model(x))
    plan = pwrewrite.plan(model, x, HALF, torch.randn(32, 8, 64), bake=True)
    assert {"bake"} < {op.action for op in plan.ops} <= {"bake", "factorize", "narrow"}
    assert pwrewrite.apply(model, plan)(x).shape == before.shape


def test_what_is_already_rewritten_says_to_plan_from_the_original() -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval(), torch.zeros(1, 8, 12, 12)
    small = pwrewrite.rewrite(model, x, passes=["insert-bottleneck"], rank=0.25).model
    with pytest.raises(RefusedError, match="already-bottleneck") as caught:
        pwrewrite.plan(small, (x,), {"macs": 0.01})
    assert "or plan from the original model" in str(caught.value)


@pytest.mark.parametrize("residual", [False, True])
def test_a_fused_model_is_unfused(residual: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Residual().eval() if residual else network()
    fused = pwrewrite.fuse(model, images(2))
    assert fused.edits
    result = pwrewrite.rewrite(fused.model, images(2), budget=HALF, calibration=images(40))
    assert result.report.passed, result.report.verification.failures  # type: ignore[union-attr]
    assert {"unfuse"} < {edit.op.action for edit in result.edits} <= {"unfuse", "factorize", "narrow"}
    assert any("fuse the result again" in note for note in result.report.notes)
    result.save(tmp_path / "smaller")
    loaded = pwrewrite.load(tmp_path / "smaller", fused.model)
    torch.testing.assert_close(loaded(images(2)), result.model(images(2)))


def test_a_missed_time_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwrewrite.planning.planner.time_plan", lambda *given: 0.5)
    monkeypatch.setattr("pwrewrite.planning.planner.time_models", lambda *given, **how: [Timing(1.0, 0.0)] * 2)
    monkeypatch.setattr(
        "pwrewrite.planning.planner.LatencyTable.times",
        lambda self, shape, variants: [1.0 if not variant.form else 0.25 for variant in variants],
    )
    spread = Timing(1.0, 0.3)
    monkeypatch.setattr(end_to_end, "time_models", lambda *given, **how: [spread, Timing(0.72, 0.3)])
    model, x = network(), images(2)
    with pytest.raises(RefusedError, match=r"latency=0\.5 is missed") as caught:
        pwrewrite.rewrite(model, x, budget={"latency": 0.5}, calibration=images(40), threads=1)
    assert "720 ms of 1e+03 ms (±30%, 1 thread)" in str(caught.value)
    assert "--best-effort" in str(caught.value)
    result = pwrewrite.rewrite(
        model, x, budget={"latency": 0.5}, calibration=images(40), threads=1, best_effort=True, verify=False
    )
    assert "latency=0.5 is missed" in result.report.notes[0]
    assert any("noisy" in note for note in result.report.notes)
    assert budget_of(result).reached["latency"] == pytest.approx(0.72)
    assert budget_of(result).to_dict()["threads"] == 1
    assert "0.72×, ±30.0%, 1 thread" in str(result.report)


def test_a_plan_that_misses_its_time_when_carried_out_is_tightened(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    def share(model: nn.Module) -> float:
        return size(model) / size(network())

    def times(sessions: Any, args: Any, kwargs: Any, **how: Any) -> list[Timing]:
        return [Timing(1.0, 0.0), Timing(0.2 + share(sessions[1].run), 0.0)]  # slower than was said

    search = "pwrewrite.planning.planner"
    monkeypatch.setattr(f"{search}.time_plan", lambda model, inputs, plan, *how: share(pwrewrite.apply(model, plan)))
    monkeypatch.setattr("pwrewrite.planning.planner.time_models", lambda *given, **how: [Timing(1.0, 0.0)] * 2)
    monkeypatch.setattr(
        "pwrewrite.planning.planner.LatencyTable.times",
        lambda self, shape, variants: [float(size(v.make(torch.device("cpu"), torch.float32))) for v in variants],
    )
    monkeypatch.setattr(end_to_end, "time_models", times)
    result = pwrewrite.rewrite(network(), images(2), budget={"latency": 0.7}, calibration=images(40), threads=1)
    assert 0.6 < budget_of(result).reached["latency"] < 0.7 * 1.05
    assert share(result.model) < 0.55
    assert any("planned again" in note for note in result.report.notes)


class Reads(nn.Module):
    """Its code reads a layer's own attributes, which nothing that takes the layer's place has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(n, 16, 3, padding=1) for n in (1, 16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x.to(self.a.weight.dtype)).relu()) / self.b.weight.ndim
        return self.head(self.c(x.relu()).mean((2, 3)))


def test_a_budget_is_met_without_what_the_model_does_not_survive() -> None:
    model, data = Reads().eval(), torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"calibration": data.split(16), "forms": ["1x1"]}
    result = pwrewrite.rewrite(model, data[:1], budget={"macs": 0.6}, **options)
    assert result.report.passed
    assert budget_of(result).reached["macs"] <= 0.6
    assert isinstance(result.model.b, nn.Conv2d)
    assert not isinstance(result.model.c, nn.Conv2d)
    assert "planned again without what could not be carried out: b" in result.report.notes
    (skip,) = (skip for skip in result.report.skips if skip.path == "b")
    assert "weight" in skip.detail
    planner = Planner(model, data[:1], data.split(16), Budget(forms=("1x1",)))
    (first,) = (group for group in planner.layers if group.path == "b")
    ops = [candidate.op for candidate in first.candidates if candidate.op is not None]
    left = planner.leaving(ops, [skip])
    for other in (left, left.in_norm("activations"), left.without(())):
        assert [len(group.candidates) for group in other.layers if group.path == "b"] == [1]
        assert skip in other.allocator.skips
    assert len(first.candidates) > 1
    with pytest.raises(RefusedError, match=r"budget macs=0\.3 is missed"):  # too little without it
        pwrewrite.rewrite(model, data[:1], budget={"macs": 0.3}, **options)


# ----------------------------------------------------------------------------------------------- loaders, modes


def test_a_function_makes_inputs_of_any_batch() -> None:
    loader = [{"low": images(8), "name": "a", "class": torch.arange(8) + 2} for _ in range(5)]
    with pytest.raises(UsageError, match="batch="):
        pwrewrite.rewrite(network(), images(2), budget=HALF, calibration=loader)
    result = pwrewrite.rewrite(
        network(),
        images(2),
        budget=HALF,
        calibration=loader,
        batch=lambda one: (one["low"], one["class"]),
        verify=False,
    )
    assert "accuracy on held-out inputs" in budget_of(result).metrics


def test_inference_mode_leaves_parameters_that_can_be_trained() -> None:
    model, loader = network(), images(40).split(8)
    with torch.inference_mode():
        inside = pwrewrite.rewrite(model, images(2), budget=HALF, calibration=loader)
        born = network()
    outside = pwrewrite.rewrite(born, images(2), budget=HALF, calibration=loader)
    for result in (inside, outside):
        assert result.report.passed, result.report.verification.failures  # type: ignore[union-attr]
        assert not any(parameter.is_inference() for parameter in result.model.parameters())
        result.model(images(2)).sum().backward()


class AsksForItsWeight(nn.Module):
    """As recurrent networks do, to make their first state where the weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.zeros(1, device=self.conv.weight.device)


def test_what_could_not_be_carried_out_is_said_with_the_budget() -> None:
    model, x = AsksForItsWeight().eval(), torch.randn(16, 16, 8, 8)
    budget = pwrewrite.Budget({"macs": 0.5}, calibration=x, forms=("reduce",))
    with pytest.raises(RefusedError, match=r"not carried out: conv: broke-model.*'weight'"):
        pwrewrite.rewrite(model, x, budget)
    report = make_plan(model, x, budget).report
    assert report.budget is not None
    assert report.budget.reached == {"macs": 1.0}
    assert any("not carried out: conv" in note for note in report.notes)


class Filters(nn.Module):
    """Makes its kernels anew at every call, as fixed filters do."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.arange(9.0).view(1, 1, 3, 3).expand(16, 8, 3, 3) / 9
        return torch.relu(torch.conv2d(x, kernel))


@pytest.mark.parametrize("bake", [False, True])
def test_baking_is_no_remedy_for_weights_that_code_makes(bake: bool) -> None:
    model, x = nn.Sequential(nn.ReLU(), Filters()).eval(), torch.randn(2, 8, 12, 12)
    with pytest.raises(RefusedError, match="1 parametrized") as caught:
        pwrewrite.rewrite(model, x, budget=HALF, bake=bake)
    assert "--bake" not in str(caught.value)
    assert "or store the weights that the model's code computes as parameters" in str(caught.value)
