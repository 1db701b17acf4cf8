"""`plan` and `rewrite` under a budget, as a person types them: what is shown and saved, and what is refused."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from messages import messages
from rich.cells import cell_len
from safetensors.torch import save_file
from typer.testing import Result

import pwrewrite

Run = Callable[..., Result]
HALF = ("--budget", "macs=0.5", "--calibration", "x.npy")

DATA = """
import torch

def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        yield torch.randn(16, 3, 32, 32, generator=generator)

def nothing():
    return []

def wrong():
    return [torch.zeros(4, 1, 32, 32)]

class Interrupted:
    passes = 0

    def __iter__(self):
        Interrupted.passes += 1
        for number, batch in enumerate(8 * list(batches())):
            if Interrupted.passes == 3 and number == 8:
                raise KeyboardInterrupt
            yield batch

interrupted = Interrupted()

def odd():
    return [{"pixels": batch, "path": "a.png", "class": torch.arange(len(batch)) % 10} for batch in batches()]

def inputs_of(batch):
    return batch["pixels"], batch["class"]

def normalised(batch):
    return torch.from_numpy(batch).float() / 255

def channels_lost(batch):
    return torch.from_numpy(batch)[:, 0]

def failing(batch):
    raise ZeroDivisionError("no batch today")

def parameters(model):
    return sum(p.numel() for p in model.parameters()) / 2938

def broken(model):
    raise FileNotFoundError("no such test set")

def words(model):
    return "good"

def not_a_number(model):
    return float("nan")

def without_model():
    return 1.0
"""


@pytest.fixture(autouse=True)
def data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration inputs of all kinds beside `net.py`, and a cache of its own."""
    monkeypatch.setenv("PWREWRITE_CACHE", str(folder.parent / f"{folder.name}-cache"))
    (folder / "data.py").write_text(DATA)
    x = np.random.default_rng(0).standard_normal((64, 3, 32, 32), dtype=np.float32)
    labels = np.arange(64) % 10
    np.save(folder / "x.npy", x)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "few.npy", labels[:63])
    np.savez(folder / "x.npz", images=x, labels=labels)
    save_file({"images": torch.from_numpy(x)}, folder / "x.safetensors")
    np.save(folder / "grey.npy", x[:, :1])
    np.save(folder / "last.npy", x.transpose(0, 2, 3, 1))
    np.save(folder / "bytes.npy", (x * 20 + 128).clip(0, 255).astype(np.uint8))
    np.save(folder / "whole.npy", (x * 20 + 128).clip(0, 255).round())
    np.save(folder / "classes.npy", labels)
    np.save(folder / "none.npy", x[:0])
    (folder / "noise.npy").write_bytes(b"not an array")
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        bad = x.copy()
        bad[40, 1, 2, 3] = value
        np.save(folder / f"{name}.npy", bad)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts)


# ------------------------------------------------------------------------------------------------ when all is well


def test_a_rewrite_within_a_budget_is_shown_and_saved(run: Run, folder: Path) -> None:
    result = run("rewrite", "net.py", *HALF, "--out", "out")
    assert result.exit_code == 0, result.output
    assert messages(result.stderr) == "saved in out\n"
    text = result.stdout
    assert text.index("parameters") < text.index("Budget") < text.index("Structure  verified") < text.index("Layers")
    assert re.search(r"^macs +at most 0\.5; [34]\d\.\d% of the original$", text, re.MULTILINE)
    assert re.search(r"^calibration +51 inputs; factors, biases and norms fitted$", text, re.MULTILINE)
    row = r"predicted loss \S+ \(KL divergence in nats; random weights: says nothing about a trained model\)"
    assert re.search(row, " ".join(text.split()))
    measured = r"measured loss \S+ \(KL .* outputs taken for logits\) on 13 held-out inputs; same class for \S+%"
    assert re.search(measured, " ".join(text.split()))
    data = json.loads((folder / "out" / "report.json").read_text())
    assert data["after"]["macs"] <= 0.5 * data["before"]["macs"]
    budget = data["budget"]
    assert budget["limits"] == {"macs": "0.5"}
    assert budget["reached"]["macs"] == data["after"]["macs"] / data["before"]["macs"]
    assert (budget["sensitivity"], budget["refit"], budget["samples"], budget["held_out"]) == ("loss", "full", 51, 13)
    assert budget["measured_loss"] > 0
    assert budget["predicted_loss"] > 0
    assert 0 <= budget["agreement"] <= 1
    plan = json.loads((folder / "out" / "plan.json").read_text())
    assert plan["budget"]["limits"] == {"macs": "0.5"}
    loaded = pwrewrite.load(folder / "out", trust_target=True)
    assert pwrewrite.analyze(loaded, torch.zeros(1, 3, 32, 32)).macs == data["after"]["macs"]


