"""Recovery: the held-out loss never rises, the same call gives the same result, killed or not, alone or together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pwrewrite
from pwrewrite.core.errors import RefusedError, UsageError
from pwrewrite.passes.narrow import Narrow
from pwrewrite.planning import augment, distilling, recovery, training, training_set
from pwrewrite.planning.batches import Batches
from pwrewrite.planning.running import Chunk
from pwrewrite.workflows import smallest
from pwrewrite.workflows.recover import Recovered, recover

SEVENTH = {"macs": 0.15}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", str(tmp_path / "cache"))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)).eval()


def smaller() -> nn.Module:
    """The same with half of a layer's weights gone."""
    model = network()
    torch.manual_seed(1)
    model[0][3] = nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 16, 3, padding=1))  # type: ignore[operator]
    return model


def images(count: int = 120) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: nn.Module, second: nn.Module, tolerance: float = 0.0) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in pairs)


def recovered(time: str = "6epochs", model: nn.Module | None = None, **options: Any) -> Recovered:
    return recover(network(), smaller() if model is None else model, images().split(20), time, **options)


# ------------------------------------------------------------------------------------------------ what comes of it


def test_the_loss_falls_and_neither_model_changes() -> None:
    original, rewritten = network().train(), smaller().train()
    before = weights(original), weights(rewritten)
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    result = recover(original, rewritten, images().split(20), "8epochs")
    assert result.report.after < 0.5 * result.report.before
    assert result.measured.loss == result.report.after
    assert torch.equal(drawn, torch.get_rng_state())
    assert original.training
    assert result.model.training
    assert all(p.requires_grad and p.grad is None for p in result.model.parameters())
    for model, values in zip((original, rewritten), before):
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert result.report.norms == "frozen"
    assert torch.equal(result.model.state_dict()["0.1.running_var"], before[1]["0.1.running_var"])


def test_a_result_is_never_worse_and_what_to_try_is_said() -> None:
    result = recovered("3epochs", recover_rate=30.0)
    assert result.report.after <= result.report.before
    same_again = recover(network(), network(), images().split(20), "2epochs")
    assert recover(network(), network(), images().split(20), "2epochs").notes == same_again.notes  # from the cache
    assert same_again.report.kept == 0
    assert same_again.report.after == same_again.report.before
    assert any("--recover-rate" in note for note in same_again.notes)
    assert same(same_again.model, network())


def test_the_same_seed_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", "off")
    first, again, other = recovered(seed=5), recovered(seed=5), recovered(seed=6)
    assert same(first.model, again.model)
    assert not same(first.model, other.model)


def test_seeds_may_be_large() -> None:
    models = network(), smaller()
    assert recover(*models, images().split(20), "1epochs", seed=2**62).report.steps
    calibration = {"calibration": images().split(20)}
    assert pwrewrite.rewrite(network(), images(1), budget=SEVENTH, seed=2**62, verify=False, **calibration).plan.ops
    ran: list[nn.Module] = []
    with pytest.raises(UsageError, match="not a seed"):
        pwrewrite.rewrite(network(), images(1), budget=SEVENTH, seed=-1, metric=ran.append, **calibration)  # type: ignore[arg-type]
    assert not ran


def test_labels_are_used_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "LABELS", 10.0)
    classes = torch.randint(5, (120,), generator=torch.Generator().manual_seed(2))
    batches = list(zip(images().split(20), classes.split(20)))
    with_labels = recover(network(), smaller(), batches, "3epochs", outputs="logits")
    assert with_labels.report.labelled
    assert not recovered("3epochs", outputs="logits").report.labelled
    assert not same(with_labels.model, recovered("3epochs", outputs="logits").model)


def test_outputs_that_are_no_class_scores() -> None:
    original, rewritten = network()[:1], smaller()[:1]  # type: ignore[index]
    result = recover(original, rewritten, images().split(20), "6epochs", recover_rate=1e-2)
    assert result.measured.kind == "values"
    assert result.report.after < 0.5 * result.report.before


def test_inputs_of_several_sizes_come_in_their_batches() -> None:
    batches = [torch.cat([part, part], 3) if place % 3 else part for place, part in enumerate(images().split(12))]
    result = recover(network(), smaller(), batches, "4epochs", recover_batch=24)
    assert result.report.steps == 16
    assert result.report.after < 0.5 * result.report.before


def test_what_does_not_fit_in_memory_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recovered("3epochs")
    monkeypatch.setattr("pwrewrite.planning.training_set.MEMORY", 6000)
    windows = recovered("3epochs", seed=1)
    assert windows.report.samples == whole.report.samples == 100
    assert windows.report.after < 0.5 * windows.report.before


