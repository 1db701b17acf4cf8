"""What a 1×1 convolution does: a 3-channel 3×3 map through four 1×1 filters.

Each filter is three numbers, one per input channel, and sees one place at a time: the output at a place is a 4×3
matrix times the three values there. The map stays 3×3, three channels become four, with 12 weights and 3·3·12 = 108
multiply-accumulates. This is the "cross-channel parametric pooling" of Lin, Chen and Yan, "Network In Network", 2013
(arXiv:1312.4400), section 3.1. The weights are chosen so that the result can be checked by eye.
"""

import torch
from torch import nn

FILTERS = (
    (1.0, 0.0, 0.0),  # the first channel as it is
    (0.0, 1.0, -1.0),  # the second less the third
    (1.0, 1.0, 1.0),  # the sum
    (0.5, 0.25, 0.25),  # a weighted mean
)


class ChannelMixing(nn.Module):
    """One 1×1 convolution without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 4, kernel_size=1, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor(FILTERS)[:, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x)


def build_model() -> nn.Module:
    return ChannelMixing()


def example_inputs() -> tuple[torch.Tensor, ...]:
    return (torch.arange(27.0).reshape(1, 3, 3, 3),)
