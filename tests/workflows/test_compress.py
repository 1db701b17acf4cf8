"""`compress`: one call from a model to files that serve; what was done is not done again."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pwrewrite
from pwrewrite.core.errors import OutputError, RefusedError, UsageError, VerificationError
from pwrewrite.engines import exporting, pt2_format
from pwrewrite.targets import storage
from pwrewrite.workflows.compress import Compressed

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(1, 3, 8, 8, generator=DRAW)
IMAGES = torch.randn(64, 3, 8, 8, generator=DRAW)


class Net(nn.Module):
    """Two convolutions with a norm between, and a head."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3)
        self.head, self.act = nn.Linear(24, 4), act

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.b(self.act(self.norm(self.a(x))))).mean((2, 3)))


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    model = Net(**options)
    model.norm.running_mean.normal_()
    return model.eval()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PWREWRITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compressed(model: nn.Module, out: Path | None = None, **options: Any) -> Compressed:
    return pwrewrite.compress(model, X, {"macs": 0.5}, options.pop("data", IMAGES.split(16)), out=out, **options)


def again(result: Compressed) -> list[str]:
    """The stages that were done in this run, without the one that always is."""
    return [name for name, seconds in result.report.stages.items() if seconds is not None and name != "measure"]


def test_a_folder_is_a_target_and_serves(tmp_path: Path) -> None:
    model = net()
    labels = model(IMAGES).argmax(1)
    result = compressed(model, tmp_path / "out", data=[(IMAGES, labels)], export="pt2")
    report = result.report
    assert report.after["macs"] <= 0.5 * report.before["macs"]
    assert report.budget.metrics["accuracy on held-out inputs"][0] == 1.0
    names = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.*")}
    assert names == {*report.files, "README.md", "report.json"}
    assert names >= {"model.safetensors", "plan.json", "export/model.pt2", "export/export.json"}
    with torch.no_grad():
        expected = result.model(IMAGES)
        torch.testing.assert_close(pwrewrite.load(tmp_path / "out", model)(IMAGES), expected)
        served = torch.export.load(tmp_path / "out" / "export" / "model.pt2").module()
        torch.testing.assert_close(served(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.model.modules())
    assert report.models is not None
    assert [each.macs for each in report.models] == [report.before["macs"], report.after["macs"]]
    assert [each.params for each in report.models] == [report.before["params"], report.after["params"]]
    assert set(report.done) >= {"a", "b"}
    text = result.to_html()
    assert '"kind":"compress"' in text
    assert all(f'"{report.done[path]}"' in text for path in "ab")
    assert not {"models", "done"} & set(report.to_dict())
    shown = str(result)
    for text in ("parameters", "MACs", "time", "macs", "loss", "export/model.pt2", "accuracy on held-out inputs"):
        assert text in shown
    assert len(shown.splitlines()) < 45
    assert json.loads((tmp_path / "out" / "report.json").read_text())["schema"] == "pwrewrite.compress/1"
    assert "held-out inputs" in repr(result)


def test_what_has_not_changed_is_not_done_again(tmp_path: Path) -> None:
    model = net()
    assert again(compressed(model, tmp_path / "first")) == ["rewrite", "fuse"]
    assert again(compressed(model, tmp_path / "second", export=["pt2"])) == ["export"]
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert again(compressed(model)) == []
    assert again(compressed(model, data=[IMAGES + 1])) == ["rewrite", "fuse"]
    assert again(compressed(model, exclude=["head"])) == ["rewrite", "fuse"]
    assert again(compressed(net(act=torch.tanh))) == ["rewrite", "fuse"]  # other code, the same weights
    with torch.no_grad():
        model.a.weight[0, 0, 0, 0] += 1
    assert again(compressed(model)) == ["rewrite", "fuse"]


def test_its_page_shows_what_other_budgets_lose_and_the_plan_among_them(tmp_path: Path) -> None:
    model = net()
    curves = []
    for first in (True, False):
        result = compressed(model)
        assert again(result) == (["rewrite", "fuse"] if first else [])
        curve = json.loads(result.report.to_html().partition('id="data">')[2].partition("</script>")[0])["frontier"]
        curves.append(curve)
        share, _, loss, layers = curve["chosen"]
        assert curve["cost"] == "macs"
        assert layers >= 1
        assert loss == pytest.approx(result.report.budget.predicted, rel=1e-3)
        assert share == pytest.approx(result.report.budget.reached["macs"], rel=1e-3)
        assert [point[0] for point in curve["points"]] == sorted((p[0] for p in curve["points"]), reverse=True)
        assert len(curve["points"]) > 3
        assert "frontier" not in result.report.to_dict()
    assert curves[0] == curves[1]


def test_int8_is_calibrated_on_the_same_inputs(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = compressed(net(), tmp_path / "out", data=iter(IMAGES.split(16)), export="onnx", int8=True)
    assert [each.format for each in result.report.exports] == ["onnx", "onnx int8"]
    assert result.report.exports[1].loss is not None
    assert "layers in int8" in str(result)


def test_an_engine_times_both_models() -> None:
    pytest.importorskip("onnxruntime")
    result = compressed(net(), engine="onnxruntime", best_effort=True)
    assert result.report.engine.startswith("onnxruntime ")
    assert result.report.seconds["after"] > 0
    assert "onnxruntime" not in result.report.engines
    assert "torch" in result.report.engines
    assert "time in torch" in str(result)
    assert again(compressed(net(), engine="onnxruntime", best_effort=True)) == []


def test_exports_run_on_as_many_threads_as_were_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    before = torch.get_num_threads()
    asked = before + 1
    result = compressed(net(), tmp_path / "out", export="onnx", threads=asked)
    assert result.report.exports[0].engine.endswith(f", {asked} threads")
    assert torch.get_num_threads() == before


def test_a_damaged_stage_is_done_again(cache: Path) -> None:
    model = net()
    compressed(model)
    (stage,) = cache.glob("compress/fuse-*")
    (stage / "model.safetensors").write_bytes(b"half")
    result = compressed(model)
    assert again(result) == ["fuse"]
    assert any("fuse was done again" in note for note in result.report.notes)
    assert again(compressed(model)) == []


def test_a_rewritten_folder_can_be_compressed_and_a_training_model_too(tmp_path: Path) -> None:
    model = net().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = compressed(model, tmp_path / "out")
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\nexample_inputs = torch.zeros(1, 3, 8, 8)\n"
        "model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))\n"
    )
    loaded = pwrewrite.load_target(str(tmp_path / "net.py"))
    pwrewrite.rewrite(loaded, passes=["insert-bottleneck"], rank=0.5, include=["2"]).save(tmp_path / "once")
    half = pwrewrite.load_target(str(tmp_path / "once"), base=str(tmp_path / "net.py"))
    result = pwrewrite.compress(half, None, {"macs": 0.8}, replan=True, out=tmp_path / "twice")
    assert next(op.path for op in result.plan.ops) == "2"
    with torch.no_grad():
        torch.testing.assert_close(pwrewrite.load(tmp_path / "twice", loaded.model)(X), result.model(X))


# ---------------------------------------------------------------------------------------------- interruptions

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import pwrewrite
from pwrewrite.core import files
from pwrewrite.engines import exporting, pt2_format
from pwrewrite.workflows import fuse_timing
sys.path.insert(0, sys.argv[2])
from test_compress import IMAGES, X, net

torch.set_num_threads(1)  # others would be lost in a fork
usual, root, fuse_timing._SECONDS, exporting.SECONDS = files._move_in, Path(sys.argv[1]), 0.02, 0.02

def run_here(self, program, folder, calls):  # which takes a process of its own otherwise
    name, served = *program.outputs.values(), torch.export.load(folder / "model.pt2").module()
    with torch.no_grad():
        return exporting.Run([{name: served(*args, **kwargs)} for args, kwargs in calls], 1.0, "here")

pt2_format.Pt2.run = run_here

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def run(point, out="out", cache="cache"):
    os.environ["PWREWRITE_CACHE"] = str(root / cache)
    moved = []
    def move(scratch, target):
        if point == ("before moving", len(moved)):
            die()
        usual(scratch, target)
        moved.append(target)
        if point == ("after moving", len(moved)):
            die()
    def progress(what, share):
        if point[0] == "step" and point[1] in what:
            die()
    files._move_in = move
    batches = IMAGES.split(16)
    result = pwrewrite.compress(net(), X, {"macs": 0.5}, batches, out=root / out, export=["pt2"], progress=progress)
    return [name for name, seconds in result.report.stages.items() if seconds is None]

steps = ("rewrite 1/4 · capturing", "calibrating", "fitting", "verifying", "fuse 2/4 · starting", "channels-last",
         "export 3/4 · starting", "pt2: writing", "pt2: running", "measure 4/4 · starting", "timing both")
moves = [("before moving", 0), ("after moving", 1), ("before moving", 0), ("after moving", 1), ("before moving", 0),
         ("after moving", 1), ("before moving", 0)]
points = [("step", step) for step in steps[:4]] + moves[:2] + [("step", step) for step in steps[4:6]] + moves[2:4]
points += [("step", step) for step in steps[6:9]] + moves[4:6] + [("step", step) for step in steps[9:]] + moves[6:]
run(("", 0), "whole", "other")  # first, so that no fork has to import what it needs
for point in points:
    child = os.fork()
    if not child:
        print("survived", point, run(point))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), point
    assert not (root / "out").exists(), point
