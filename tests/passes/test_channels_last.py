"""`ChannelsLast` and views: code that joins channels with positions, at the example's size or at another one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pwrewrite
from pwrewrite.passes import ChannelsLast


class PooledToOne(nn.Module):
    """A fixed pool that leaves one position of a 16×16 map, and more of a larger one."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.AvgPool2d(16), head

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv(x))
        if isinstance(self.head, nn.Linear):
            return self.head(x.view(x.size(0), -1))  # type: ignore[no-any-return]
        return self.head(x).view(x.size(0), -1)  # type: ignore[no-any-return]


def test_a_map_of_one_position_may_have_more_in_other_images() -> None:
    x = torch.randn(2, 3, 16, 16)
    fused = pwrewrite.fuse(PooledToOne(nn.Conv2d(32, 10, 1)).eval(), x, [ChannelsLast()])
    assert fused.report.passed
    assert [e.method for e in fused.edits] == ["reshape", "channels-last"]
    with torch.no_grad():
        assert fused.model(torch.randn(2, 3, 16, 32)).shape == (2, 20)


def test_code_before_a_linear_map_stays_what_it_is() -> None:
    """Which takes one number of columns only, and so one position."""
    fused = pwrewrite.fuse(PooledToOne(nn.Linear(32, 10)).eval(), torch.randn(2, 3, 16, 16), [ChannelsLast()])
    assert fused.report.passed
    assert [e.method for e in fused.edits] == ["channels-last"]
    assert type(fused.model) is PooledToOne
