"""A small residual network with attention over channels (squeeze-excite) and over channels and places (CBAM).

Hu et al., "Squeeze-and-Excitation Networks", 2017 (arXiv:1709.01507), figures 1 and 3; Woo et al., "CBAM:
Convolutional Block Attention Module", 2018 (arXiv:1807.06521), figures 1 to 3. For 32×32 images, as in CIFAR-10.
"""

import torch
import torch.nn.functional as F
from torch import nn


class SqueezeExcite(nn.Module):
    """Weighs each channel by what all channels are on average: pool, linear, ReLU, linear, sigmoid."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(channels // reduction, channels)
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squeezed = torch.flatten(self.pool(x), 1)
        weights = self.gate(self.fc2(self.relu(self.fc1(squeezed))))
        return x * weights[:, :, None, None]


class ChannelAttention(nn.Module):
    """CBAM, figure 2 (top): one small network sees the average-pooled and the max-pooled channels."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, kernel_size=1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        average = self.mlp(F.adaptive_avg_pool2d(x, 1))
        maximum = self.mlp(F.adaptive_max_pool2d(x, 1))
        return x * torch.sigmoid(average + maximum)


class SpatialAttention(nn.Module):
    """CBAM, figure 2 (bottom): a 7×7 convolution over the mean and the maximum of the channels at each place."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.conv(pooled))


class CBAM(nn.Sequential):
    """Channel attention, then spatial attention."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__(ChannelAttention(channels, reduction), SpatialAttention())


class ResidualBlock(nn.Module):
    """3×3 → 3×3 → attention, plus the projected input."""

    def __init__(self, in_channels: int, out_channels: int, attention: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.attention = attention
        self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.attention(self.bn2(self.conv2(out)))
        return F.relu(out + self.shortcut(x))


class AttentionNet(nn.Module):
    """A stem, two residual blocks with squeeze-excite and CBAM, and a linear classifier."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        )
        self.block1 = ResidualBlock(32, 64, SqueezeExcite(64))
        self.block2 = ResidualBlock(64, 128, CBAM(128))
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block2(self.block1(self.stem(x)))
        return self.classifier(x.mean(dim=(2, 3)))


def build_model() -> nn.Module:
    return AttentionNet()


def example_inputs() -> tuple[torch.Tensor, ...]:
    return (torch.zeros(1, 3, 32, 32),)
