"""The matcher of the zoo sweeps, which knows nothing of the passes, sees what there is to fuse."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.fusing import unfused

from pwrewrite.workflows.fuse import fuse

X = torch.randn(2, 4, 8, 8)


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.norm, self.one, self.way = (
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
            way,
        )

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, one = self.conv, self.norm, self.one
        ways: dict[str, Any] = {
            "norm and relu": lambda: F.relu(norm(conv(x))),
            "relu": lambda: F.relu(conv(x)),
            "before": lambda: one(norm(torch.sin(x))),
            "padded": lambda: conv(norm(torch.sin(x))),
            "sum": lambda: F.relu(conv(x) + x),
            "in place": lambda: F.relu(conv(x).add_(x)),
            "read": lambda: (y := conv(x)) * F.relu(y),
            "sum read": lambda: F.relu((y := conv(x)) + x) * y,
            "sin": lambda: torch.sin(F.elu(conv(x))),
        }
        return ways[self.way]()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "left"),
    [
        ("norm and relu", {"batch_norm": 1}),
        ("relu", {"relu": 1}),
        ("before", {"batch_norm before": 1}),
        ("padded", {}),
        ("sum", {"add+relu": 1}),
        ("in place", {"add+relu": 1}),
        ("read", {}),
        ("sum read", {}),
        ("sin", {}),
    ],
)
def test_what_is_fusible(way: str, left: dict[str, int]) -> None:
    model = Net(way).eval()
    assert unfused(model, (X,)) == Counter(left)
    assert unfused(fuse(model, X, verify=False).model, (X,)) == Counter()
