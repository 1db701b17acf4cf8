"""The Inception module with dimension reduction: figure 2(b) of GoogLeNet, with the widths of block 3a.

Szegedy et al., "Going Deeper with Convolutions", 2014 (arXiv:1409.4842). A 1×1 convolution narrows the 192 channels to
96 before the 3×3 and to 16 before the 5×5, and projects the max-pool's output to 32: 256 channels out, from 163,328
weights where the naive module (`inception_naive.py`) has 387,072.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Inception(nn.Module):
    """Four branches joined along the channels; `ch3x3` and `ch5x5` are pairs (reduced width, output width)."""

    def __init__(
        self, in_channels: int, ch1x1: int, ch3x3: tuple[int, int], ch5x5: tuple[int, int], pool_proj: int
    ) -> None:
        super().__init__()
        self.b1 = nn.Conv2d(in_channels, ch1x1, kernel_size=1, bias=False)
        self.b3_reduce = nn.Conv2d(in_channels, ch3x3[0], kernel_size=1, bias=False)
        self.b3 = nn.Conv2d(ch3x3[0], ch3x3[1], kernel_size=3, padding=1, bias=False)
        self.b5_reduce = nn.Conv2d(in_channels, ch5x5[0], kernel_size=1, bias=False)
        self.b5 = nn.Conv2d(ch5x5[0], ch5x5[1], kernel_size=5, padding=2, bias=False)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=1, padding=1)
        self.pool_proj = nn.Conv2d(in_channels, pool_proj, kernel_size=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b1 = F.relu(self.b1(x))
        b3 = F.relu(self.b3(F.relu(self.b3_reduce(x))))
        b5 = F.relu(self.b5(F.relu(self.b5_reduce(x))))
        pool = F.relu(self.pool_proj(self.pool(x)))
        return torch.cat([b1, b3, b5, pool], dim=1)


def build_model() -> nn.Module:
    return Inception(192, ch1x1=64, ch3x3=(96, 128), ch5x5=(16, 32), pool_proj=32)


def example_inputs() -> tuple[torch.Tensor, ...]:
    return (torch.zeros(1, 192, 28, 28),)
