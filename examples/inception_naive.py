"""The naive Inception module: figure 2(a) of GoogLeNet, with the widths of block 3a.

Szegedy et al., "Going Deeper with Convolutions", 2014 (arXiv:1409.4842). Three convolutions and a max-pool look at the
same 192×28×28 map and their outputs are joined: 64 + 128 + 32 + 192 = 416 channels, wider than what came in, from
387,072 weights. `inception_reduced.py` is the cure that the paper proposes.

The ReLU stands behind the concatenation, where it is the same as one behind every convolution (and changes nothing
for the pool, whose input is already rectified inside GoogLeNet). That leaves the pool's output a free place to put a
1×1 projection, which is then rectified like its neighbours.
"""

import torch
import torch.nn.functional as F
from torch import nn


class NaiveInception(nn.Module):
    """1×1, 3×3 and 5×5 convolutions and a 3×3 max-pool side by side, joined along the channels."""

    def __init__(self, in_channels: int, ch1x1: int, ch3x3: int, ch5x5: int) -> None:
        super().__init__()
        self.b1 = nn.Conv2d(in_channels, ch1x1, kernel_size=1, bias=False)
        self.b3 = nn.Conv2d(in_channels, ch3x3, kernel_size=3, padding=1, bias=False)
        self.b5 = nn.Conv2d(in_channels, ch5x5, kernel_size=5, padding=2, bias=False)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=1, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(torch.cat([self.b1(x), self.b3(x), self.b5(x), self.pool(x)], dim=1))


def build_model() -> nn.Module:
    return NaiveInception(192, ch1x1=64, ch3x3=128, ch5x5=32)


def example_inputs() -> tuple[torch.Tensor, ...]:
    return (torch.zeros(1, 192, 28, 28),)
