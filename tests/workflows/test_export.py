"""Exports: every format runs in its own runtime, and the cases that exporters are known to get wrong.

Among these: a dynamic batch frozen to 1, inputs of equal shape taken for one, a convolution with a bias behind which a
norm is folded, 3-D norms, keyword and dict inputs and outputs, inputs whose batches mean different things.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pwrewrite
from pwrewrite.capturing import Inputs
from pwrewrite.core.errors import OutputError, RefusedError, UsageError
from pwrewrite.core.exports import Exports
from pwrewrite.core.names import EXPORT_NAMES
from pwrewrite.engines import exporting, pt2_format, source_code

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def exported(model: nn.Module, inputs: Inputs, folder: Path, **options: Any) -> Exports:
    """An export in every format, which must all agree with a model whose norms are not trivial."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    result = pwrewrite.export(model.eval(), inputs, to=EXPORT_NAMES, out=folder / "out", **options)
    assert result.passed, result.formats
    assert {*(file for row in result.formats for file in row.files), "export.json"} == {
        file.name for file in (folder / "out").iterdir()
    }
    return result


class Swapped(nn.Module):
    """Two inputs of the same shape that are not interchangeable, given by name in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        left, right = self.a(left), self.b(right)
        return {"left": left, "both": (left - 2 * right, right.mean((2, 3)))}


def test_equal_shapes_keywords_and_nested_dict_outputs(tmp_path: Path) -> None:
    inputs = {"right": torch.randn(1, 3, 8, 8), "left": torch.randn(1, 3, 8, 8)}
    result = exported(Swapped(), inputs, tmp_path)
    assert list(result.inputs) == ["right", "left"]
    assert set(result.inputs.values()) == {"batch×3×8×8 float32"}
    assert list(result.outputs) == ["left_out", "both_0", "both_1"]


class Prototypes(nn.Module):
    """Images against prototypes: both have as many in the example, and need not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor, prototypes: Tensor, scale: Tensor) -> Tensor:
        return self.body(x) @ prototypes.T * scale


def test_inputs_of_different_batch_meaning(tmp_path: Path) -> None:
    inputs = (torch.randn(4, 3, 8, 8), torch.randn(4, 8), torch.ones(1))
    result = exported(Prototypes(), inputs, tmp_path)
    shapes = {"x": "batch×3×8×8", "prototypes": "batch_prototypes×8", "scale": "1"}
    assert result.inputs == {key: f"{shape} float32" for key, shape in shapes.items()}
    assert set(result.outputs.values()) == {"batch×batch_prototypes float32"}
    assert "batch 3, batch_prototypes 4" in result.formats[0].detail


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Conv2d(3, 8, 3, bias=True), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1, bias=True), nn.BatchNorm2d(4)), 2),
        ((nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.InstanceNorm3d(8, affine=True), nn.GroupNorm(2, 8)), 3),
        ((nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ConvTranspose1d(8, 4, 3), nn.BatchNorm1d(4)), 1),
        ((nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.Hardswish(), nn.PReLU(8)), 2),
    ],
    ids=["bias before norm", "3-D norms", "1-D", "reflect"],
)
def test_norms_and_biases(layers: tuple[nn.Module, ...], shape: int, tmp_path: Path) -> None:
    result = exported(nn.Sequential(*layers), torch.randn(1, 3, *[8] * shape), tmp_path)
    assert result.inputs["input"].startswith("batch×3×8")


class Flattening(nn.Module):
    """Reads the batch size where exporters like to freeze it, and takes integers that must stay in range."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 4, 3), nn.Embedding(5, 4)

    def forward(self, x: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x).view(x.size(0), 4, -1) + self.table(kind).unsqueeze(-1)
        return y.reshape(y.shape[0], -1), kind + torch.arange(x.shape[0])


class OneForAll(nn.Module):
    """Sizes of which one stands for every axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.first.dilation = 1  # type: ignore[assignment]
        self.second.padding = (1,)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(self.second(self.first(x)), kernel_size=(3,), stride=[2], padding=1)


