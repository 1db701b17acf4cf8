"""A small CNN for handwritten digits, trained in a minute: the tutorial of the README begins here.

    python examples/digits.py        # writes digits.pt and digits.npz into the current directory

The 1,797 digits come with scikit-learn: nothing is downloaded. The 8×8 images are interpolated, so that there is
something to compute. ``digits.pt`` holds the trained weights, ``digits.npz`` images and labels that the network has not
seen: ``pwrewrite compress`` calibrates on four in five of them and measures on the rest.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DigitsNet(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = self.block(1, width)
        self.body = nn.Sequential(self.block(width, width), self.block(width, 2 * width, stride=2))
        self.tail = nn.Sequential(self.block(2 * width, 2 * width), self.block(2 * width, 4 * width, stride=2))
        self.classifier = nn.Linear(4 * width, 10)

    @staticmethod
    def block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.tail(self.body(self.stem(x))).mean((2, 3)))


def build_model() -> nn.Module:
    return DigitsNet()


def example_inputs() -> tuple[Tensor, ...]:
    return (torch.zeros(1, 1, 24, 24),)


def digits() -> tuple[Tensor, Tensor]:
    """All images as ``(1797, 1, 24, 24)`` from 0 to 1, in an order that mixes the writers, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.from_numpy(data.images[order]).float()[:, None] / 16
    return F.interpolate(images, size=(24, 24), mode="bilinear"), torch.from_numpy(data.target[order])


def train(model: nn.Module, images: Tensor, classes: Tensor, epochs: int = 2, rate: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * -(-len(images) // 16))
    model.train()
    for epoch in range(epochs):
        for batch in torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).split(16):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def main() -> None:
    torch.manual_seed(0)
    model, (images, classes) = build_model(), digits()
    train(model, images[:1200], classes[:1200])
    with torch.no_grad():
        right = (model(images[1200:]).argmax(1) == classes[1200:]).float().mean()
    torch.save(model.state_dict(), "digits.pt")
    np.savez("digits.npz", images=images[1200:].numpy(), labels=classes[1200:].numpy())
    print(f"{right:.1%} of {len(images) - 1200} digits that it has not seen; written: digits.pt, digits.npz")


if __name__ == "__main__":
    main()
