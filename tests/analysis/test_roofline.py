"""Roofline classes: hand-computed intensities against stated devices."""

from types import MappingProxyType

import pytest
import torch
from torch import nn

from pwrewrite.analysis import DEVICES, DeviceProfile, analyze_capture, device_profile
from pwrewrite.analysis.devices import bound
from pwrewrite.analysis.roofline import roofline
from pwrewrite.capturing import NodeInfo, TensorSpec, capture
from pwrewrite.core.cost import Cost
from pwrewrite.core.errors import UsageError

TOY = DeviceProfile(
    "toy", "for tests", MappingProxyType({torch.float32: 100.0, torch.float16: 400.0}), 10.0, "made up: ridge 10"
)


def node(macs: int, read: int, write: int, dtype: torch.dtype = torch.float32) -> NodeInfo:
    return NodeInfo("conv2d", "", (), (TensorSpec((1,), dtype),), Cost(0, macs, read, write))


def test_the_ridge_divides() -> None:
    assert TOY.ridge(torch.float32) == 10.0
    assert bound(999, 100, torch.float32, TOY).bound == "memory"
    assert bound(1000, 100, torch.float32, TOY).bound == "compute"
    found = bound(500, 100, torch.float32, TOY)
    assert (found.intensity, found.seconds) == (5.0, 10.0)
    assert bound(2000, 100, torch.float32, TOY).seconds == 20.0


def test_a_faster_dtype_has_a_higher_ridge() -> None:
    assert TOY.ridge(torch.float16) == 40.0
    assert bound(2000, 100, torch.float16, TOY).bound == "memory"
    assert TOY.peak(torch.int8) == TOY.peak(torch.float32)


def test_nothing_runs() -> None:
    found = bound(0, 0, torch.float32, TOY)
    assert (found.bound, found.intensity, found.seconds) == ("", 0.0, 0.0)


def test_nodes_add_up() -> None:
    found = roofline([node(2000, 50, 50), node(0, 30, 20), node(0, 0, 0)], TOY)
    assert found.seconds == 20.0 + 5.0
    assert found.memory_bound_share == pytest.approx(5.0 / 25.0)
    assert (found.macs_per_s, found.bytes_per_s, found.ridge) == (100.0, 10.0, 10.0)


def test_the_main_dtype_is_that_of_most_macs() -> None:
    found = roofline([node(10, 1, 1), node(2000, 1, 1, torch.float16)], TOY)
    assert found.macs_per_s == 400.0


def test_devices_are_told_by_name() -> None:
    assert device_profile("A100") is DEVICES["a100"]
    assert device_profile(TOY) is TOY
    with pytest.raises(UsageError, match="'a1000'") as caught:
        device_profile("a1000")
    assert "a100" in str(caught.value)


@pytest.mark.parametrize("name", DEVICES)
def test_every_profile_has_its_figures_and_their_source(name: str) -> None:
    profile = DEVICES[name]
    assert profile.name == name
    assert profile.label
    assert len(profile.source) > 40
    assert profile.bytes_per_s > 1e10
    assert 1.0 < profile.ridge(torch.float32) < 1000.0
    assert profile.peak(torch.float16) >= profile.peak(torch.float32)
    assert profile.peak(torch.float64) <= profile.peak(torch.float32)


def test_a_wide_convolution_computes_and_a_depthwise_one_waits() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, groups=64))
    analysis = analyze_capture(capture(model, torch.zeros(1, 64, 32, 32)), device=TOY)
    dense, depthwise = analysis.layers
    nbytes = 4 * (2 * 64 * 1024 + 64 * 64 * 9 + 64)
    assert dense.intensity == pytest.approx(1024 * 64 * 64 * 9 / nbytes)
    assert (dense.bound, depthwise.bound) == ("compute", "memory")
    assert dense.seconds == pytest.approx(1024 * 64 * 64 * 9 / 100.0)
    assert analysis.device == "toy"
    assert analysis.roofline.seconds == pytest.approx(dense.seconds + depthwise.seconds)


def test_half_precision_moves_half_the_bytes() -> None:
    model = nn.Conv2d(8, 8, 3)
    full = analyze_capture(capture(model, torch.zeros(1, 8, 8, 8))).layers[0].intensity
    half = analyze_capture(capture(model.half(), torch.zeros(1, 8, 8, 8).half())).layers[0].intensity
    assert half == pytest.approx(2 * full)