def test_one_size_for_every_axis(tmp_path: Path) -> None:
    exported(OneForAll(), X, tmp_path)


def test_a_batch_is_not_frozen_and_integers_stay_in_range(tmp_path: Path) -> None:
    result = exported(Flattening(), (torch.randn(1, 3, 8, 8), torch.tensor([4])), tmp_path)
    assert result.inputs["kind"] == "batch int64"
    assert result.formats[0].detail == "agrees at batch 1 and at batch 3"


def test_further_axes(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    result = exported(net, X, tmp_path, dynamic=("input:2=height", "input:3"))
    assert result.inputs == {"input": "batch×3×height×input_3 float32"}
    assert list(result.outputs.values()) == ["batch×4×1×1 float32"]
    assert "height 32" in result.formats[0].detail


class Twice(nn.Module):
    """A batch of twice as many, a size that follows from another, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return torch.cat([y, -y]), y.sum()


def test_what_becomes_of_axes_that_vary_is_said(tmp_path: Path) -> None:
    result = exported(Twice(), X, tmp_path, dynamic=("x:3=width",))
    twice, total = result.outputs.values()
    batch, channels, height, width = twice.removesuffix(" float32").split("×")
    assert (batch, channels, height) == ("2*batch", "4", str(X.shape[2] // 2))
    assert "width" in width
    assert total == "scalar float32"


def test_fused_and_half_rank(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    rewritten = pwrewrite.rewrite(net, X, [pwrewrite.passes.InsertBottleneck(0.5, min_gain=0)]).model
    fused = pwrewrite.fuse(rewritten, X).model
    exported(fused, X, tmp_path)


class OneImage(nn.Module):
    """Its own code takes a single image only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).view(1, 4, 14, 14)


def test_a_model_of_one_batch_size_is_exported_static_with_a_note(tmp_path: Path) -> None:
    result = exported(OneImage(), X, tmp_path)
    assert result.inputs == {"x": "1×3×16×16 float32"}
    assert any("no other batch size" in note for note in result.notes)


class Branching(nn.Module):
    """Python decides by the batch size, which torch.export freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * 2 if x.shape[0] == 3 else y


def test_a_model_that_decides_by_the_batch_is_not_exported_wrongly(tmp_path: Path) -> None:
    result = pwrewrite.export(Branching(), X, to="pt2", out=tmp_path / "out")
    assert not result.passed
    assert not (tmp_path / "out").exists()


class Counting(nn.Module):
    """``len`` is a number to torch.export."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(len(x), -1)


def test_a_batch_that_torch_freezes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"freezes the axis batch\n.*axis 0 of x"):
        pwrewrite.export(Counting(), X, out=tmp_path / "out")
    result = pwrewrite.export(Counting(), X, out=tmp_path / "out", static=True)
    assert result.passed
    assert result.inputs == {"x": "1×3×16×16 float32"}


class Scaling(pt2_format.Pt2):
    """A format that writes a model with one wrong layer."""

    def write(self, program: exporting.Program, folder: Path) -> None:
        wrong = exporting.Program(
            program.model, program.inputs, program.input_names, program.outputs, program.axes
        ).exported
        for key, tensor in wrong.state_dict.items():
            if key == "1.weight":
                wrong.state_dict[key] = nn.Parameter(tensor * 1.01)
        torch.export.save(wrong, folder / self.main)


