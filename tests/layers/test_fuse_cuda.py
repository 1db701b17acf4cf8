"""The fused kernels on CUDA: the same values as the plain layer, and taken where they should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.forms.specs import linear_spec
from pwrewrite.layers import PointwiseActivation
from pwrewrite.workflows.fuse import fuse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# The tolerance is that of one rounding of inputs, weights and results each, of values of the order of 1; float32 is
# computed with TF32 off.
CASES = [(torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)]
LAYERS = [
    nn.Conv2d(32, 64, 1),
    nn.Conv2d(32, 64, 3, stride=2, padding=1),
    nn.Conv2d(32, 32, 3, padding=1, groups=32),
    nn.Conv2d(32, 64, 7, padding=3),
    nn.Conv2d(32, 64, 1, bias=False),
    nn.Linear(32, 64),
]


@pytest.fixture(autouse=True)
def exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "none"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_same_values(layer: Any, channels_last: bool, activation: str, dtype: torch.dtype, tolerance: float) -> None:
    linear = isinstance(layer, nn.Linear)
    spec = linear_spec(32, 64, True) if linear else ConvSpec.of_module(layer)
    made = PointwiseActivation.of_layer(layer, spec, activation, channels_last=channels_last).to("cuda", dtype)
    x = torch.randn((4, 9, 32) if linear else (4, 32, 14, 10))
    act = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "none": lambda t: t}[activation]
    with torch.no_grad():
        wanted = act(layer.cpu().float()(x))
        found = made(x.to("cuda", dtype))
        assert found.dtype is dtype
        torch.testing.assert_close(found.float().cpu(), wanted, rtol=tolerance, atol=tolerance)
        if not linear:
            other = torch.randn(wanted.shape)
            before = layer(x) + other
            added = made(x.to("cuda", dtype), other.to("cuda", dtype))
            torch.testing.assert_close(added.float().cpu(), act(before), rtol=tolerance, atol=tolerance)
    layer.float()


def test_kernels_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    real = PointwiseActivation._on_cuda
    watched = lambda *a: (taken.append((out := real(*a)) is not None), out)[1]
    monkeypatch.setattr(PointwiseActivation, "_on_cuda", watched)
    x = torch.randn(2, 32, 8, 8, device="cuda")
    for layer, wanted in ((LAYERS[0], True), (LAYERS[1], True), (LAYERS[3], False), (LAYERS[4], False)):
        made = PointwiseActivation.of_layer(layer, ConvSpec.of_module(layer), "relu", channels_last=True).cuda()
        with torch.no_grad():
            made(x)
        assert taken.pop() is wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_whole_network(dtype: torch.dtype) -> None:
    torchvision = pytest.importorskip("torchvision", reason="the extra 'zoo' is not installed")
    model = torchvision.models.resnet18().eval().to("cuda", dtype)
    x = torch.rand(2, 3, 64, 64, device="cuda", dtype=dtype)
    done = fuse(model, x, thorough=False)
    assert done.report.passed, done.report.verification
