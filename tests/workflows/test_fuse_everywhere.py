"""A fused model wherever a model goes: compiled, exported, in half precision, at other sizes, trained on."""

from __future__ import annotations

import copy
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pwrewrite.layers import PointwiseActivation
from pwrewrite.passes import ChannelsLast, FusePointwiseActivation, RemoveInferenceNoise
from pwrewrite.workflows.fuse import fuse

X = torch.randn(2, 3, 16, 16)


class Block(nn.Module):
    """A residual block of one ReLU, with squeeze and excitation and a norm in code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.squeeze, self.excite = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.last, self.relu = nn.Conv2d(channels, channels, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn2
        out = self.relu(self.bn1(self.conv1(x)))
        out = F.batch_norm(self.conv2(out), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training)
        gate = self.excite(F.silu(self.squeeze(out.mean((2, 3), keepdim=True)))).sigmoid()
        out = self.last(out * gate)
        out += x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.Hardswish())
        self.blocks = nn.Sequential(Block(16), nn.Dropout(0.1), Block(16))
        self.head = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Dropout(), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """A model and the same fused; copies are to be changed."""
    model = net()
    done = fuse(model, X)
    assert done.report.passed, done.report.verification
    assert {e.method for e in done.edits} >= {"fold", "add+relu", "hardswish", "silu", "gelu", "channels-last"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in done.model.modules())
    return model, done.model


def close(a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    # Some ten layers of float32 sums in another order; values are of the order of 1.
    torch.testing.assert_close(a, b, rtol=1e-4 * factor, atol=1e-5 * factor)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (5, 3, 16, 16), (2, 3, 21, 34), (3, 3, 9, 11)])
def test_other_batches_and_sizes(models: tuple[nn.Module, nn.Module], shape: tuple[int, ...]) -> None:
    model, fused = models
    x = torch.randn(shape)
    for form in (torch.contiguous_format, torch.channels_last):
        with torch.inference_mode():
            close(fused(x.to(memory_format=form)), model(x))


@pytest.mark.timeout(300)
def test_compiled(models: tuple[nn.Module, nn.Module]) -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    model, fused = models
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(copy.deepcopy(fused), fullgraph=True)
        close(compiled(X), model(X))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_saved_and_reloaded(models: tuple[nn.Module, nn.Module], strict: bool) -> None:
    model, fused = models
    sizes = {0: torch.export.Dim("n", min=2), 2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    file = io.BytesIO()
    torch.export.save(torch.export.export(fused, (X,), dynamic_shapes=(sizes,), strict=strict), file)
    file.seek(0)
    again = torch.export.load(file).module()
    for x in (X, torch.randn(4, 3, 22, 17)):
        with torch.no_grad():
            close(again(x), model(x))


def test_onnx(models: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    model, fused = models
    path = tmp_path / "model.onnx"
    torch.onnx.export(fused, (X,), str(path), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("n")},))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for x in (X, torch.randn(3, 3, 16, 16)):
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        close(torch.from_numpy(out), model(x).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [False, True])
def test_half_precision(models: tuple[nn.Module, nn.Module], dtype: torch.dtype, first: bool) -> None:
    """Fused and then made half, or made half and then fused: not twice as far from the truth as the original."""
    model, fused = models
    low = copy.deepcopy(model).to(dtype)
    half = fuse(low, X.to(dtype), verify=False).model if first else copy.deepcopy(fused).to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(X.double())
        own, ours = (float((m(X.to(dtype)).double() - exact).norm()) for m in (low, half))
    assert half(X.to(dtype)).dtype is dtype
    assert ours <= 2 * own + 4 * torch.finfo(dtype).eps * float(exact.norm())


def test_autocast(models: tuple[nn.Module, nn.Module]) -> None:
    model, fused = models
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = model(X), fused(X)
    assert a.dtype is b.dtype
    torch.testing.assert_close(b.float(), a.float(), rtol=0.05, atol=0.05)  # 8 bits, ten layers


def without_norms() -> nn.Module:
    """A model whose training mode is deterministic."""
    model = net()
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)) and "bn2" not in name:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Identity())
    return model.train()


def test_training_goes_on_as_it_would_have() -> None:
    model = without_norms()
    done = fuse(model, X, [FusePointwiseActivation(), ChannelsLast()])
    assert done.report.passed, done.report.verification
    assert sum(isinstance(m, PointwiseActivation) for m in done.model.modules()) > 5
    assert list(done.model.state_dict()) == list(model.state_dict())
    pair: list[Any] = [model, done.model]
    steps = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in pair]
    for _ in range(3):
        losses = []
        for m, step in zip(pair, steps):
            step.zero_grad()
            loss = F.cross_entropy(m(X), torch.tensor([1, 3]))
            loss.backward()
            step.step()
            losses.append(loss.detach())
        close(losses[1], losses[0], 10)
    for (name, a), b in zip(model.state_dict().items(), done.model.state_dict().values()):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)
    for m in pair:
        m.eval()
    with torch.no_grad():  # and the kernels see the trained weights
        close(done.model(X), model(X), 10)


def test_a_training_model_with_exact_passes_only() -> None:
    model = net().train()
    done = fuse(model, X, [FusePointwiseActivation()])
    assert done.model.training
    assert {e.exact for e in done.edits} == {"both"}
    eval_only = RemoveInferenceNoise()
    assert eval_only.exact == "eval"
