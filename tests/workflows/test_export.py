"""Exports are what the model is: in their own runtimes, at several batch sizes, or not there at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pwrewrite
from pwrewrite.core.errors import OutputError, RefusedError, UsageError, VerificationError
from pwrewrite.engines import exports
from pwrewrite.engines.exports import FORMATS, Onnx, OpenVino, Pt2
from pwrewrite.report.exported import Export

for package in ("onnx", "onnxruntime", "onnxscript", "openvino"):
    pytest.importorskip(package)

ALL = [each.name for each in FORMATS]


class Keywords(nn.Module):
    """Two inputs of equal shape that are not interchangeable, by name, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, *, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        y = self.conv(left) - 2 * self.conv(right).relu()
        return {"scores": y.mean((2, 3)), "best": y.flatten(1).argmax(1)}


class Anchored(nn.Module):
    """A second input whose first dim is no batch, though it has the same size in the example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, anchors: Tensor) -> Tensor:
        assert anchors.shape[0] == 2, "two anchors"
        y: Tensor = self.conv(x)
        return torch.einsum("nchw,ac->na", y, anchors)


class Nested(nn.Module):
    """Containers in, containers out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, maps: dict[str, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        first, second = maps["levels"]
        return self.conv(first), [second.sum((1, 2, 3)), self.conv(second).amax((2, 3))]


def folded() -> nn.Module:
    """A convolution with a bias and a norm behind it, folded and fused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.SiLU()).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2)
    return pwrewrite.fuse(model, torch.randn(1, 3, 12, 12), thorough=False).model


def half() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3))
    x = torch.randn(1, 16, 10, 10)
    return pwrewrite.rewrite(model.eval(), x, passes=[pwrewrite.passes.InsertBottleneck(rank=0.5)]).model


X = torch.randn(1, 3, 12, 12)
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Sequence[str]]] = {
    "plain": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 4)), X, ALL),
    "fused": (folded, X, ALL),
    "half rank": (half, torch.randn(1, 16, 10, 10), ALL),
    "3-D norms": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.GroupNorm(2, 4), nn.PReLU()),
        torch.randn(1, 2, 6, 6, 6),
        ALL,
    ),
    "1-D, transposed": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 5, dilation=2), nn.BatchNorm1d(6), nn.ConvTranspose1d(6, 2, 4, 2, 1)),
        torch.randn(1, 3, 24),
        ALL,
    ),
    "by name, dict out": (Keywords, {"left": X, "right": X + 1}, ALL),
    "containers": (Nested, ({"levels": [X, torch.randn(1, 3, 8, 8)]},), ALL),
    "another batch meaning": (Anchored, (torch.randn(2, 3, 6, 6), torch.randn(2, 4)), ALL),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_format_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    make, inputs, formats = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = pwrewrite.export(model, inputs, to=formats, out=tmp_path / "out")
    assert [each.format for each in result.formats] == list(formats)
    for each in result.formats:
        assert each.batches == (3, 5)
        assert each.error < 1e-4
        assert each.nbytes > 0
        assert (tmp_path / "out" / each.file).is_file()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert json.loads((tmp_path / "out" / "export.json").read_text())["schema"] == "pwrewrite.export/1"


def test_names_of_inputs_and_outputs(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    model = Keywords().eval()
    result = pwrewrite.export(model, {"left": X, "right": X + 1}, to="onnx", out=tmp_path / "out")
    assert result.outputs == ("scores", "best")
    assert result.dynamic == ("left", "right")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    assert [value.name for value in session.get_inputs()] == ["left", "right"]
    assert [value.name for value in session.get_outputs()] == ["scores", "best"]
    assert not isinstance(session.get_inputs()[0].shape[0], int)  # the batch is no number
    x, y = torch.randn(7, 3, 12, 12), torch.randn(7, 3, 12, 12)
    scores, best = session.run(None, {"left": x.numpy(), "right": y.numpy()})
    expected = model(left=x, right=y)
    torch.testing.assert_close(torch.from_numpy(scores), expected["scores"], rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.from_numpy(best), expected["best"])


def test_only_the_first_input_scales_where_the_others_do_not(tmp_path: Path) -> None:
    result = pwrewrite.export(
        Anchored().eval(), (torch.randn(2, 3, 6, 6), torch.randn(2, 4)), to="pt2", out=tmp_path / "a"
    )
    assert result.dynamic == ("x",)
    assert "in the first input only" in result.notes[0]


def test_shapes_are_fixed_where_the_model_fixes_them_or_the_user(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1) * 2

    fixed = pwrewrite.export(Fixed(), torch.randn(2, 3, 5), to="pt2", out=tmp_path / "a")
    assert fixed.dynamic == ()
    assert "does not run at other batch sizes" in fixed.notes[-1]
    asked = pwrewrite.export(nn.Conv2d(3, 4, 1), X, to="onnx", static=True, out=tmp_path / "b")
    assert asked.dynamic == ()
    assert asked.formats[0].batches == ()
    assert "as asked" in asked.notes[-1]


def test_a_batch_that_the_trace_takes_for_a_constant_is_refused(tmp_path: Path) -> None:
    class Frozen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.repeat(int(x.shape[0]) * 0 + 1, 1, 1, 1) if x.shape[0] != 2 else x + 0

    with pytest.raises(RefusedError, match=r"cannot trace(.|\n)*--static"):
        pwrewrite.export(Frozen(), X, to="pt2", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert pwrewrite.export(Frozen(), X, to="pt2", out=tmp_path / "out", static=True).dynamic == ()


@pytest.mark.parametrize("kind", [Onnx, OpenVino, Pt2])
def test_what_does_not_agree_is_not_left_behind(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kind.run

    def wrong(self: Any, folder: Path, batches: Any) -> list[list[Tensor]]:
        results: list[list[Tensor]] = real(self, folder, batches)
        results[-1][0][0] *= 1.001
        return results

    monkeypatch.setattr(kind, "run", wrong)
    with pytest.raises(VerificationError, match=r"does not compute what the model does") as caught:
        pwrewrite.export(nn.Conv2d(3, 4, 1), X, to=[kind.name], out=tmp_path / "out")
    assert "batch 5" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors[:0], "0 outputs, expected 1"),
        (lambda tensors: [tensors[0][:1]], "output is 1×4×12×12 float32, expected 3×4×12×12 float32"),
        (lambda tensors: [tensors[0].double()], "float64, expected"),
        (lambda tensors: [tensors[0] * float("nan")], "NaN"),
    ],
)
def test_each_way_to_be_wrong_is_named(
    change: Callable[[list[Tensor]], list[Tensor]], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Onnx.run

    def wrong(self: Onnx, folder: Path, batches: Any) -> list[list[Tensor]]:
        first, *rest = real(self, folder, batches)
        return [first, *map(change, rest)]

    monkeypatch.setattr(Onnx, "run", wrong)
    with pytest.raises(VerificationError) as caught:
        pwrewrite.export(nn.Conv2d(3, 4, 1), X, to="onnx", out=tmp_path / "out")
    assert says in str(caught.value)


def test_a_runtime_that_fails_is_a_failed_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "_RUN_PT2", "raise SystemExit('no such operator')")
    with pytest.raises(VerificationError, match=r"pt2 does not run(.|\n)*no such operator"):
        pwrewrite.export(nn.Conv2d(3, 4, 1), X, to="pt2", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_archive_runs_where_pwrewrite_is_not_installed() -> None:
    assert 'sys.modules["pwrewrite"] = None' in exports._RUN_PT2


def test_missing_packages_are_named_with_what_installs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVino, "packages", ("no_such_package",))
    with pytest.raises(RefusedError, match=r"no_such_package(.|\n)*pip install 'pwrewrite\[openvino\]'"):
        pwrewrite.export(nn.Conv2d(3, 4, 1), X, to="openvino", out=tmp_path / "out")


def test_refusals(tmp_path: Path) -> None:
    out = tmp_path / "out"
    conv = nn.Conv2d(3, 4, 1)
    with pytest.raises(UsageError, match="no such format"):
        pwrewrite.export(conv, X, to="tflite", out=out)
    with pytest.raises(UsageError, match="out, a folder"):
        pwrewrite.export(conv, X, to="pt2")
    with pytest.raises(UsageError, match="did you mean static"):
        pwrewrite.export(conv, X, to="pt2", out=out, statik=True)
    with pytest.raises(RefusedError, match="does not run on its example inputs"):
        pwrewrite.export(conv, torch.randn(1, 4, 5, 5), to="pt2", out=out)
    with pytest.raises(RefusedError, match="no weights"):
        pwrewrite.export(conv.to("meta"), X, to="pt2", out=out)

    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(RefusedError, match="draws random numbers"):
        pwrewrite.export(Random(), X, to="pt2", out=out)
    assert not out.exists()


def test_a_folder_is_replaced_only_if_it_is_ours_and_only_if_told(tmp_path: Path) -> None:
    conv, out = nn.Conv2d(3, 4, 1), tmp_path / "out"
    pwrewrite.export(conv, X, to="pt2", out=out)
    with pytest.raises(OutputError, match="exists"):
        pwrewrite.export(conv, X, to="pt2", out=out)
    pwrewrite.export(conv, X, to="pt2", out=out, force=True)
    (out / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match=r"mine\.txt"):
        pwrewrite.export(conv, X, to="pt2", out=out, force=True)
    assert (out / "mine.txt").read_text() == "keep"
    other = tmp_path / "other"
    other.mkdir()
    (other / "export.json").write_text("{}")
    with pytest.raises(OutputError, match="did not write"):
        pwrewrite.export(conv, X, to="pt2", out=other, force=True)


def test_it_prints_as_the_command_does(tmp_path: Path) -> None:
    result = pwrewrite.export(nn.Conv2d(3, 4, 1), X, to="pt2", out=tmp_path / "out")
    assert isinstance(result, Export)
    assert str(result).startswith("torch.nn.modules.conv.Conv2d\nexported to")
    assert "batch     varies in" in str(result)
    assert repr(result).startswith("<Export of torch.nn.modules.conv.Conv2d to pt2 in ")
    assert "model.pt2" in result._repr_html_()
