"""Convolutions and linear maps whose sizes are no plain integers or tuples, as torch takes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

import pwrewrite


def numbers() -> nn.Module:
    """Sizes that NumPy worked out."""
    n = np.int64
    return nn.Sequential(
        nn.Conv2d(3, n(16), (n(3), n(3)), n(2), n(1)),
        nn.BatchNorm2d(n(16)),
        nn.ReLU(),
        nn.Conv2d(n(16), n(16), n(3), padding=n(1), groups=n(4)),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, n(32), 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(n(32), n(10)),
    )


def lists() -> nn.Module:
    """Sizes that code sets later, to a list or to one number."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
    model[0].stride = [2, 2]  # type: ignore[assignment]
    model[3].dilation, model[3].padding, model[3].stride = 2, [1], 1  # type: ignore[assignment]
    return model


def plain(model: nn.Module) -> nn.Module:
    """The same with tuples of Python's integers."""
    layers: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.Conv2d):
            stride, padding, dilation = (
                [int(n) for n in np.broadcast_to(value, 2)] for value in (child.stride, child.padding, child.dilation)
            )
            sizes = int(child.in_channels), int(child.out_channels), [int(n) for n in child.kernel_size]
            layers.append(nn.Conv2d(*sizes, tuple(stride), tuple(padding), tuple(dilation), int(child.groups)))  # type: ignore[arg-type]
        else:
            layers.append(nn.Linear(32, 10) if isinstance(child, nn.Linear) else child)
    return nn.Sequential(*layers)


def check(model: nn.Module, folder: Path) -> None:
    x = torch.randn(1, 3, 33, 33)
    model = model.eval()
    analysis = pwrewrite.analyze(model, x).to_dict()
    json.dumps(analysis)
    assert analysis["totals"] == pwrewrite.analyze(plain(model).eval(), x).to_dict()["totals"]
    fused = pwrewrite.fuse(model, x)
    assert fused.report.passed
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.model.modules())
    made = pwrewrite.rewrite(model, x, passes=["insert-bottleneck", "narrow"], rank=0.5, min_gain=0)
    assert made.edits
    made.save(folder)
    assert torch.equal(pwrewrite.load(folder, model)(x), made.model(x))


def test_numbers_of_numpy(tmp_path: Path) -> None:
    check(numbers(), tmp_path / "out")


def test_lists_and_single_numbers(tmp_path: Path) -> None:
    check(lists(), tmp_path / "out")
