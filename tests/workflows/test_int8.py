"""Exports in int8: calibrated, run, held against float32, kept where they are faster."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pwrewrite
from pwrewrite.core.errors import UsageError
from pwrewrite.core.exports import Exports
from pwrewrite.engines.exporting import Program
from pwrewrite.engines.onnx_format import OnnxInt8
from pwrewrite.workflows import int8

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SAMPLES = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Convolutions wide enough that int8 gains, a head, and a product that no layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def exported(folder: Path, to: str, model: nn.Module | None = None, x: Tensor = X, **options: object) -> Exports:
    torch.manual_seed(0)
    return pwrewrite.export(
        (model or Net()).eval(), x, to=to, out=folder / "out", int8=True, calibration=[SAMPLES], **options
    )


@pytest.mark.parametrize(("to", "file"), [("onnx", "model.int8.onnx"), ("openvino", "model.int8.xml")])
def test_what_is_quantized_is_measured_and_kept_where_it_is_faster(
    to: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf" if to == "openvino" else "onnxruntime")
    monkeypatch.setattr(int8, "FASTER", 1e9)  # how fast this machine is, is not what is tested
    result = exported(tmp_path, to)
    assert result.passed, result.formats
    plain, small = result.formats
    assert (plain.format, small.format) == (to, f"{to} int8")
    assert (tmp_path / "out" / file).exists()
    assert small.bytes < plain.bytes / 2
    assert set(small.layers.values()) <= {"int8", "float32"}
    assert len(small.layers) == 4
    assert list(small.layers.values()).count("int8") >= 3
    assert small.loss is not None
    assert 0 < small.loss < 0.05
    assert small.agreement is not None
    assert plain.loss is None
    assert "4 held-out inputs" in small.detail
    if to == "onnx":
        assert set(small.layers) == {"body.0", "body.2", "body.4", "head"}


def test_what_is_no_faster_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "FASTER", 0.0)
    result = exported(tmp_path, "onnx")
    assert result.passed
    assert result.formats[1].files == ()
    assert "not kept, no faster" in result.formats[1].detail
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.onnx", "export.json"}
    assert "not kept" in str(result)


def test_a_model_of_one_batch_size_is_calibrated_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "FASTER", 1e9)
    result = exported(tmp_path, "onnx", static=True, x=SAMPLES[:3])
    assert result.passed, result.formats
    assert result.formats[1].files


def test_what_cannot_be_quantized_says_why_and_leaves_the_float32_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(form: OnnxInt8, program: Program, folder: Path) -> None:
        (folder / form.main).write_bytes(b"half")
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(OnnxInt8, "write", fail)
    result = exported(tmp_path, "onnx")
    assert not result.passed
    assert [row.passed for row in result.formats] == [True, False]
    assert "no such kernel" in result.formats[1].detail
    assert not (tmp_path / "out" / "model.int8.onnx").exists()


def test_options_of_int8_go_together(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="goes with --int8"):
        pwrewrite.export(Net(), X, to="onnx", out=out, calibration=[SAMPLES])
    with pytest.raises(UsageError, match="needs inputs to calibrate on"):
        pwrewrite.export(Net(), X, to="onnx", out=out, int8=True)
    with pytest.raises(UsageError, match="is for onnx and openvino"):
        pwrewrite.export(Net(), X, to="pt2", out=out, int8=True, calibration=[SAMPLES])
    assert not out.exists()
