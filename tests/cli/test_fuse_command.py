"""`pwrewrite fuse`: what it shows, saves and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from pwrewrite.capturing import capture
from pwrewrite.cli.app import app
from pwrewrite.workflows.fuse import fuse, traffic

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.down, self.act = nn.Conv2d(16, 16, 1), nn.Mish()

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.act(x + self.down(x)).mean((2, 3))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["fuse", *args])


def test_shows_and_saves(folder: Path) -> None:
    done = run("net.py", "--input", "1x3x12x12", "--out", "fused", "--benchmark")
    assert done.exit_code == 0, done.output
    for said in (
        "1 norm folded, 1 layer fused, 1 sum of branches merged, channels_last",
        "latency",
        "latency, frozen",
        "kernels",
        "float64 reference",
        "no-kernel",
    ):
        assert said in done.output
    assert sorted(p.name for p in (folder / "fused").iterdir()) == [
        "README.md", "model.safetensors", "plan.json", "report.json",
    ]  # fmt: skip
    shown = CliRunner().invoke(app, ["analyze", "fused", "--trust-target"])
    assert shown.exit_code == 0, shown.output


def test_the_latency_in_an_engine(folder: Path) -> None:
    done = run("net.py", "--input", "1x3x12x12", "--benchmark", "--engine", "torch", "--format", "json")
    assert done.exit_code == 0, done.output
    fusing = json.loads(done.stdout)["fusing"]
    assert fusing["engine"].startswith("torch ")
    assert fusing["seconds_before"] > 0 < fusing["seconds_after"]
    assert "torch" not in fusing["engines"]
    assert run("net.py", "--input", "1x3x12x12", "--engine", "torch").exit_code == 2
    assert run("net.py", "--input", "1x3x12x12", "--benchmark", "--engine", "tf").exit_code == 2


def test_what_cannot_be_frozen_is_said(folder: Path) -> None:
    code = MODEL.replace("return self.act", "x = x if x.sum() > 0 else -x\n        return self.act")
    (folder / "net.py").write_text(code)
    done = run("net.py", "--input", "1x3x12x12", "--benchmark")
    assert done.exit_code == 0, done.output
    assert "latency, frozen" not in done.output
    assert "not measured frozen" in done.output
    assert "needs values" in " ".join(done.output.split())
    done = run("net.py", "--input", "1x3x12x12", "--benchmark", "--format", "json")
    assert "needs values" in json.loads(done.stdout)["fusing"]["not_frozen"]
    done = run("net.py", "--input", "1x3x12x12", "--benchmark", "--format", "markdown")
    assert "not measured frozen" in done.stdout


def test_forms_and_passes(folder: Path) -> None:
    done = run("net.py", "--input", "1x3x12x12", "--passes", "fold-batch-norm", "--format", "json", "--no-verify")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["fusing"]["done"] == {"fold": 1}
    assert data["fusing"]["after"]["kernels"] < data["fusing"]["before"]["kernels"]
    done = run("net.py", "--input", "1x3x12x12", "--format", "markdown", "--output", "report.md")
    assert done.exit_code == 0, done.output
    assert "| bytes moved |" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["net.py", "--passes", "fold"], 2, "fold-batch-norm"),
        (["net.py", "--no-verify", "--out", "x"], 2, "saves nothing"),
        (["nett.py"], 2, "net.py"),
        (["net.py", "--input", "1x3x12x12", "--passes", "remove-inference-noise"], 1, "nothing to fuse"),
    ],
)
def test_refusals(folder: Path, args: list[str], code: int, said: str) -> None:
    done = run(*args)
    assert done.exit_code == code, done.output
    assert said in done.output
    assert not (folder / "x").exists()


def test_nothing_to_fuse_says_why(folder: Path) -> None:
    (folder / "odd.py").write_text(
        "from torch import nn\nclass Odd(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(*(nn.BatchNorm2d(3, track_running_stats=False) for _ in range(5)))\n"
    )
    few, all_of_them = (run("odd.py", "--input", "1x3x8x8", *more) for more in ((), ("--all",)))
    assert few.exit_code == all_of_them.exit_code == 1
    assert "2 more, which --all names" in few.output
    assert "4: " in all_of_them.output
    assert "--all" not in all_of_them.output


def test_traffic_by_hand() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.ReLU()).eval()
    x = torch.zeros(1, 2, 4, 4)
    weights, image, out = (6 + 3) * 4, 32 * 4, 48 * 4
    before = traffic(capture(model, x))
    assert before == {"nodes": 2, "kernels": 2, "bytes_moved": weights + image + out + 2 * out}
    after = traffic(capture(fuse(model, x, verify=False).model, x))
    assert after == {"nodes": 2, "kernels": 1, "bytes_moved": weights + image + out}
