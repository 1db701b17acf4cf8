"""MobileNet (version 1): every convolution but the first split into a depthwise 3×3 and a pointwise 1×1.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017
(arXiv:1704.04861), table 1 and figure 3 (right), width multiplier 1. ReLU6 as in the authors' own implementation.
Some 95% of the work is already in 1×1 convolutions.
"""

from collections import OrderedDict

import torch
from torch import nn

BLOCKS = (  # output channels, stride
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)


class DepthwiseSeparable(nn.Sequential):
    """3×3 per channel, then 1×1 across the channels, each with batch norm and ReLU6."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(
            OrderedDict(
                depthwise=nn.Conv2d(
                    in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False
                ),
                bn1=nn.BatchNorm2d(in_channels),
                act1=nn.ReLU6(inplace=True),
                pointwise=nn.Conv2d(in_channels, out_channels, 1, bias=False),
                bn2=nn.BatchNorm2d(out_channels),
                act2=nn.ReLU6(inplace=True),
            )
        )


class MobileNet(nn.Module):
    """A 3×3 stem, thirteen depthwise separable blocks and a linear classifier."""

    def __init__(self, num_classes: int = 1000, dropout: float = 1e-3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU6(inplace=True),
        )
        blocks = []
        in_channels = 32
        for out_channels, stride in BLOCKS:
            blocks.append(DepthwiseSeparable(in_channels, out_channels, stride))
            in_channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.blocks(self.stem(x)))
        return self.classifier(self.dropout(torch.flatten(x, 1)))


def build_model() -> nn.Module:
    return MobileNet()


def example_inputs() -> tuple[torch.Tensor, ...]:
    return (torch.zeros(1, 3, 224, 224),)