def test_batches_of_any_kind_go_through_a_function(run: Run) -> None:
    odd = ("rewrite", "net.py", "--budget", "macs=0.5", "--calibration", "data.py:odd", "--format", "json")
    refused = run(*odd)
    assert refused.exit_code == 2
    assert "--batch" in refused.stderr
    result = run(*odd, "--batch", "data.py:inputs_of", "--outputs", "logits")
    assert result.exit_code == 0, result.output
    budget = json.loads(result.stdout)["budget"]
    assert list(budget["metrics"]) == ["accuracy on held-out inputs"]
    assert budget["outputs"] == "logits"
    assert run(*HALF, "--batch", "data.py:nothing_here").exit_code == 2
    assert run("plan", "net.py", "--budget", "macs=0.5", "--outputs", "logits").exit_code == 2


def test_a_missed_time_saves_nothing(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pwrewrite.engines.timing import Timing
    from pwrewrite.workflows import budget, end_to_end

    monkeypatch.setattr("pwrewrite.planning.planner.time_plan", lambda *given: 0.5)
    monkeypatch.setattr(
        "pwrewrite.planning.latency.LatencyTable.times",
        lambda self, shape, variants: [1e-4 if not variant.form else 1e-5 for variant in variants],
    )
    monkeypatch.setattr(end_to_end, "time_models", lambda *given, **how: [Timing(1.0, 0.01), Timing(0.72, 0.01)])
    arguments = ("rewrite", "net.py", "--budget", "latency=99%", "--calibration", "x.npy", "--out", "out")
    for module in (budget, end_to_end):
        monkeypatch.setattr(module, "MEASURED", 0.5)
    missed = run(*arguments)
    assert missed.exit_code == 1, missed.output
    assert "latency=0.99 is missed" in missed.stderr
    assert not (folder / "out").exists()
    taken = run(*arguments, "--best-effort", "--threads", "1")
    assert taken.exit_code == 0, taken.output
    assert (folder / "out").exists()
    assert "latency=0.99 is missed" in " ".join(taken.stdout.split())


def test_times_in_an_engine(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pwrewrite.engines.choosing import Times
    from pwrewrite.engines.timing import Timing
    from pwrewrite.workflows import end_to_end

    beside = Times({"frozen": [Timing(2.0, 0.0), Timing(1.0, 0.0)]}, {}, ("not measured in openvino: needs openvino",))
    monkeypatch.setattr(end_to_end, "time_everywhere", lambda *given: beside)
    data = json.loads(run("rewrite", "net.py", *HALF, "--engine", "torch", "--format", "json").stdout)
    assert data["budget"]["engine"].startswith("torch ")
    assert data["budget"]["latency"]["after"] > 0
    assert data["budget"]["engines"] == {"frozen": [2.0, 1.0]}
    assert beside.notes[0] in data["notes"]
    idle = run("plan", "net.py", *HALF, "--engine", "torch")
    assert idle.exit_code == 2
    assert "--gate latency" in idle.stderr


def test_the_report_comes_in_every_form(run: Run) -> None:
    data = json.loads(run("rewrite", "net.py", *HALF, "--format", "json").stdout)
    assert data["schema"] == "pwrewrite.report/1"
    assert data["budget"]["metrics"] == {}
    text = run("rewrite", "net.py", *HALF, "--format", "markdown").stdout
    assert "## Budget" in text
    assert re.search(r"^- Macs: at most 0\.5; ", text, re.MULTILINE)


@pytest.mark.parametrize("width", ["100", "60"])
def test_the_tables_fit(run: Run, width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    for arguments in (("rewrite", "net.py", *HALF), ("plan", "net.py", "--pareto", "--calibration", "x.npy")):
        assert max(map(cell_len, run(*arguments).stdout.splitlines())) <= int(width)


@pytest.mark.parametrize("source", ["x.npy", "x.npz", "x.safetensors", "data.py:batches"])
def test_calibration_data_of_every_kind(run: Run, source: str) -> None:
    result = run("plan", "net.py", "--budget", "macs=0.5", "--calibration", source, "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["budget"]["samples"] == 51
    assert data["ops"]


def test_bytes_are_preprocessed_and_whole_numbers_are_noted(run: Run) -> None:
    half = ("--budget", "macs=0.5")
    made = run("plan", "net.py", *half, "--calibration", "bytes.npy", "--preprocess", "data.py:normalised")
    assert made.exit_code == 0, made.output
    noted = run("plan", "net.py", *half, "--calibration", "whole.npy")
    assert noted.exit_code == 0, noted.output
    assert "whole numbers up to" in " ".join(noted.stdout.split())


def test_an_unreadable_image_among_many_is_left_out(run: Run, folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (folder / "images").mkdir()
    generator = np.random.default_rng(1)
    for number in range(24):
        pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / "images" / f"{number:02}.png")
    (folder / "images" / "07.png").write_bytes(b"no image")
    result = run("plan", "net.py", "--budget", "macs=0.5", "--calibration", "images")
    assert result.exit_code == 0, result.output
    assert "07.png" in result.stdout


def test_only_so_many_inputs(run: Run) -> None:
    result = run("plan", "net.py", *HALF, "--calibration-size", "20", "--format", "json")
    assert json.loads(result.stdout)["budget"]["samples"] == 16
    more = run("plan", "net.py", *HALF, "--calibration-size", "100")
    assert "there are 64" in " ".join(more.stdout.split())


def test_several_budgets_and_what_goes_with_them(run: Run) -> None:
    result = run(
        "rewrite", "net.py", *HALF, "--budget", "params=80%", "--forms", "1x1", "--exclude", "head",
        "--refit", "bias", "--multiple", "2", "--format", "json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["after"]["macs"] <= 0.5 * data["before"]["macs"]
    assert data["after"]["params"] <= 0.8 * data["before"]["params"]
    assert data["budget"]["refit"] == "bias"
    assert {edit["path"] for edit in data["edits"]} <= {"stem", "body.1"}
    assert {edit["pass"] for edit in data["edits"]} <= {"insert-bottleneck", "insert-reduction", "insert-expansion"}


def test_without_calibration_the_weights_decide(run: Run) -> None:
    result = run("rewrite", "net.py", "--budget", "macs=0.5")
    assert result.exit_code == 0, result.output
    assert "by the change of each layer's weights, without calibration inputs" in result.stdout
    assert "measured loss" not in result.stdout


def test_a_plan_is_written_and_carried_out(run: Run, folder: Path) -> None:
    planned = run("plan", "net.py", *HALF, "--out", "plan.json")
    assert planned.exit_code == 0, planned.output
    assert messages(planned.stderr) == "written to plan.json\n"
    assert "to be fitted" in planned.stdout
    assert "measured loss" not in planned.stdout
    at_once = json.loads(run("rewrite", "net.py", *HALF, "--format", "json").stdout)
    later = run("rewrite", "net.py", "--plan", "plan.json", "--calibration", "x.npy", "--format", "json")
    assert later.exit_code == 0, later.output
    data = json.loads(later.stdout)
    assert data["after"] == at_once["after"]
    assert data["budget"]["limits"] == {"macs": "0.5"}
    assert data["budget"]["measured_loss"] == pytest.approx(at_once["budget"]["measured_loss"], rel=1e-2)
    plain = json.loads(run("rewrite", "net.py", "--plan", "plan.json", "--format", "json").stdout)
    assert plain["after"] == data["after"]
    assert "budget" not in plain


def test_the_same_command_gives_the_same_plan(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", "off")
    for place in ("one.json", "two.json"):
        assert run("plan", "net.py", *HALF, "--out", place).exit_code == 0
    assert (folder / "one.json").read_bytes() == (folder / "two.json").read_bytes()


def test_metrics_and_labels_are_told_before_and_after(run: Run) -> None:
    result = run("rewrite", "net.py", *HALF, "--metric", "data.py:parameters", "--labels", "labels.npy")
    assert result.exit_code == 0, result.output
    assert re.search(r"^parameters +1 → 0\.\d+ \(-0\.\d+\)$", result.stdout, re.MULTILINE)
    assert re.search(r"^accuracy on held-out inputs +\S+ → \S+ \(\S+\)$", result.stdout, re.MULTILINE)


def test_a_dry_run_saves_nothing(run: Run, folder: Path) -> None:
    before = names(folder)
    result = run("rewrite", "net.py", *HALF, "--out", "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "would be rewritten" in result.stdout
    assert "predicted loss" in result.stdout
    assert messages(result.stderr) == "nothing was done: this is a dry run\n"
    assert names(folder) == before


def test_a_full_budget_changes_nothing(run: Run, folder: Path) -> None:
    planned = run("plan", "net.py", "--budget", "macs=1", "--calibration", "x.npy")
    assert planned.exit_code == 0
    assert "nothing would be rewritten" in planned.stdout
    result = run("rewrite", "net.py", "--budget", "macs=100%", "--calibration", "x.npy", "--out", "out")
    assert result.exit_code == 1
    assert "within the budget as it is" in result.stderr
    assert not (folder / "out").exists()


# ------------------------------------------------------------------------------------------------- the frontier


@pytest.mark.parametrize("form", ["table", "markdown", "json"])
def test_the_frontier_is_shown(run: Run, form: str) -> None:
    result = run("plan", "net.py", "--pareto", "--calibration", "x.npy", "--format", form)
    assert result.exit_code == 0, result.output
    assert messages(result.stderr) == ""
    if form == "json":
        data = json.loads(result.stdout)
        assert (data["kind"], data["sensitivity"]) == ("macs", "loss")
        losses, macs = ([point[name] for point in data["points"]] for name in ("loss", "macs"))
        assert losses == sorted(losses)
        assert macs == sorted(macs, reverse=True)
        assert (losses[0], macs[0]) == (0, data["original"]["macs"])
    else:
        assert "100.0%" in result.stdout
        assert "least predicted loss at every budget, by the change of the loss" in result.stdout.lower()
        assert "random weights: says nothing about a trained model" in " ".join(result.stdout.split())


def test_the_frontier_is_written(run: Run, folder: Path) -> None:
    made = {}
    for kind in ("csv", "svg", "json", "md"):
        result = run("plan", "net.py", "--pareto", "--calibration", "x.npy", "--output", f"frontier.{kind}")
        assert result.exit_code == 0, result.output
        assert (result.stdout, result.stderr) == ("", f"written to frontier.{kind}\n")
        made[kind] = (folder / f"frontier.{kind}").read_text()
    points = json.loads(made["json"])["points"]
    rows = list(csv.DictReader(made["csv"].splitlines()))
    assert [(int(row["macs"]), int(row["layers"])) for row in rows] == [(p["macs"], p["layers"]) for p in points]
    assert [float(row["loss"]) for row in rows] == pytest.approx([point["loss"] for point in points], rel=1e-4)
    assert float(rows[0]["macs_share"]) == 1
    assert len(ElementTree.fromstring(made["svg"]).findall("{http://www.w3.org/2000/svg}circle")) == len(points)
    assert made["md"].startswith("# ")
    assert made["md"].count("\n|") >= len(points)


def test_the_frontier_within_other_budgets(run: Run) -> None:
    limited = ("--pareto", "--calibration", "x.npy", "--budget", "params=0.7", "--format", "json")
    data = json.loads(run("plan", "net.py", *limited).stdout)
    assert data["points"]
    assert all(point["params"] <= 0.7 * data["original"]["params"] for point in data["points"])


# --------------------------------------------------------------------------------------------------- by a metric


def test_the_smallest_model_that_keeps_a_metric(run: Run, folder: Path) -> None:
    drop = ("--max-drop", "20%", "--metric", "data.py:parameters")
    result = run("plan", "net.py", *drop, "--calibration", "x.npy", "--out", "plan.json")
    assert result.exit_code == 0, result.output
    told = re.search(r"^parameters +1 → (0\.\d+)", result.stdout, re.MULTILINE)
    assert told is not None
    assert 0.8 <= float(told[1]) < 1
    assert "tried" in result.stdout
    model = pwrewrite.load_target(str(folder / "net.py")).model
    plan = pwrewrite.Plan.read(folder / "plan.json")
    changed = pwrewrite.apply(model, plan)
    assert sum(p.numel() for p in changed.parameters()) == pytest.approx(float(told[1]) * 2938, abs=1)


def test_no_smaller_model_keeps_a_metric(run: Run, folder: Path) -> None:
    drop = ("--max-drop", "0", "--metric", "data.py:parameters")
    result = run("plan", "net.py", *drop, "--calibration", "x.npy", "--out", "plan.json")
    assert result.exit_code == 1
    assert "no smaller model keeps the metric" in result.stderr
    assert "of the macs" in result.stderr
    assert not (folder / "plan.json").exists()


# ------------------------------------------------------------------------------------------------------ bad input

BUDGET = ("--budget", "macs=0.5")
BAD: dict[str, tuple[str, tuple[str, ...], int, str]] = {
    # name: (command, arguments after the target, exit code, what stderr says)
    "ratio above one": ("plan", ("--budget", "macs=1.5"), 2, "a ratio above 1"),
    "ratio below zero": ("plan", ("--budget", "macs=-0.5"), 2, "not above 0"),
    "ratio zero": ("rewrite", ("--budget", "params=0"), 2, "not above 0"),
    "percent above a hundred": ("rewrite", ("--budget", "params=120%"), 2, "a ratio above 1"),
    "unknown kind": ("plan", ("--budget", "mac=0.5"), 2, "did you mean macs?"),
    "unknown unit": ("plan", ("--budget", "macs=5ms"), 2, "ms is a unit of latency"),
    "several in one": ("plan", ("--budget", "params=9k, macs=0.5"), 2, "by itself: params=9k and macs=0.5"),
    "no number": ("plan", ("--budget", "macs=half"), 2, "is not a number"),
    "no limit": ("plan", ("--budget", "macs"), 2, "KIND=LIMIT"),
    "a kind twice": ("plan", (*BUDGET, "--budget", "flops=0.4"), 2, "more than once"),
    "too small": ("rewrite", ("--budget", "macs=0.001"), 1, "at least macs=0."),
    "with a pass": ("rewrite", (*BUDGET, "--pass", "insert-bottleneck"), 2, "--pass goes with passes"),
    "with a rank": ("plan", (*BUDGET, "--rank", "0.5"), 2, "--rank goes with passes"),
    "with a set": ("plan", (*BUDGET, "--set", "stem=keep"), 2, "--set goes with passes"),
    "with fresh weights": ("rewrite", (*BUDGET, "--init", "fresh"), 2, "--init goes with passes"),
    "with a plan": ("rewrite", (*BUDGET, "--plan", "plan.json"), 2, "--plan and --budget exclude each other"),
    "a plan with forms": (
        "rewrite", ("--plan", "plan.json", "--calibration", "x.npy", "--forms", "1x1"), 2, "--plan and --forms exclude",
    ),
    "a plan with layers": (
        "rewrite", ("--plan", "plan.json", "--calibration", "x.npy", "--include", "stem"), 2,
        "--plan and --include exclude",
    ),
    "calibration alone": ("rewrite", ("--calibration", "x.npy"), 2, "there is no budget"),
    "forms alone": ("plan", ("--forms", "1x1"), 2, "--forms goes with --budget or --calibration"),
    "labels without inputs": ("rewrite", (*BUDGET, "--labels", "labels.npy"), 2, "--labels goes with --calibration"),
    "size without inputs": ("rewrite", (*BUDGET, "--calibration-size", "9"), 2, "goes with --calibration"),
    "refit without inputs": ("rewrite", (*BUDGET, "--refit", "full"), 2, "--refit goes with --calibration"),
    "loss without inputs": ("plan", (*BUDGET, "--sensitivity", "loss"), 2, "needs calibration inputs"),
    "unknown form": ("plan", (*BUDGET, "--forms", "1x1,tucker"), 2, "no form 'tucker'"),
    "no form": ("plan", (*BUDGET, "--forms", ""), 2, "no form ''"),
    "unknown layer": ("plan", (*BUDGET, "--include", "layer9.*"), 2, "matches no layer"),
    "layer error above one": ("plan", (*BUDGET, "--max-layer-error", "3"), 2, "--max-layer-error"),
    "drop without a metric": ("plan", ("--max-drop", "1%"), 2, "--max-drop needs a --metric"),
    "drop that is none": ("plan", ("--max-drop", "some", "--metric", "data.py:parameters"), 2, "--max-drop makes no"),
    "drop below zero": ("plan", ("--max-drop", "-1%", "--metric", "data.py:parameters"), 2, "--max-drop makes no"),
    "metric of a plan": ("plan", (*BUDGET, "--metric", "data.py:parameters"), 2, "add --max-drop"),
    "labels of a plan": ("plan", (*HALF, "--labels", "labels.npy"), 2, "give it to rewrite"),
    "metric that raises": ("rewrite", (*HALF, "--metric", "data.py:broken"), 2, "no such test set"),
    "metric of words": ("rewrite", (*HALF, "--metric", "data.py:words"), 2, "returned no number"),
    "metric that is none": ("rewrite", (*HALF, "--metric", "data.py:not_a_number"), 2, "returned nan"),
    "metric of nothing": ("rewrite", (*HALF, "--metric", "data.py:without_model"), 2, "without_model"),
    "metric not there": ("rewrite", (*HALF, "--metric", "data.py:parametres"), 2, "parameters"),
    "labels too few": ("rewrite", (*HALF, "--labels", "few.npy"), 2, "63 labels were given"),
    "labels not there": ("rewrite", (*HALF, "--labels", "no.npy"), 2, "no such file"),
    "labels of floats": ("rewrite", (*HALF, "--labels", "x.npy"), 2, "holds no labels"),
    "frontier and plan": ("plan", ("--pareto", "--out", "plan.json"), 2, "--pareto makes no plan"),
    "frontier and drop": (
        "plan", ("--pareto", "--max-drop", "1%", "--metric", "data.py:parameters"), 2, "exclude each other",
    ),
    "frontier and its kind": ("plan", ("--pareto", *BUDGET), 2, "every budget of MACs"),
    "frontier nowhere": ("plan", ("--pareto", "--output", "no/such/f.csv"), 2, "does not exist"),
    "no such inputs": ("plan", (*BUDGET, "--calibration", "no.npy"), 2, "no such file or folder"),
    "inputs that are no array": ("plan", (*BUDGET, "--calibration", "noise.npy"), 2, "noise.npy"),
    "inputs of another shape": ("plan", (*BUDGET, "--calibration", "grey.npy"), 2, "N×3×H×W"),
    "inputs with channels last": ("plan", (*BUDGET, "--calibration", "last.npy"), 2, "the channels come last"),
    "inputs of bytes": ("plan", (*BUDGET, "--calibration", "bytes.npy"), 2, "--preprocess"),
    "inputs that are classes": ("plan", (*BUDGET, "--calibration", "classes.npy"), 2, "another shape"),
    "inputs with NaN": ("plan", (*BUDGET, "--calibration", "nan.npy"), 2, "hold NaN in image 8 of batch 1"),
    "inputs with Inf": ("rewrite", (*BUDGET, "--calibration", "inf.npy"), 2, "hold Inf in image 8 of batch 1"),
    "no inputs in a file": ("plan", (*BUDGET, "--calibration", "none.npy"), 2, "none.npy"),
    "no inputs": ("plan", (*BUDGET, "--calibration", "data.py:nothing"), 2, "are empty"),
    "wrong inputs in code": ("plan", (*BUDGET, "--calibration", "data.py:wrong"), 2, "another shape"),
    "code without a name": ("plan", (*BUDGET, "--calibration", "data.py"), 2, "data.py:NAME"),
    "code with another name": ("plan", (*BUDGET, "--calibration", "data.py:batchs"), 2, "batches"),
    "preprocess that raises": (
        "plan", (*BUDGET, "--calibration", "bytes.npy", "--preprocess", "data.py:failing"), 2, "no batch today",
    ),
    "preprocess that loses channels": (
        "plan", (*BUDGET, "--calibration", "bytes.npy", "--preprocess", "data.py:channels_lost"), 2, "another shape",
    ),
    "preprocess of code": (
        "plan", (*BUDGET, "--calibration", "data.py:batches", "--preprocess", "data.py:normalised"), 2, "is for files",
    ),
    "output nowhere": ("rewrite", (*HALF, "--output", "no/such/report.txt"), 2, "does not exist"),
    "plan nowhere": ("plan", (*HALF, "--out", "no/such/plan.json"), 2, "does not exist"),
    "folder is a file": ("rewrite", (*HALF, "--out", "net.py"), 2, "the output folder is a file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_plain_words(run: Run, folder: Path, case: str) -> None:
    command, arguments, code, said = BAD[case]
    if "plan.json" in arguments and command == "rewrite":
        (folder / "plan.json").write_text('{"schema": "pwrewrite.plan/1", "ops": [], "skipped": []}')
    out = ("--out", "out") if "--out" not in arguments and "--pareto" not in arguments else ()
    before = names(folder)
    result = run(command, "net.py", *arguments, *out)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert messages(result.stderr).startswith("error: ")
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert names(folder) == before


@pytest.mark.parametrize("option", ["--sensitivity", "--refit", "--gate"])
def test_unknown_values_of_options(run: Run, option: str) -> None:
    result = run("plan", "net.py", *HALF, option, "best")
    assert result.exit_code == 2
    assert "best" in result.stderr


def test_places_are_looked_at_before_any_work(run: Run, folder: Path) -> None:
    (folder / "net.py").write_text("raise SystemError('the model was loaded')")
    for command, option, place, said in (
        ("rewrite", "--out", "data.py", "the output folder is a file"),
        ("rewrite", "--output", "no/such/report.txt", "does not exist"),
        ("plan", "--out", "no/such/plan.json", "does not exist"),
        ("plan", "--output", "no/such/report.txt", "does not exist"),
    ):
        result = run(command, "net.py", *HALF, option, place)
        assert result.exit_code == 2, result.output
        assert said in result.stderr


def test_an_interrupted_calibration_goes_on(run: Run, folder: Path) -> None:
    arguments = ("--budget", "macs=0.5", "--calibration", "data.py:interrupted", "--out", "plan.json")
    first = run("plan", "net.py", *arguments)
    assert first.exit_code == 130
    assert "interrupted" in first.stderr
    assert not (folder / "plan.json").exists()
    cache = folder.parent / f"{folder.name}-cache" / "statistics"
    assert len(list(cache.glob("*.safetensors"))) == 1
    (folder / "data.py").write_text(DATA.replace("passes == 3", "passes == 99"))
    second = run("plan", "net.py", *arguments)
    assert second.exit_code == 0, second.output
    assert len(list(cache.glob("*.safetensors"))) == 1
