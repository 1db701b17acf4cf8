"""A small analysis made by hand, so that what is rendered does not depend on how it was found."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pwrewrite.analysis.records import (
    Analysis,
    BreakEven,
    CriticalPath,
    LayerReport,
    LiveTensor,
    OpTotal,
    Peak,
    Roofline,
    TreeNode,
)
from pwrewrite.capturing.records import Call, Coverage, Layer
from pwrewrite.core.convolution import ConvSpec
from pwrewrite.core.cost import Cost
from pwrewrite.core.plan import Skip, SkipReason

Make = Callable[..., Analysis]


def convolution(
    path: str,
    channels: tuple[int, int],
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    *,
    stride: int = 1,
    groups: int = 1,
    calls: int = 1,
    aliases: tuple[str, ...] = (),
) -> Layer:
    """A layer with its calls, padded so that the output has ``size``."""
    dims = len(kernel)
    spec = ConvSpec(
        *channels,
        kernel,
        (stride,) * dims,
        tuple(((k - 1) // 2, (k - 1) // 2) for k in kernel),
        (1,) * dims,
        groups,
        bias=False,
        output_padding=(0,) * dims,
    )
    before = (1, channels[0], *(n * stride for n in size))
    after = (1, channels[1], *size)
    cost = Cost(macs=spec.macs(before, after))
    made = tuple(Call(path, f"node_{i}", before, after, cost) for i in range(calls))
    return Layer(path, aliases, spec.op, *channels, spec.params, 4 * spec.params, spec, False, f"{path}.weight", made)


def linear(path: str, channels: tuple[int, int]) -> Layer:
    params = channels[0] * channels[1]
    call = Call(path, "fc", (1, channels[0]), (1, channels[1]), Cost(macs=params))
    return Layer(path, (), "linear", *channels, params, 4 * params, None, False, f"{path}.weight", (call,))


def make(names: tuple[str, str, str] = ("stem", "blocks.10.conv", "blocks.2.reduce"), **changes: object) -> Analysis:
    """The analysis, with three paths of one's own and fields changed at will."""
    stem, middle, reduce = names
    layers = [
        (convolution(middle, (64, 128), (3, 3), (28, 28), stride=2, calls=2, aliases=("blocks.11.conv",)), None),
        (convolution(stem, (3, 64), (7, 7), (56, 56), stride=2), Skip(stem, SkipReason.TOO_SMALL, "3 channels in")),
        (convolution("blocks.3.mix", (64, 64), (5,), (784,), groups=2), Skip("", SkipReason.SHARED_WEIGHT, "shared")),
        (convolution(reduce, (128, 32), (1, 1), (28, 28)), Skip(reduce, SkipReason.POINTWISE, "a 1×1 convolution")),
        (linear("fc", (32, 1000)), Skip("fc", SkipReason.WRONG_FORM, "linear | not a [convolution]")),
        (convolution("unused", (8, 8), (3, 3), (1, 1), calls=0), Skip("unused", SkipReason.NOT_CALLED, "not called")),
    ]
    macs = sum(layer.macs for layer, _ in layers)
    running, reports = 0.0, []
    for layer, skip in layers:
        share = layer.macs / macs
        running += share
        found = None if skip else BreakEven(47, 94, 52, 104, layer.macs * 4 // 10, layer.params // 3)
        hot = layer.spec is not None and layer.spec.is_dense_spatial and share >= 0.01
        reports.append(
            LayerReport(
                layer,
                share,
                running,
                hot,
                found,
                skip,
                (31, 31) if layer.called else None,
                ("compute" if share > 0.1 else "memory") if layer.called else "",
                12.5 if layer.called else 0.0,
                1e-5,
                4 * layer.out_channels * 784 * len(layer.calls),
            )
        )
    tree = TreeNode(
        "",
        "Net",
        320_000,
        macs,
        (
            TreeNode(stem, "Conv2d", 9_408, layers[1][0].macs),
            TreeNode("relu", "ReLU", 0, 0),
            TreeNode(
                "blocks",
                "Sequential",
                250_000,
                macs - layers[1][0].macs - 32_000,
                (
                    TreeNode("blocks.2", "Block", 4_096, layers[3][0].macs),
                    TreeNode("blocks.3", "Block", 10_240, layers[2][0].macs),
                    TreeNode("blocks.10", "Block", 73_728, layers[0][0].macs),
                ),
            ),
            TreeNode("fc", "Linear", 32_000, 32_000),
            TreeNode("unused", "Conv2d", 576, 0),
        ),
    )
    fields: dict[str, object] = {
        "target": "net.py",
        "model_class": "net.Net",
        "inputs": ({"name": "x", "shape": [1, 3, 112, 112], "dtype": "float32"},),
        "params": 320_000,
        "macs": macs,
        "weight_bytes": 1_280_000,
        "activation_bytes": 5_000_000,
        "peak": Peak(
            1_605_632,
            "relu",
            "relu",
            (
                LiveTensor("stem", stem, (1, 64, 56, 56), 802_816),
                LiveTensor("relu", "relu", (1, 64, 56, 56), 802_816),
            ),
        ),
        "critical_path": CriticalPath(macs * 3 // 4, ("stem", "conv", "fc"), 0.25),
        "roofline": Roofline("cpu", 5e10, 2e10, 2.5, 0.0025, 0.4),
        "layers": tuple(reports),
        "by_op": (
            OpTotal("conv2d", 4, 87_000, macs - 16_000_000, 1_000_000, 900_000),
            OpTotal("conv1d", 1, 10_240, 16_000_000 - 32_000, 300_000, 200_000),
            OpTotal("linear", 1, 32_000, 32_000, 128_128, 4_000),
            OpTotal("batch_norm", 4, 640, 0, 900_000, 900_000),
            OpTotal("relu", 4, 0, 0, 800_000, 800_000),
            OpTotal("flatten", 1, 0, 0, 0, 0),
        ),
        "tree": tree,
        "coverage": Coverage("whole", 5, 4, (("mylib::correlate", 2),), "meta"),
        "notes": ("input guessed from the first convolution",),
    }
    return Analysis(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def make_analysis() -> Make:
    return make


@pytest.fixture
def analysis() -> Analysis:
    return make()


@pytest.fixture
def same_as_golden() -> Callable[[str, str], None]:
    """Compares a text with a file in `tests/golden`; UPDATE_GOLDEN=1 in the environment writes the file instead."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent.parent / "golden" / name
        if os.environ.get("UPDATE_GOLDEN"):
            path.write_bytes(text.encode())
        assert text.encode() == path.read_bytes(), f"{name} differs; if that is meant, run with UPDATE_GOLDEN=1"

    return check