def test_blocks_that_were_narrowed_are_not_compared() -> None:
    torch.manual_seed(0)
    original, x = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval(), images(40)
    narrowed = pwrewrite.rewrite(original, x[:4], passes=[Narrow(0.5)]).model
    result = recover(original, narrowed, x.split(8), "4epochs", recover_rate=1e-2)
    assert result.report.blocks == 1
    assert result.report.after < result.report.before


class Named(nn.Module):
    """A model of two inputs, or of one dict of them."""

    def __init__(self, *, one: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.scale, self.one = nn.Linear(4, 5), nn.Linear(2, 5), one
        self.forward = self.of_one if one else self.of_two  # type: ignore[assignment]

    def of_two(self, x: Tensor, side: Tensor) -> Tensor:
        return self.net(x) * self.scale(side)

    def of_one(self, batch: dict[str, Tensor]) -> Tensor:
        return self.of_two(batch["x"], batch["side"])


@pytest.mark.parametrize("labels", ["none", "in", "behind"])
@pytest.mark.parametrize("one", [False, True])
def test_batches_of_named_inputs(one: bool, labels: str) -> None:
    batches: list[Any] = []
    for part in torch.randn(40, 6).split(8):
        batch, classes = {"x": part[:, :4].numpy(), "side": part[:, 4:].numpy()}, torch.arange(8) % 5
        batches.append({"none": batch, "in": {**batch, "label": classes}, "behind": (batch, classes)}[labels])
    report = recover(Named(one=one), Named(one=one), batches, "1epochs", outputs="logits").report
    assert report.labelled == (labels != "none")


@pytest.mark.parametrize(
    ("classes", "expected", "got"),
    [((3, 2), "(8, 3)", "(8, 2)"), ((1, 2), "(8, 1)", "(8, 2)"), ((3, 1), "(8, 3)", "(8, 1)")],
)
def test_models_with_other_outputs_are_refused(classes: tuple[int, int], expected: str, got: str) -> None:
    with pytest.raises(RefusedError, match="outputs of other shapes") as error:
        recover(*(nn.Linear(4, count) for count in classes), torch.randn(40, 4).split(8), "1epochs")
    assert (error.value.expected, error.value.got) == (expected, got)


def test_inputs_beyond_memory_are_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[weakref.ref[Tensor]] = []
    windows: list[weakref.ref[object]] = []
    join = training_set._Window.of

    def source(_: object) -> Iterator[tuple[Chunk, None]]:
        for part in images(80).split(10):
            assert not any(each() is not None for each in windows)
            chunks.append(weakref.ref(chunk := part.clone()))
            yield ((chunk,), {}), None
            del chunk

    def joined(parts: list[tuple[Chunk, Tensor | None]]) -> object:
        windows.append(weakref.ref(window := join(parts)))
        return window

    monkeypatch.setattr(training_set, "MEMORY", 4 * 10 * 64 * 4)
    monkeypatch.setattr(Batches, "labelled", source)
    monkeypatch.setattr(training_set._Window, "of", joined)
    data = training_set.TrainingSet(Batches(images(80), images(1)), 10, 0, None)
    assert data.steps == 8
    held = [sum(each() is not None for each in chunks) for _ in data.epoch(0)]
    assert held == [1] * 4 + [0] * 4  # the one that did not fit any more, beside the window


# --------------------------------------------------------------------------------------------------- augmentations


def test_plain_augmentations() -> None:
    torch.manual_seed(0)
    image = torch.arange(1.0, 65).reshape(1, 1, 8, 8).repeat(64, 1, 1, 1)
    moved = augment.shift(image)
    assert moved.shape == image.shape
    assert not torch.equal(moved, image)
    assert {float(each[0, 4, 4]) for each in moved} == set(image[0, 0, 3:6, 3:6].flatten().tolist())
    mirrored = augment.flip(image)
    assert 10 < sum(float(each[0, 4, 5]) < float(each[0, 4, 4]) for each in mirrored) < 54


def test_the_code_of_a_function_is_known_with_what_it_holds() -> None:
    def held(by: object) -> Callable[[Tensor], object]:
        return lambda x: (x, by)

    def default(by: float) -> Callable[[Tensor], Tensor]:
        def scaled(x: Tensor, by: float = by) -> Tensor:
            return x * by

        return scaled

    class Scaled:
        def __init__(self, by: float) -> None:
            self.by = by

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.by

    source_of = augment.source_of
    one_line = [lambda x: x * 2, lambda x: x * 3, lambda x: x + 2]  # whose source is one text
    assert len({source_of(each) for each in one_line}) == 3
    for make, *values in (
        (held, 1, 2, "1", [1], torch.ones(2), torch.zeros(2), default(1), default(2)),
        (default, 1, 2),
        (lambda by: torch.no_grad()(default(by)), 1, 2),
    ):
        assert len({source_of(make(value)) for value in values}) == len(values)
        assert all(source_of(make(value)) == source_of(make(value)) for value in values)
    assert source_of(None) == source_of(None)
    for unknown in (Scaled(1), Scaled(1).__call__, held(object()), len, partial(len)):
        assert source_of(unknown) != source_of(unknown)  # no other run knows it
    recover(*(models := (network(), smaller())), images().split(20), "1epochs", augment=default(1.0))
    assert not _trains(*models, augment=default(1.0))
    assert _trains(*models, augment=default(0.5))


def test_an_augmentation_of_the_user() -> None:
    seen = []

    def louder(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x * (1 + 0.1 * torch.rand(1))

    result = recovered("2epochs", augment=louder)
    assert result.report.augment == "louder"
    assert seen
    for wrong, message in (
        (lambda x: x[:1], "inputs like those"),
        (lambda x: x / 0, "NaN or Inf"),
        (lambda x: x.nothing, "raised"),
    ):
        with pytest.raises(UsageError, match=message):
            recovered("1epochs", augment=wrong)
    with pytest.raises(UsageError, match="there is no augmentation 'rotate'"):
        recovered("1epochs", augment="rotate")
    vectors = nn.Linear(4, 3), nn.Linear(4, 3)
    with pytest.raises(UsageError, match="is for images"):
        recover(*vectors, torch.randn(40, 4).split(8), "1epochs", augment="flip")
    assert recover(*vectors, torch.randn(40, 4).split(8), "1epochs").report.augment == "none"


# --------------------------------------------------------------------------------------------------------- resuming


class _Killed(BaseException):
    pass


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recovered("6epochs")
    monkeypatch.setenv("PWREWRITE_CACHE", str(tmp_path / "other"))
    for share in (0.2, 0.5, 0.8):

        def die(what: str, done: float | None, share: float = share) -> None:
            if "epoch" in what and done is not None and done > share:
                raise _Killed

        with pytest.raises(_Killed):
            recovered("6epochs", progress=die)
    steps: list[float] = []
    result = recovered("6epochs", progress=lambda what, done: steps.append(done) if done else None)
    assert steps[0] > 0.5
    assert same(whole.model, result.model)
    assert result.report.after == whole.report.after
    assert any("interrupted" in note for note in result.notes)
    said: list[str] = []
    assert same(recovered("6epochs", progress=lambda what, done: said.append(what)).model, whole.model)
    assert not any("epoch" in what for what in said)  # what is finished is not done again


def test_models_that_compute_something_else_with_the_same_weights_are_trained_anew() -> None:
    models = network(), smaller()
    for changed in (None, *models):
        if changed is not None:
            changed[0][2] = nn.Tanh()  # type: ignore[operator]
        assert _trains(*models)
    assert not _trains(*models)


def _trains(original: nn.Module, rewritten: nn.Module, **options: Any) -> bool:
    """Whether a recovery takes steps, or finds what an earlier one came to."""
    said: list[str] = []
    recover(original, rewritten, images().split(20), "1epochs", progress=lambda what, _: said.append(what), **options)
    return any("epoch" in what for what in said)


def test_all_that_a_training_depends_on_is_in_the_name_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(recovery, "checkpoint_file", lambda models, batches, labels, facts: seen.update(facts))
    recovered("1epochs")
    assert seen.keys() == {each.name for each in fields(training.Setting)} - {"say", "notes"}


def test_a_damaged_checkpoint_is_no_error(tmp_path: Path) -> None:
    whole = recovered("2epochs")
    (file,) = (tmp_path / "cache" / "recovery").glob("*.pt")
    file.write_bytes(file.read_bytes()[:100])
    assert same(recovered("2epochs").model, whole.model)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "empty"),
        ({"batches": [images(), torch.full((4, 1, 8, 8), torch.nan)]}, "NaN|nan|finite"),
        ({"time": "5"}, "no time to train for"),
        ({"time": "0epochs"}, "no time to train for"),
        ({"time": "0.001s"}, "too short for one step"),
        ({"recover_rate": 0.0}, "learning rate"),
        ({"recover_batch": 0}, "1 input or more"),
        ({"recover_device": "nowhere"}, "there is no device"),
        ({"speed": 3}, "no option 'speed'"),
        ({"seed": -1}, "not a seed"),
        ({"recover": "2epochs"}, "time is given twice"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    options = {"batches": images().split(20), "time": "1epochs", "example_inputs": images(1), **change}
    with pytest.raises(UsageError, match=message):
        recover(network(), smaller(), options.pop("batches"), options.pop("time"), **options)


def test_labels_beyond_the_classes_are_not_used() -> None:
    batches = [(part, torch.full((len(part),), 7)) for part in images().split(20)]
    with pytest.raises(UsageError, match="beyond the classes"):
        recover(network(), smaller(), batches, "1epochs", outputs="logits")


def test_out_of_memory_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training.Training, "_step", full)
    with pytest.raises(RefusedError, match="out of memory") as error:
        recovered("1epochs", recover_batch=16)
    assert "--recover-batch" in str(error.value)
    assert "8" in str(error.value)


def test_a_budget_of_time_is_kept() -> None:
    result = recovered("4s")
    assert 1 < result.report.seconds < 6
    assert result.report.steps > 10


class _Slow:
    """A source whose batches take a second each, by a clock of its own."""

    def __init__(self) -> None:
        self.clock, self.batches = 0.0, 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in images(160).split(20):
            self.clock, self.batches = self.clock + 1, self.batches + 1
            yield batch

    def monotonic(self) -> float:
        return self.clock


def test_a_slow_source_costs_no_time_once_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    source, step = _Slow(), training.Training._step

    def slow_step(*args: Any) -> None:
        source.clock += 0.5
        step(*args)

    monkeypatch.setattr(training, "time", source)
    monkeypatch.setattr(training.Training, "_step", slow_step)
    report = recover(network(), smaller(), source, "100s").report
    assert 90 < report.seconds <= 100
    source.batches = 0
    recover(network(), smaller(), source, "20epochs")
    assert source.batches <= 5 * 8


def test_keeping_the_state_takes_little_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, step = _Slow(), training.Training._step

    def slow_step(*args: Any) -> None:
        clock.clock += 0.5
        step(*args)

    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(training.Training, "_step", slow_step)
    monkeypatch.setattr(training, "write_checkpoint", lambda *_: setattr(clock, "clock", clock.clock + 1))
    result = recover(network(), smaller(), images().split(20), "100s")
    assert not any("time was up" in note for note in result.notes)
    assert result.report.steps >= 0.88 * 100 / 0.5


@pytest.mark.parametrize(("first", "later"), [(2.0, 0.25), (0.25, 2.0)])
def test_steps_are_planned_anew_where_they_take_other_than_at_first(
    first: float, later: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, step, rates = _Slow(), training.Training._step, list[float]()

    def uneven_step(self: Any, parts: Any, phase: Any, state: Any) -> None:
        clock.clock += first if clock.clock < 10 else later
        rates.append(phase.optimizer.param_groups[0]["lr"])
        step(self, parts, phase, state)

    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(training.Training, "_step", uneven_step)
    result = recover(network(), smaller(), images().split(20), "100s")
    assert not any("time was up" in note for note in result.notes)
    assert 85 < result.report.seconds <= 100
    assert 0.85 <= result.report.steps / (10 / first + 85 / later) <= 1.1
    phase = rates[-round(0.1 * result.report.steps) :]
    assert phase == sorted(phase, reverse=True)
    assert phase[-1] < 0.02 * max(rates)


@pytest.mark.parametrize("steps", [4, 5])
def test_steps_that_were_left_out_are_noted(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _Slow()
    monkeypatch.setattr(training, "time", source)
    monkeypatch.setattr(training.Training, "_steps", lambda _: steps)
    monkeypatch.setattr(training.Training, "_step", lambda *_: setattr(source, "clock", source.clock + 25))
    result = recover(network(), smaller(), source, "100s", recover_batch=16)  # eight steps in an epoch
    assert result.report.steps == 4
    assert [note for note in result.notes if "time was up" in note] == [
        "recovery ended after 4 of 5 steps: time was up"
    ] * (steps - 4)


# -------------------------------------------------------------------------------------------------------- workflows


def test_rewrite_trains_and_reports(tmp_path: Path) -> None:
    batches = images().split(20)
    options: dict[str, Any] = {"sensitivity": "weights", "refit": "none", "recover": "5epochs"}
    result = pwrewrite.rewrite(network(), images(1), budget=SEVENTH, calibration=batches, **options)
    budget = result.report.budget
    assert budget is not None
    assert budget.recovery is not None
    assert budget.measured == budget.recovery.after < budget.recovery.before
    assert "recovery" in str(result.report)
    assert result.report.passed
    assert all(row.edit.relative_error is None for row in result.report.edits)
    result.save(tmp_path / "out")
    loaded = pwrewrite.load(tmp_path / "out", network())
    assert same(loaded, result.model)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["budget"]["recovery"]["time"] == "5epochs"


def test_the_search_for_the_smallest_model_trains_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(smallest.search.__kwdefaults__, "steps", 5)  # of 33 budgets in place of 129
    original = network()
    with torch.no_grad():
        wanted = original(images())

    def near(model: nn.Module) -> float:
        with torch.no_grad():
            return -float((model(images()) - wanted).square().mean())

    options: dict[str, Any] = {"metric": near, "max_drop": 3e-4, "calibration": images().split(20)}
    plain = pwrewrite.make_plan(original, images(1), budget=(), **options)
    trained = pwrewrite.make_plan(original, images(1), budget=(), recover="5epochs", **options)
    assert trained.report.after["macs"] <= plain.report.after["macs"]
    assert trained.plan.ops


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="--recover goes with --calibration"):
        pwrewrite.rewrite(network(), images(1), budget=SEVENTH, recover="1epochs")
    with pytest.raises(UsageError, match="--recover-rate goes with --recover"):
        pwrewrite.rewrite(network(), images(1), budget=SEVENTH, calibration=images().split(20), recover_rate=0.1)


# -------------------------------------------------------------------------------------------------------- processes

_TOGETHER = """
import os, signal, sys, torch
from pathlib import Path
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
sys.path[:0] = [{tests!r}]
from test_recover import recovered
from pwrewrite.core.processes import rank, world
place, count, dies = Path(sys.argv[1]), int(sys.argv[2]), len(sys.argv) > 3

def step(what, share):
    if dies and rank() == 1 and share and share > 0.7 and not place.with_suffix(".died").exists():
        place.with_suffix(".died").touch()
        os.kill(os.getpid(), signal.SIGKILL)

def work():
    result = recovered("3epochs", recover_batch=15, progress=step)
    if not rank():
        torch.save((world(), result.report.after, result.notes, result.model.state_dict()), place)

# What `torchrun --standalone` does, but for its processes, which are forks of this one, where everything is imported.
torch.set_num_threads(1)
recovered("1epochs")
one = dict(min_nodes=1, max_nodes=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=str(os.getpid()))
elastic_launch(LaunchConfig(**one, nproc_per_node=count, max_restarts=1, start_method="fork"), work)()
"""


@pytest.mark.parametrize(("count", "killed"), [(2, True), (4, False)], ids=["2, one is killed", "4"])
def test_processes_come_to_the_same_result(
    count: int, killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "together.py").write_text(_TOGETHER.format(tests=str(Path(__file__).parent)))
    place = tmp_path / "result.pt"
    command = [sys.executable, str(tmp_path / "together.py"), str(place), str(count), *["dies"] * killed]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pwrewrite.__file__).parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    processes, loss, notes, values = torch.load(place, weights_only=True)
    monkeypatch.setenv("PWREWRITE_CACHE", str(tmp_path / "alone"))
    alone = recovered("3epochs", recover_batch=15)
    assert processes == count
    assert any("interrupted" in note for note in notes) is killed
    # Sums over a step's samples are rounded in another order; Adam divides by their size, in 21 steps of up to 1e-3.
    for a, b in zip(alone.model.state_dict().values(), values.values(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-4)
    assert loss == pytest.approx(alone.report.after, rel=1e-3)


def test_a_model_for_other_inputs_is_refused() -> None:
    batches = torch.randn(20, 1, 8, 8).split(5)
    with pytest.raises(UsageError, match="the rewritten model does not run on inputs that the original takes"):
        recover(network(), nn.Conv2d(3, 8, 3), batches)
    with pytest.raises(UsageError, match=r"no time to train for(.|\n)*got: '3'"):
        recover(network(), network(), batches, 3)  # type: ignore[arg-type]


def test_the_result_shows_itself() -> None:
    result = recover(network(), network(), torch.randn(20, 1, 8, 8).split(5), "1epochs", outputs="logits")
    assert repr(result).startswith("<Recovered: held-out loss 0 → 0 in ")
    assert repr(result.report).startswith("<Recovery: held-out loss")
    assert "trained on" in str(result)
    assert result.notes[0][:30] in str(result).replace("\n", " ")
    assert "<table" in result._repr_html_()