print(run(("", 0)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL and fork")
def test_killed_anywhere_it_leaves_nothing_broken_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "['rewrite', 'fuse', 'export']\n"
    assert (tmp_path / "out" / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "whole"))
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".part")) == [
        "cache",
        "other",
        "out",
        "whole",
    ]


# --------------------------------------------------------------------------------------------------- refusals


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    out, others = tmp_path / "out", []

    def meanwhile(what: str, share: float | None) -> None:
        if what.startswith("measure") and not others:
            others.append(compressed(net(), out))

    with pytest.raises(OutputError, match="exists"):
        compressed(net(), out, progress=meanwhile)
    assert json.loads((out / "report.json").read_text())["files"] == others[0].report.files
    assert again(compressed(net(), out, force=True)) == []
    (out / "export").mkdir()
    (out / "export" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"did not write.*\n.*\n.*export/mine\.txt"):
        compressed(net(), out, force=True)


def test_a_full_disk(tmp_path: Path, cache: Path) -> None:
    compressed(net(), tmp_path / "first")
    before = {file: file.read_bytes() for file in (tmp_path / "first").iterdir()}
    for stage in cache.glob("compress/*"):
        stage.rename(tmp_path / stage.name)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"(?i)cannot write.*file too large"):
            compressed(net(), tmp_path / "first", force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file: file.read_bytes() for file in (tmp_path / "first").iterdir()} == before
    assert list(cache.glob("compress/*")) == []
    assert again(compressed(net(), tmp_path / "first", force=True)) == ["rewrite", "fuse"]


