"""Small networks of every kind, and one that is trained on scikit-learn's digits while the tests run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Counted:
    runs = 0


class Net(nn.Module):
    """Three convolutions and a head; counts the runs on more than one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.body = nn.Conv2d(12, 16, 3, padding=1)
        self.tail = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 5)
        self._counted = _Counted()  # which stays, where attributes are put back

    @property
    def runs(self) -> int:
        return self._counted.runs

    def forward(self, x: Tensor) -> Tensor:
        self._counted.runs += x.shape[0] > 1
        x = F.relu(self.body(F.relu(self.norm(self.stem(x)))))
        found: Tensor = self.head(F.relu(self.tail(x)).mean((2, 3)))
        return found


class Shared(nn.Module):
    """A convolution that is called three times, and one with a weight of its own called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.again = nn.Conv2d(12, 12, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(12, 12, 3, 3) / 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + F.relu(self.again(x))
        return F.conv2d(x, self.kernel, padding=1)


class Pair(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(4, 12, 3, padding=1)
        self.both = nn.Conv2d(24, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.both(F.relu(torch.cat([self.left(image), self.right(mask)], 1)))
        return {"map": x, "scores": self.head(x.mean((2, 3)))}


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 6))


def _grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 8, 1),
    )  # fmt: skip


def _transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(12, 12, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(12, 4, 3, padding=1),
    )  # fmt: skip


def _one_dim() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 16, 5, padding=2))


def _three_dims() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1))


IMAGE, MAP = (3, 10, 10), (4, 10, 10)

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "plain": (Net, (IMAGE,)),
    "shared": (Shared, (IMAGE,)),
    "two inputs": (Pair, (IMAGE, MAP)),
    "linear": (_mlp, ((24,),)),
    "grouped": (_grouped, (IMAGE,)),
    "transposed": (_transposed, (IMAGE,)),
    "1-D": (_one_dim, ((4, 20),)),
    "3-D": (_three_dims, ((2, 6, 6, 6),)),
}
"""Name to what makes a network, and the shapes of its inputs without their batch dim."""


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network in eval mode, always with the same weights, and its example inputs."""
    make, shapes = KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval(), tuple(torch.zeros(1, *shape) for shape in shapes)


def batches(name: str = "plain", count: int = 4, size: int = 16, seed: int = 1) -> list[Any]:
    """Calibration batches for a network: tensors, or tuples where it has several inputs."""
    generator = torch.Generator().manual_seed(seed)
    found = [tuple(torch.randn(size, *s, generator=generator) for s in KINDS[name][1]) for _ in range(count)]
    return [batch[0] if len(batch) == 1 else batch for batch in found]


class Digits(nn.Module):
    """A small network for images of 8×8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 24, 3, padding=1, stride=2)
        self.conv4 = nn.Conv2d(24, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        found: Tensor = self.head(F.relu(self.conv4(F.relu(self.conv3(x)))).mean((2, 3)))
        return found


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images and their classes, shuffled; the first 1000 are for training."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images[order], torch.tensor(data.target)[order]


@cache
def trained() -> Digits:
    """The small network, trained for a second or two; the tests leave it as it is."""
    images, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Digits()
        optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
        for _ in range(6):
            for some in torch.randperm(1000).split(50):
                loss = F.cross_entropy(model(images[some]), labels[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


def calibration_digits() -> list[Tensor]:
    """Digits that were not trained on: 300 of them."""
    return list(digits()[0][1000:1300].split(50))


def scored(model: nn.Module) -> tuple[float, float]:
    """Accuracy on the digits that are left, and the KL divergence from the trained network."""
    images, labels = (part[1300:] for part in digits())
    with torch.no_grad():
        before, after = (one.eval()(images).double().log_softmax(1) for one in (trained(), model))
    right = float((after.argmax(1) == labels).double().mean())
    return right, float((before.exp() * (before - after)).sum(1).mean())
