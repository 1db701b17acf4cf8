"""An analysis as JSON (stable names), as text and as HTML (nothing of the model's gets through unescaped)."""

import json
import platform
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pwrewrite.analysis import Analysis, analyze_capture
from pwrewrite.capturing import capture

KEYS: dict[str, Any] = {
    "schema": "pwrewrite.analysis/1",
    "versions": {"pwrewrite": str, "torch": str, "python": str},
    "model": {"target": str, "class": str, "inputs": [{"name": str, "shape": [int], "dtype": str}]},
    "totals": {
        "params": int,
        "macs": int,
        "flops": int,
        "weight_bytes": int,
        "activation_bytes": int,
        "peak_activation_bytes": int,
        "critical_path_macs": int,
    },
    "layers": [
        {
            "path": str,
            "aliases": [str],
            "op": str,
            "kernel": [int],
            "stride": [int],
            "padding": [[int]],
            "dilation": [int],
            "groups": int,
            "in_channels": int,
            "out_channels": int,
            "functional": bool,
            "params": int,
            "macs": int,
            "flops": int,
            "share": float,
            "cumulative_share": float,
            "hotspot": bool,
            "weight_bytes": int,
            "activation_bytes": int,
            "intensity": float,
            "bound": str,
            "seconds": float,
            "receptive_field": [int],
            "sees_whole_input": bool,
            "calls": [{"node": str, "input_shape": [int], "output_shape": [int], "macs": int, "island": str}],
            "break_even": {
                "macs_rank_in": int,
                "macs_rank_out": int,
                "params_rank_in": int,
                "params_rank_out": int,
                "half_macs": int,
                "half_params": int,
            },
            "skip": {"reason": str, "detail": str},
        }
    ],
    "by_op": [
        {"op": str, "calls": int, "params": int, "macs": int, "flops": int, "read_bytes": int, "write_bytes": int}
    ],
    "peak": {
        "bytes": int,
        "node": str,
        "path": str,
        "tensors": [{"node": str, "path": str, "shape": [int], "bytes": int}],
    },
    "critical_path": {"macs": int, "nodes": [str], "off_path_share": float},
    "roofline": {
        "device": str,
        "macs_per_s": float,
        "bytes_per_s": float,
        "ridge": float,
        "seconds": float,
        "memory_bound_share": float,
    },
    "modules": [{"path": str, "kind": str, "depth": int, "params": int, "macs": int}],
    "coverage": {
        "capture": str,
        "convolutions": int,
        "in_graph": int,
        "unpriced": [{"op": str, "calls": int}],
        "values": str,
    },
    "notes": [str],
}
"""The schema. A name that goes from here is a new version of the schema, not an edit of this test."""

NULLABLE = {"kernel", "stride", "padding", "dilation", "groups", "receptive_field", "break_even", "skip"}


def conforms(value: Any, shape: Any, where: str = "") -> None:
    """Compares data with its schema, keys and their order included."""
    if isinstance(shape, dict):
        assert list(value) == list(shape), where
        for key, inner in shape.items():
            if not (value[key] is None and key in NULLABLE):
                conforms(value[key], inner, f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for i, item in enumerate(value):
            conforms(item, shape[0], f"{where}[{i}]")
    elif isinstance(shape, type):
        assert type(value) is shape, where
    else:
        assert value == shape, where


class Net(nn.Module):
    """A shared dense convolution, a linear map and a layer that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.same = self.conv
        self.head = nn.Linear(4, 3)
        self.unused = nn.Conv1d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.same(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyze_capture(capture(Net(), torch.zeros(2, 4, 8, 8)), target="net.py:Net")


def test_names_are_stable(analysis: Analysis) -> None:
    data = json.loads(analysis.to_json())
    conforms(data, KEYS)
    assert data == analysis.to_dict() == json.loads(analysis.to_json(indent=None))


def test_values(analysis: Analysis) -> None:
    data = analysis.to_dict()
    assert data["versions"]["torch"] == torch.__version__
    assert data["versions"]["python"] == platform.python_version()
    assert data["model"] == {
        "target": "net.py:Net",
        "class": f"{Net.__module__}.Net",
        "inputs": [{"name": "x", "shape": [2, 4, 8, 8], "dtype": "float32"}],
    }
    totals = data["totals"]
    assert totals["params"] == sum(p.numel() for p in Net().parameters())
    assert totals["macs"] == 2 * 128 * 144 + 2 * 12
    assert totals["flops"] == 2 * totals["macs"]
    assert totals["critical_path_macs"] == totals["macs"]
    assert totals["peak_activation_bytes"] == data["peak"]["bytes"]
    conv, head, unused = data["layers"]
    assert (conv["path"], conv["aliases"], conv["kernel"]) == ("conv", ["same"], [3, 3])
    assert [call["macs"] for call in conv["calls"]] == [128 * 144] * 2
    assert conv["calls"][0] == {
        "node": "conv",
        "input_shape": [2, 4, 8, 8],
        "output_shape": [2, 4, 8, 8],
        "macs": 128 * 144,
        "island": "",
    }
    assert conv["flops"] == 2 * conv["macs"]
    assert conv["skip"] is None
    assert head["kernel"] is head["break_even"] is None
    assert head["skip"]["reason"] == "pointwise"
    assert (unused["calls"], unused["macs"], unused["receptive_field"]) == ([], 0, None)
    assert data["coverage"] == {
        "capture": "whole",
        "convolutions": 2,
        "in_graph": 1,
        "unpriced": [],
        "values": "meta",
    }
    assert [row["path"] for row in data["modules"]] == ["", "conv", "head", "unused"]


def test_a_model_of_known_cost(torchvision_capture) -> None:
    analysis = analyze_capture(torchvision_capture("resnet50"))
    assert analysis.target == "ResNet"
    assert (analysis.params, analysis.macs, analysis.flops) == (25_557_032, 4_089_184_256, 8_178_368_512)
    assert len(analysis.layers) == 54
    assert sum(total.macs for total in analysis.by_op) == analysis.tree.macs == analysis.macs
    assert analysis.tree.params == analysis.params
    conforms(json.loads(analysis.to_json()), KEYS)


def test_the_model_may_be_empty() -> None:
    analysis = analyze_capture(capture(nn.Identity(), torch.zeros(1)))
    conforms(json.loads(analysis.to_json()), KEYS)
    assert "no convolution" in str(analysis)