@pytest.mark.parametrize("to", ["pt2", "source", "onnx"])
def test_no_room_for_what_is_written_first(tmp_path: Path, to: str) -> None:
    net, limits = nn.Conv2d(3, 64, 5).eval(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OutputError, match=f"cannot write the {to} export: .*File too large"):
            pwrewrite.export(net, X, to=to, out=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()


class _KeepsItsSize(nn.Module):
    """Computes a grid anew where the map has another shape than in the run before, as detectors' heads do."""

    shape: torch.Size | None = None

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grid = nn.Conv2d(3, 8, 3), torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.shape != y.shape:
            self.grid, self.shape = torch.arange(y.shape[2] * y.shape[3], dtype=y.dtype).view(y.shape[2:]), y.shape
        return y + self.grid


@pytest.mark.filterwarnings("ignore:The tensor attribute self.grid")
def test_a_size_that_code_keeps_of_a_run_is_not_fixed(tmp_path: Path) -> None:
    model, x = _KeepsItsSize().eval(), torch.randn(1, 3, 8, 8)
    kept = model(x).shape
    made = pwrewrite.export(model, x, to=["pt2", "onnx"], out=tmp_path / "served")
    assert made.passed
    assert made.inputs["x"].startswith("batch×3")
    assert model.shape == kept


@pytest.mark.parametrize("where", ["write", "run"])
def test_an_interrupt_leaves_nothing_and_what_was_there_as_it_was(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Conv2d(3, 4, 3).eval()
    pwrewrite.export(net, X, to="onnx", out=tmp_path / "there")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pt2_format.Pt2, where, interrupted)
    for out in ("there", "new"):
        with pytest.raises(KeyboardInterrupt):
            pwrewrite.export(net, X, to=["onnx", "pt2"], out=tmp_path / out, force=out == "there")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_what_differs_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pt2_format, "FORMAT", Scaling())
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    result = pwrewrite.export(net, X, to=["onnx", "pt2"], out=tmp_path / "out")
    onnx, pt2 = result.formats
    assert onnx.passed
    assert not pt2.passed
    assert "output differs by" in pt2.detail
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["export.json", "model.onnx"]
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert written["schema"] == "pwrewrite.export/1"
    assert written["passed"] is False


