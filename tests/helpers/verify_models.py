"""Small models and honest rewrites of them, to be broken by the tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pwrewrite.core.plan import Edit, Op
from pwrewrite.core.verification import Check, Verification


class Net(nn.Module):
    """Convolution, norm, an in-place residual, dropout and a classifier."""

    def __init__(self, classes: int = 10, drop: float = 0.2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.conv(x)
        y += x
        y = self.tail(self.relu(y))
        return self.fc(self.drop(self.pool(y).flatten(1)))


def net(seed: int = 0, **settings: Any) -> Net:
    """A seeded network whose norm has seen data."""
    torch.manual_seed(seed)
    model = Net(**settings)
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.3, 0.3)
        model.norm.running_var.uniform_(0.5, 2)
        model.norm.weight.uniform_(0.5, 1.5)
    return model.eval()


def full_rank(conv: nn.Conv2d) -> nn.Sequential:
    """The same convolution as k×k and an orthogonal 1×1 that undoes a rotation of its outputs."""
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(conv.out_channels, conv.out_channels, generator=generator).double())[0]
    core = copy.deepcopy(conv)
    expand = nn.Conv2d(conv.out_channels, conv.out_channels, 1, bias=conv.bias is not None, dtype=torch.float64)
    core.bias = None
    with torch.no_grad():
        weight = conv.weight.double()
        core.weight.copy_(torch.einsum("or,oikl->rikl", rotation, weight))
        expand.weight.copy_(rotation[:, :, None, None])
        if conv.bias is not None:
            expand.bias.copy_(conv.bias)  # type: ignore[union-attr]
    return nn.Sequential(core, expand).to(conv.weight.dtype)


def edited(model: nn.Module, path: str = "conv", *, make: Callable[[Any], nn.Module] = full_rank) -> Any:
    """A copy with one layer replaced."""
    model = copy.deepcopy(model)
    model.set_submodule(path, make(model.get_submodule(path)))
    return model


def rough(model: nn.Module, path: str = "conv", noise: float = 0.05) -> Any:
    """An approximate rewrite: full rank and then some noise."""
    model = edited(model, path)
    generator = torch.Generator().manual_seed(2)
    core = model.get_submodule(path)[0]
    with torch.no_grad():
        core.weight.mul_(1 + noise * torch.randn(core.weight.shape, generator=generator))
    return model


def edit(path: str = "conv", exact: str | None = "both") -> Edit:
    op = Op("factorize", path, "test", {})
    return Edit(op, "module", "bottleneck", None, None, 0, 0, None, exact)


EXACT = (edit(),)
APPROXIMATE = (edit(exact=None),)


def check(verification: Verification, name: str) -> Check:
    """The check of a name."""
    found = [c for c in verification.checks if c.name == name]
    assert len(found) == 1, [c.name for c in verification.checks]
    return found[0]


def failed(verification: Verification) -> set[str]:
    return {c.name for c in verification.failures}
