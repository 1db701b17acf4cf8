"""What `fuse` refuses or leaves, and that it says what to do: quantized, complex, scattered, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from pwrewrite.cli.app import app
from pwrewrite.core.errors import PwrewriteError, RefusedError
from pwrewrite.workflows.fuse import fuse

X = torch.randn(2, 4, 8, 8)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)
    ).eval()


def refused(model: nn.Module, *said: str, x: Any = X, kind: type[PwrewriteError] = RefusedError, code: int = 1) -> None:
    with pytest.raises(kind) as caught:
        fuse(model, x)
    assert caught.value.exit_code == code
    for words in said:
        assert words in str(caught.value)


@pytest.fixture
def engine() -> None:
    engines = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    if not engines:
        pytest.skip("this torch has no engine for quantized layers")
    torch.backends.quantized.engine = "fbgemm" if "fbgemm" in engines else engines[0]


@pytest.mark.usefixtures("engine")
def test_quantized_layers() -> None:
    quantization: Any = torch.ao.quantization
    dynamic = quantization.quantize_dynamic(net(), {nn.Linear})
    refused(dynamic, "quantized layers", "where: 4", "fuse the model before it is quantized")
    refused(dynamic.train(), "quantized layers", "fuse the model before it is quantized")  # eval() would not help
    static = nn.Sequential(quantization.QuantStub(), *net(), quantization.DeQuantStub()).eval()
    static.qconfig = quantization.get_default_qconfig()
    prepared = quantization.prepare(static)
    prepared(X)
    refused(quantization.convert(prepared).eval(), "quantized", "fuse the model before it is quantized")


def test_quantized_weights() -> None:
    model = net()
    packed = torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    model[0].register_buffer("packed", packed)
    refused(model, "quantized weights", "0.packed", "before it is quantized")
    refused(model.train(), "quantized weights", "0.packed")
    model = net()
    model[0].weight = nn.Parameter(torch.zeros(4, 4, 3, 3, dtype=torch.int8), requires_grad=False)
    refused(model, "int8", kind=PwrewriteError, code=2)


def test_complex_weights() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, dtype=torch.complex64), nn.Tanh()).eval()
    refused(model, "complex", "0.weight", x=X.to(torch.complex64))
    model = nn.Sequential(nn.Conv2d(4, 4, 1, dtype=torch.complex64), nn.BatchNorm2d(4)).train()
    refused(model, "complex weights", "0.weight", x=X.to(torch.complex64))
    refused(net(), "complex64", x=X.to(torch.complex64), kind=PwrewriteError, code=2)


class Spectrum(nn.Module):
    """Complex numbers behind the convolutions only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.fft2(self.act(self.conv(x))))


def test_complex_activations_elsewhere_do_not_matter() -> None:
    done = fuse(Spectrum().eval(), X)
    assert [e.method for e in done.edits] == ["relu"]
    assert done.report.passed


def test_weights_on_several_devices() -> None:
    for where in ("0", "1"):
        model = net()
        model.get_submodule(where).to("meta")
        refused(model, "several devices", "cpu", "meta", "move the model to one")
    done = fuse(net().to("meta"), X)  # all on one: a dry run
    assert [e.method for e in done.edits] == ["fold", "relu"]


def test_training_mode() -> None:
    refused(net().train(), "training mode", "model.eval()", "leave out")
    model = net()
    model[1].train()
    refused(model, "training mode", "where: 1", "model.eval()")


def test_norms_without_statistics_stay() -> None:
    done = fuse(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval(), X)
    assert not done.edits
    skips = {skip.path: skip for skip in done.plan.skips}
    assert str(skips["1"].reason) == "no-statistics"
    assert "each batch" in skips["1"].detail
    assert done.report.passed


FILES = {
    "complex": "nn.Conv2d(4, 4, 1, dtype=torch.complex64)",
    "several devices": "nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, device='meta'))",
    "nothing to fuse": "nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))",
}


@pytest.mark.parametrize("said", FILES)
def test_the_command_says_so(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(f"import torch\nfrom torch import nn\n\nmodel = {FILES[said]}\n")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["fuse", "net.py:model", "--input", "1x4x8x8", "--out", "out"])
    assert done.exit_code == 1, done.output
    assert said in done.output
    assert not (tmp_path / "out").exists()


def test_what_is_to_be_quantized_later_is_fused() -> None:
    from torch.ao.nn.quantized import FloatFunctional

    class Quantizable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.sum = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.conv(x)))
            result: Tensor = self.sum.add(x, x)
            return result

    assert fuse(Quantizable().eval(), torch.zeros(1, 3, 8, 8)).edits


def test_complex_weights_of_code_do_not_keep_the_rest_from_being_fused() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.randn(8, 6, 4, dtype=torch.complex64))
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.conv(x)))
            return torch.fft.irfft2(torch.fft.rfft2(x) * self.filter)

    assert fuse(Spectral().eval(), torch.zeros(1, 3, 8, 8)).edits


def test_code_that_cannot_be_followed_is_the_reason() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(32, 32, 3)

        def forward(self, x: Tensor) -> Tensor:
            more = int(x.shape[-1]) % 2
            out: Tensor = self.conv(nn.functional.pad(x, (1, 1 + more, 1, 1)))
            return out

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.act = Padded(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x + self.body(x))

    (skip,) = fuse(Residual().eval(), torch.randn(1, 32, 8, 8), thorough=False).report.skips
    assert str(skip.reason) == "not-traced"
    assert "Padded.forward does not trace: it makes a Python number of a value or a size" in skip.detail
    assert "(test_fuse_refusals.py:" in skip.detail
    assert "more = int(x.shape[-1]) % 2)" in skip.detail
