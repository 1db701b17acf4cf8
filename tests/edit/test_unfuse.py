"""Fused models become plain again, and other tools find their layers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import pwrewrite
from pwrewrite.layers import PointwiseActivation

torchvision_models = pytest.importorskip("torchvision.models")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "efficientnet_b0"])
def test_plain_layers_compute_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision_models.get_model(name, weights=None).eval()
    x = torch.randn(2, 3, 64, 64)
    fused = pwrewrite.fuse(model, x, thorough=False).model
    before = copy.deepcopy(fused.state_dict())
    plain = pwrewrite.unfuse(fused)
    assert not any(isinstance(module, PointwiseActivation) for module in plain.modules())
    assert any(isinstance(module, PointwiseActivation) for module in fused.modules())
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())
    kinds = (nn.Conv2d, nn.Linear, PointwiseActivation)
    counts = [sum(isinstance(module, kinds) for module in each.modules()) for each in (fused, plain)]
    assert counts[0] == counts[1]
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-3, atol=1e-4)


def test_fx_quantization_finds_every_layer() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    torch.manual_seed(0)
    model = torchvision_models.mobilenet_v2(width_mult=0.35).eval()
    x = torch.randn(1, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = quantization.get_default_qconfig_mapping("fbgemm")

        def layers(module: nn.Module) -> int:
            prepared = fx.prepare_fx(copy.deepcopy(module), mapping, (x,))
            prepared(x)
            converted = fx.convert_fx(prepared)
            return sum("quantized" in type(m).__module__ and hasattr(m, "weight") for m in converted.modules())

        assert layers(pwrewrite.unfuse(pwrewrite.fuse(model, x, thorough=False).model)) == layers(model) == 53


def test_a_model_without_fused_layers_is_only_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    plain = pwrewrite.unfuse(model)
    assert plain is not model
    assert [type(m) for m in plain] == [nn.Conv2d, nn.ReLU]  # type: ignore[attr-defined]
