"""`pwrewrite export`: what it prints, its exit codes, and that nothing half-written stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_a_format_of_exports_given_as_the_form_of_the_report(run: Run) -> None:
    result = run("export", "net.py", "--format", "pt2", "--out", "out")
    assert result.exit_code == 2
    assert "--to pt2" in result.stderr


def test_a_file_for_a_runtime(run: Run, folder: Path) -> None:
    result = run("export", "net.py", "--to", "onnx,pt2", "--out", "out", "--format", "json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert [each["format"] for each in data["formats"]] == ["onnx", "pt2"]
    assert data["inputs"] == {"x": "batch×3×32×32 float32"}
    assert data["passed"]
    assert sorted(file.name for file in (folder / "out").iterdir()) == ["export.json", "model.onnx", "model.pt2"]
    again = run("export", "net.py", "--to", "pt2", "--out", "out")
    assert again.exit_code == 2
    assert "--force" in again.stderr
    forced = run("export", "net.py", "--to", "pt2", "--out", "out", "--force")
    assert forced.exit_code == 0
    assert "pt2: every output agrees" in forced.stdout
    assert sorted(file.name for file in (folder / "out").iterdir()) == ["export.json", "model.pt2"]


def test_a_saved_folder(run: Run) -> None:
    saved = run("rewrite", "net.py", "--pass", "insert-bottleneck", "--rank", "4", "--out", "small")
    assert saved.exit_code == 0, saved.stderr
    result = run("export", "small", "--model", "net.py", "--to", "pt2", "--out", "out")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--to", "tflite", "--out", "out"], 2, "no export format"),
        (["--to", "pt2"], 2, "--out DIR"),
        (["--to", "pt2", "--out", "net.py"], 2, "is a file"),
        (["--to", "pt2", "--out", "out", "--input", "1x4x8x8"], 2, ""),
    ],
)
def test_wrong_usage(run: Run, folder: Path, options: list[str], code: int, says: str) -> None:
    result = run("export", "net.py", *options)
    assert result.exit_code in (1, code)
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(file.name for file in folder.iterdir() if file.name != "__pycache__") == ["net.py"]


def test_a_model_that_cannot_be_traced_is_refused(run: Run, folder: Path) -> None:
    (folder / "odd.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Odd(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x[x > x.mean()].sum() if x.sum() > 0 else x.prod()\n"
        "example_inputs = torch.ones(1, 3)\n"
    )
    result = run("export", "odd.py", "--to", "pt2", "--out", "out")
    assert result.exit_code == 1
    assert "torch.export does not take the model" in result.stderr
    assert "odd.py:5 in forward" in result.stderr
    assert "torch.where or torch.cond" in result.stderr
    assert "torch.ops.aten" not in result.stderr  # a graph that torch prints
    assert "Traceback" not in result.stderr
    assert not (folder / "out").exists()


def test_outputs_in_classes_that_torch_does_not_know(run: Run, folder: Path) -> None:
    (folder / "odd.py").write_text(
        "from dataclasses import dataclass\nfrom torch import nn, Tensor\n"
        "@dataclass\nclass Out:\n    y: Tensor\n    loss: Tensor | None = None\n"
        "class Odd(nn.ReLU):\n    def forward(self, x):\n        return Out(super().forward(x))\n"
    )
    result = run("export", "odd.py", "--input", "1x3x8x8", "--to", "pt2", "--out", "out")
    assert result.exit_code == 0, result.stderr
    assert "→ y  batch×3×8×8 float32" in result.stdout