@pytest.mark.parametrize("in_place", [False, True])
def test_the_first_node_that_differs_in_onnx_is_named(
    in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pwrewrite.engines import onnx_format

    class Damaged(onnx_format.Onnx):
        def write(self, program: exporting.Program, folder: Path) -> None:
            import onnx

            super().write(program, folder)
            model = onnx.load(folder / self.main)
            for tensor in model.graph.initializer:
                if tensor.name == "4.weight":
                    values = onnx.numpy_helper.to_array(tensor) * 1.01
                    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
            onnx.save(model, folder / self.main)

    monkeypatch.setattr(onnx_format, "FORMAT", Damaged())
    convolutions = [nn.Conv2d(channels, 4, 3, padding=1) for channels in (3, 4, 4)]
    activations = [nn.ReLU(in_place), nn.ReLU(), nn.ReLU()]
    net = nn.Sequential(*(layer for pair in zip(convolutions, activations) for layer in pair)).eval()
    result = pwrewrite.export(net, X, to="onnx", out=tmp_path / "out")
    assert not result.passed
    assert result.formats[0].differs_at == "conv2d_2 in 4"
    assert not (tmp_path / "out").exists()


def test_operations_of_a_library_are_imported_and_said(tmp_path: Path) -> None:
    from torchvision.ops import deform_conv2d

    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset, self.weight = nn.Conv2d(3, 18, 3, padding=1), nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = deform_conv2d(x, self.offset(x), self.weight, padding=1)
            return result

    result = pwrewrite.export(Deformable().eval(), X, to=("pt2", "source"), out=tmp_path / "out")
    assert result.passed, result.formats
    assert any("import torchvision" in note for note in result.notes)
    assert "import torchvision" in (tmp_path / "out" / "model.py").read_text()


def test_a_list_stays_a_list(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slow, self.fast = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, clips: list[Tensor]) -> Tensor:
            return self.slow(clips[0]) + self.fast(clips[1])

    model, clips = Two().eval(), [X, X + 1]
    assert pwrewrite.export(model, (clips,), to="pt2", out=tmp_path / "out").passed
    served = torch.export.load(tmp_path / "out" / "model.pt2").module()
    with torch.no_grad():
        assert torch.allclose(served(clips), model(clips), atol=1e-5)


class Conditional(nn.Module):
    """A kernel for each input of a batch, as one grouped convolution (Yang et al. 2019, CondConv)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gate = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        kernels = (self.gate(x.mean((2, 3)))[:, :, None, None, None] * self.weight).flatten(0, 1)
        y = torch.conv2d(x.flatten(0, 1)[None], kernels, padding=1, groups=n)
        return y.unflatten(1, (n, 8))[0]


def test_what_onnx_cannot_say_is_named_with_what_may_do(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    model = Conditional().eval()
    result = pwrewrite.export(model, X, to="onnx", out=tmp_path / "varies")
    assert not result.passed
    assert "at %conv2d, torch.ops.aten.conv2d.default; --static" in result.formats[0].detail
    assert pwrewrite.export(model, X, to="onnx", out=tmp_path / "static", static=True).passed


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Conv2d(3, 4, 3)
    with pytest.raises(UsageError, match="no place"):
        pwrewrite.export(net, X)
    with pytest.raises(UsageError, match="no export format 'tflite'"):
        pwrewrite.export(net, X, to="tflite", out=tmp_path / "a")
    with pytest.raises(UsageError, match="names no axis"):
        pwrewrite.export(net, X, dynamic=("x:9",), out=tmp_path / "a")
    with pytest.raises(RefusedError, match="on meta"):
        pwrewrite.export(net.to("meta"), X, out=tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for force in (False, True):
        with pytest.raises(OutputError, match=r"exists|did not write"):
            pwrewrite.export(nn.Conv2d(3, 4, 3), X, out=tmp_path / "full", force=force)
    monkeypatch.setattr(exporting.util, "find_spec", lambda module: None)
    with pytest.raises(UsageError, match=r"pwrewrite\[onnx\]"):
        pwrewrite.export(nn.Conv2d(3, 4, 3), X, out=tmp_path / "a")


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_random_numbers_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="random numbers"):
        pwrewrite.export(Noisy(), X, out=tmp_path / "out")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from pwrewrite.cli.app import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\nexample_inputs = torch.zeros(1, 3, 8, 8)\n"
        "def build_model():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
    )
    first = CliRunner().invoke(app, ["export", "net.py", "--to", "onnx,pt2", "--out", "out"])
    assert first.exit_code == 0, first.output
    assert "every output agrees at two sizes" in first.output
    assert CliRunner().invoke(app, ["export", "net.py", "--out", "out"]).exit_code == 2
    again = CliRunner().invoke(app, ["export", "net.py", "--out", "out", "--force", "--format", "json", "--static"])
    assert again.exit_code == 0, again.output
    assert not (tmp_path / "out" / "model.pt2").exists()
    assert json.loads(again.stdout)["inputs"] == {"input": "1×3×8×8 float32"}


def test_names_that_source_uses_are_torchs() -> None:
    assert all(hasattr(Tensor, name) for name in source_code._METHODS)
    assert all(hasattr(torch, name) for name in source_code._FUNCTIONS)
    assert all(hasattr(nn.functional, name) for name in source_code._FUNCTIONAL)


def test_source_of_activations_in_place(tmp_path: Path) -> None:
    layers = (nn.Hardswish(inplace=True), nn.SiLU(inplace=True), nn.Hardsigmoid(inplace=True), nn.Mish(inplace=True))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), *layers, nn.LeakyReLU(0.1, inplace=True), nn.ELU(inplace=True)).eval()
    result = pwrewrite.export(net, X, to="source", out=tmp_path / "out")
    assert result.passed, result.formats


class Squeezes(nn.Module):
    """Squeezes an axis that is 1 for some settings of its layers only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x).squeeze(1))


def test_squeezing_another_axis_is_nothing_in_onnx_too(tmp_path: Path) -> None:
    result = pwrewrite.export(Squeezes().eval(), X, to=("onnx", "source"), out=tmp_path / "out")
    assert result.passed, result.formats
    assert "squeeze" not in (tmp_path / "out" / "model.py").read_text()


