"""Every engine gives what the model gives, says what it ran on, and says what it lacks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.core.errors import RefusedError, UsageError
from pwrewrite.core.names import ENGINE_NAMES
from pwrewrite.engines import choosing, exporting
from pwrewrite.engines.choosing import Times, choose, time_everywhere
from pwrewrite.engines.engine import Engine, engine_named, program_of, stages_of
from pwrewrite.engines.timing import Timing
from pwrewrite.engines.torch_engine import PLAIN
from pwrewrite.layers import tracing
from pwrewrite.layers.factorized import build


def there(name: str) -> Engine:
    found = engine_named(name)
    if found.missing:
        pytest.skip(found.missing)
    return found


class TwoInputs(nn.Module):
    """Two outputs, one input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.conv(x)).relu()
        return {"map": y * scale, "mean": y.mean((2, 3))}


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino"])
def test_an_engine_gives_what_the_model_gives(name: str) -> None:
    torch.manual_seed(0)
    model, x, scale = TwoInputs(), torch.randn(2, 3, 8, 8), torch.tensor(2.0)
    session = there(name).session(model, (x,), {"scale": scale}, threads=1)
    assert model.training  # stays as it is, and runs in evaluation
    expected = model.eval()(x, scale=scale)
    for got, wanted in zip(session(x, scale=scale), expected.values(), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    ran = session.ran
    assert (ran.engine, ran.threads) == (name, 1)
    assert ran.precision.startswith("float32")
    assert str(ran).startswith(f"{name} {there(name).version}, ")


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "strided groups": (nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2), (2, 8, 9, 7)),
    "dilated 1-D": (nn.Conv1d(4, 6, 3, padding=2, dilation=2, bias=False), (1, 4, 11)),
    "3-D": (nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1)), (1, 2, 4, 5, 6)),
    "linear": (nn.Linear(5, 3), (4, 5)),
    "linear without a bias, on tokens": (nn.Linear(5, 3, bias=False), (2, 4, 5)),
    "linear on tokens": (nn.Linear(5, 3), (2, 4, 5)),
    "factorised": (
        build(ConvSpec.of_module(nn.Conv2d(8, 8, 3, padding=1)), "spatial", {"rank": 3}, axes=(0,)),
        (1, 8, 6, 6),
    ),
}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("name", ["frozen", "onnxruntime", "openvino"])
def test_layers_alone(name: str, case: str) -> None:
    model, shape = LAYERS[case]
    x = torch.randn(shape)
    assert stages_of(model, (x,), {}) is not None  # written directly, not exported
    (got,) = there(name).session(model.eval(), (x,), {}, threads=1)(x)
    with torch.no_grad():
        torch.testing.assert_close(got, model(x), atol=1e-5, rtol=1e-5)


def test_what_is_no_plain_chain_is_exported() -> None:
    x = torch.randn(1, 4, 6, 6)
    for model in (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose2d(4, 4, 3), nn.ReLU()):
        assert stages_of(model, (x,), {}) is None
    assert stages_of(nn.Conv2d(4, 4, 3).double(), (x.double(),), {}) is None
    assert program_of(nn.ReLU(), (x,), {}).input_names == ("input_0",)


def test_what_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = torch.zeros(1, 3, 4, 4), nn.Conv2d(3, 3, 1)
    with pytest.raises(UsageError, match="no engine 'tensorflow'"):
        engine_named("tensorflow")
    monkeypatch.setattr(exporting.util, "find_spec", lambda module: None)
    for name, extra in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        with pytest.raises(UsageError, match="not installed here") as caught:
            engine_named(name).session(model, (x,), {})
        assert f'pip install "pwrewrite[{extra}]"' in str(caught.value)
    monkeypatch.setattr(tracing, "FUSER", False)
    with pytest.raises(UsageError, match="oneDNN graphs behind TorchScript"):
        choose("frozen", model, (x,), {})
    times = time_everywhere([model], (x,), {}, threads=1)
    assert list(times.times) == ["torch"]
    assert len(times.notes) == 3
    assert choose("auto", model, (x,), {}).name == "torch"


def test_what_does_not_run_is_refused() -> None:
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(RefusedError, match="without weights"):
        engine_named("torch").session(nn.Conv2d(3, 3, 1, device="meta"), (x,), {})

    class ByValue(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(RefusedError, match="cannot be frozen"):
        there("frozen").session(ByValue(), (x,), {})
    with pytest.raises(RefusedError, match="not take the model"):
        there("openvino").session(ByValue(), (x,), {})


def test_auto_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4)
    times = {name: [Timing(seconds, 0.0)] for name, seconds in zip(ENGINE_NAMES, (3.0, 1.0, 2.0, 4.0))}
    monkeypatch.setattr(choosing, "time_everywhere", lambda *given, **how: Times(times, {}, ()))
    assert choose("auto", model, (x,), {}) is engine_named("frozen")
    assert choose(None, model, (x,), {}) is PLAIN


def test_channels_last_is_a_copy() -> None:
    model, x = nn.Conv2d(3, 8, 3), torch.randn(1, 3, 8, 8)
    session = engine_named("torch").session(model, (x,), {})
    (out,) = session(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous(memory_format=torch.channels_last)
    assert "channels_last" in session.ran.precision
