"""GoogLeNet: nine Inception modules in a row, 22 layers deep.

Szegedy et al., "Going Deeper with Convolutions", 2014 (arXiv:1409.4842), table 1 and figure 3: biases, local response
normalisation and true 5×5 convolutions as in the paper, no batch norm. The two auxiliary classifiers, which serve
training only, are left out.
"""

import torch
import torch.nn.functional as F
from torch import nn


class ConvReLU(nn.Module):
    """A convolution and its ReLU, in place."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x), inplace=True)


class Inception(nn.Module):
    """Figure 2(b): 1×1, 1×1 → 3×3, 1×1 → 5×5 and pool → 1×1, joined along the channels."""

    def __init__(
        self, in_channels: int, ch1x1: int, ch3x3: tuple[int, int], ch5x5: tuple[int, int], pool_proj: int
    ) -> None:
        super().__init__()
        self.b1 = ConvReLU(in_channels, ch1x1, 1)
        self.b3 = nn.Sequential(ConvReLU(in_channels, ch3x3[0], 1), ConvReLU(ch3x3[0], ch3x3[1], 3))
        self.b5 = nn.Sequential(ConvReLU(in_channels, ch5x5[0], 1), ConvReLU(ch5x5[0], ch5x5[1], 5))
        self.pool = nn.Sequential(nn.MaxPool2d(kernel_size=3, stride=1, padding=1), ConvReLU(in_channels, pool_proj, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.b1(x), self.b3(x), self.b5(x), self.pool(x)], dim=1)


class GoogLeNet(nn.Module):
    """Table 1 of the paper, row by row."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = ConvReLU(3, 64, 7, stride=2)
        self.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.norm1 = nn.LocalResponseNorm(5)
        self.conv2_reduce = ConvReLU(64, 64, 1)
        self.conv2 = ConvReLU(64, 192, 3)
        self.norm2 = nn.LocalResponseNorm(5)
        self.pool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)

        self.inception3a = Inception(192, 64, (96, 128), (16, 32), 32)
        self.inception3b = Inception(256, 128, (128, 192), (32, 96), 64)
        self.pool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)

        self.inception4a = Inception(480, 192, (96, 208), (16, 48), 64)
        self.inception4b = Inception(512, 160, (112, 224), (24, 64), 64)
        self.inception4c = Inception(512, 128, (128, 256), (24, 64), 64)
        self.inception4d = Inception(512, 112, (144, 288), (32, 64), 64)
        self.inception4e = Inception(528, 256, (160, 320), (32, 128), 128)
        self.pool4 = nn.MaxPool2d(3, stride=2, ceil_mode=True)

        self.inception5a = Inception(832, 256, (160, 320), (32, 128), 128)
        self.inception5b = Inception(832, 384, (192, 384), (48, 128), 128)

        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.4)
        self.fc = nn.Linear(1024, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.pool1(self.conv1(x)))
        x = self.pool2(self.norm2(self.conv2(self.conv2_reduce(x))))
        x = self.pool3(self.inception3b(self.inception3a(x)))
        x = self.inception4a(x)
        x = self.inception4b(x)
        x = self.inception4c(x)
        x = self.inception4d(x)
        x = self.pool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(self.dropout(x))


def build_model() -> nn.Module:
    return GoogLeNet()


def example_inputs() -> tuple[torch.Tensor, ...]:
    return (torch.zeros(1, 3, 224, 224),)