class Clamps(nn.Module):
    """Clamps with bounds of both kinds, as ``clamp(0, 0.5)`` has them."""

    def forward(self, x: Tensor) -> Tensor:
        whole = (x * 4).long().clip(0, max=2.5)
        return x.clamp(0, 0.5) + whole + x.mul(2).clamp_(min=-0.25, max=1) + x.clamp(0, x.max()) + x.clamp(-1)


def test_bounds_of_both_kinds_are_clamped_by_in_onnx_too(tmp_path: Path) -> None:
    result = pwrewrite.export(Clamps().eval(), X, to="onnx", out=tmp_path / "out")
    assert result.passed, result.formats


class Checks(nn.Module):
    """Refuses inputs by a value."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) < -1e9:
            raise ValueError("too small")
        return x.flatten(1)


def test_the_line_that_torch_cannot_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        pwrewrite.export(Checks().eval(), X, to="pt2", out=tmp_path / "out")
    assert "test_export.py:" in str(caught.value.where)
    assert "float(x.sum())" in str(caught.value.where)


class Masked(nn.Conv2d):
    """Masks its weight by setting its data, as autoregressive models do."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.register_buffer("mask", torch.ones(3, 3).triu())

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


def test_code_with_data_that_torch_cannot_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        pwrewrite.export(nn.Sequential(Masked()).eval(), X, to="pt2", out=tmp_path / "out")
    assert caught.value.where == "the code of 0"
    assert ".data" in str(caught.value.got)
    assert "self.weight * self.mask" in str(caught.value.hint)


class Hard(nn.Module):
    """What code has to say that no module says: control flow, constants, slices, sums and shared layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), nn.GELU("tanh")])
        self.scale = nn.Parameter(torch.rand(3, 1, 1))
        self.register_buffer("steps", torch.arange(16), persistent=False)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, pair: tuple[Tensor, dict[str, Tensor]], *, double: bool = False) -> list[Any]:
        for _ in range(2):
            for layer in self.layers:
                x = x + layer(x) * self.scale
        if double:
            x = x * 2
        y = x[:, 1:, ::2] / 2 + self.steps.sin() + pair[0]
        z, _ = self.attention(y[:, 0], y[:, 0], y[:, 0])
        return [y.flatten(1), {"mask": x > 0, "z": (z, pair[1]["weight"].masked_fill(pair[1]["weight"] < 0, -1.5))}]


def test_source_is_plain_code_that_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"x": X, "pair": (torch.randn(1, 2, 8, 16), {"weight": torch.randn(1, 5)}), "double": True}
    result = pwrewrite.export(Hard().eval(), inputs, to=("source", "pt2"), out=tmp_path / "out")
    assert result.passed, result.formats
    text = (tmp_path / "out" / "model.py").read_text()
    assert "pwrewrite." not in text
    assert "nn.Conv2d(3, 3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), padding_mode='circular')" in text
    assert text.count("nn.Conv2d(") == 1
    assert text.count("= self.layers_0(") == 2
    assert "def forward(self, x=None, pair=None, double=None):" in text
    assert "torch.ops" not in text
    assert "[:, 1:]" in text


def test_a_package_that_an_exporter_could_use_is_not_missed_aloud(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import torch, pwrewrite\n"
        "model = torch.nn.Conv2d(3, 4, 3).eval()\n"
        f"pwrewrite.export(model, torch.randn(1, 3, 8, 8), to=('onnx',), out={str(tmp_path / 'out')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "torchvision" not in done.stdout + done.stderr
    assert (tmp_path / "out" / "model.onnx").is_file()


class Named(nn.Module):
    """Children whose names are keywords, of which torch.fx writes code that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.ModuleDict({"in": nn.Conv2d(3, 8, 3), "class": nn.Conv2d(8, 8, 3)})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.m["class"](torch.relu(self.m["in"](x)))
        return result