def test_a_full_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = storage._save_weights

    def full(model: nn.Module, path: Path) -> None:
        if path.is_relative_to(cache):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(model, path)

    monkeypatch.setattr(storage, "_save_weights", full)
    result = compressed(net(), tmp_path / "out")
    assert any("is full: rewrite was done twice" in note for note in result.report.notes)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert list(cache.glob("compress/*")) == []


@pytest.mark.parametrize("place", ["/proc/self/fd/x", "file/x"])
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PWREWRITE_CACHE", str(tmp_path / place))
    result = compressed(net(), tmp_path / "out")
    assert any("cannot be written" in note and "begins anew" in note for note in result.report.notes)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", "off")
    assert again(compressed(net())) == again(compressed(net())) == ["rewrite", "fuse"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody may write in")
def test_a_place_that_cannot_be_written_is_refused_before_the_work() -> None:
    with pytest.raises(OutputError):
        compressed(net(), Path("/proc/self/out"), progress=lambda what, share: pytest.fail("the work began"))


def test_a_missing_extra_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exporting.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'openvino needs openvino.*\n.*pip install "pwrewrite\[openvino\]"'):
        compressed(net(), tmp_path / "x", export="openvino", progress=lambda what, share: pytest.fail("the work began"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"export": "pt2"}, "no place to export"),
        ({"export": "tflite", "out": "x"}, "no export format"),
        ({"static": True}, "--static goes with --export"),
        ({"int8": True, "export": "pt2", "out": "x"}, "--int8 is for onnx and openvino"),
        ({"limits": 0.5, "passes": ["insert-bottleneck"]}, "goes with passes"),
        ({"size": 3}, "has no option 'size'"),
    ],
)
def test_wrong_usage(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pwrewrite.compress(net(), X, {"macs": 0.5}, IMAGES, **options)


def test_without_a_budget_and_beyond_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no budget"):
        pwrewrite.compress(net(), X, None)
    with pytest.raises(RefusedError):
        pwrewrite.compress(net(), X, {"macs": 0.001}, IMAGES, out=tmp_path / "out")
    with pytest.raises(VerificationError):
        compressed(net(), tmp_path / "out", max_error=1e-9)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RefusedError, match="meta"):
        compressed(net().to("meta"))


def test_an_interrupt_leaves_the_stages_that_are_whole(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pt2_format.Pt2, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compressed(net(), tmp_path / "out", export=["pt2"])
    assert not [file for file in tmp_path.iterdir() if file != cache]
    assert sorted(stage.name.partition("-")[0] for stage in cache.glob("compress/*")) == ["fuse", "rewrite"]
    assert again(compressed(net(), tmp_path / "out", export=["pt2"])) == ["export"]


def test_an_export_that_differs_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = pt2_format.Pt2.run

    def wrong(self: pt2_format.Pt2, program: exporting.Program, *_: Any) -> exporting.Run:
        return exporting.Run([{name: torch.ones(2, 4) for name in program.outputs.values()}] * 2, 1.0, "nothing")

    monkeypatch.setattr(pt2_format.Pt2, "run", wrong)
    for _ in range(2):  # what is left of it is not taken for whole the second time
        with pytest.raises(VerificationError, match="the pt2 export does not do what the model does"):
            compressed(net(), tmp_path / "out", export=["pt2"])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(pt2_format.Pt2, "run", usual)
    result = compressed(net(), tmp_path / "out", export=["pt2"])
    assert again(result) == ["export"]
    assert not [note for note in result.report.notes if "export" in note or "stage" in note]