def test_names_that_are_keywords(tmp_path: Path) -> None:
    model, x = Named().eval(), torch.randn(2, 3, 16, 16)
    result = pwrewrite.export(model, X, to=("onnx", "source", "pt2"), out=tmp_path / "out")
    assert [row.passed for row in result.formats] == [True, True, False]
    assert "m.in is a keyword: rename it" in result.formats[2].detail
    fused = pwrewrite.fuse(model, X)
    assert fused.edits
    torch.testing.assert_close(fused.model(x), model(x), rtol=1e-4, atol=1e-5)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Heads:
    scores: Tensor
    pair: Pair
    loss: Tensor | None = None


class Classes(nn.Conv2d):
    """Returns classes of its own, which neither a runtime nor ``torch.export.load`` knows."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return Heads(y.mean((2, 3)), Pair(y, -y))


class Tupled(nn.Conv2d):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return Pair(y, y.mean((2, 3)))


def test_outputs_in_classes_come_in_plain_containers(tmp_path: Path) -> None:
    model = Classes(3, 8, 3)
    result = exported(model, X, tmp_path)
    assert list(result.outputs) == ["scores", "pair_left", "pair_right"]
    served = torch.export.load(tmp_path / "out/model.pt2").module()(X)
    assert list(served) == ["scores", "pair", "loss"]
    torch.testing.assert_close(served["pair"][1], model(X).pair.right, rtol=1e-4, atol=1e-5)
    assert type(model(X)) is Heads  # the model's own forward is as it was
    named = exported(Tupled(3, 8, 3), X, tmp_path / "tuple")
    assert list(named.outputs) == ["left", "right"]
    assert type(torch.export.load(tmp_path / "tuple/out/model.pt2").module()(X)) is tuple


class Padded(nn.Sequential):
    """Pads where a size is no multiple of 4, which the example never is, and is another model for large batches."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height % 4 or width % 4:
            x = nn.functional.pad(x, (0, -width % 4, 0, -height % 4))
        if x.shape[0] > 9:
            x = x - x.mean()
        result: Tensor = super().forward(x)
        return result[..., :height, :width]


def test_sizes_that_an_export_does_not_hold_for_are_said(tmp_path: Path) -> None:
    model = Padded(nn.Conv2d(3, 8, 2, 2), nn.ConvTranspose2d(8, 3, 2, 2)).eval()
    dynamic = ("x:2=height", "x:3=width")
    result = pwrewrite.export(model, X, to="onnx", out=tmp_path / "out", dynamic=dynamic)
    assert result.passed
    [note] = [note for note in result.notes if "the exports hold for" in note]
    assert "batch at most 9, height in multiples of 4, width in multiples of 4" in note
    free = pwrewrite.export(nn.Conv2d(3, 8, 3), X, to="pt2", out=tmp_path / "free", dynamic=("input:2",))
    assert not any("hold for" in note for note in free.notes)
    equal = pwrewrite.export(Transposed(), X, to="pt2", out=tmp_path / "equal", dynamic=dynamic)
    assert any("width equal to height" in note for note in equal.notes)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.transpose(2, 3)


class Taken(nn.Module):
    """Names that every ``GraphModule`` has."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self.norm, self.meta = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.meta(torch.relu(self.norm(self.graph(x)))))


def test_names_that_graphs_take(tmp_path: Path) -> None:
    model = Taken().eval()
    result = pwrewrite.export(model, X, to=("source", "pt2"), out=tmp_path / "out")
    assert [row.passed for row in result.formats] == [True, False]
    assert "rename the model's graph" in result.formats[1].detail
    fused = pwrewrite.fuse(model, X)
    assert any("graph, which is a name that graphs of torch take" in skip.detail for skip in fused.report.skips)
    torch.testing.assert_close(fused.model(X), model(X), rtol=1e-4, atol=1e-5)


def test_one_size_is_not_called_two(tmp_path: Path) -> None:
    from pwrewrite.report.exported import headline

    varies, static = (
        pwrewrite.export(nn.Conv2d(3, 4, 3).eval(), X, to="pt2", out=tmp_path / str(static), static=static)
        for static in (False, True)
    )
    assert "at two sizes" in headline(varies)
    assert "for two inputs of its one size" in headline(static)
