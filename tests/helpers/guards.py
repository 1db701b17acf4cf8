"""Code that raises by sizes; here, since pytest rewrites the assertions of its own files."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Guarded(nn.Module):
    """Code that decides by a value or a size only whether to raise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        """Two layers and a sum."""
        assert x.shape[2] % 2 == 0
        assert x.dim() == 4 and x.shape[3] % 2 == 0, "no map of even size"  # noqa: PT018
        if x.shape[1] != 16:
            raise ValueError(f"16 channels, got {x.shape[1]}")
        return F.relu(self.norm(self.second(F.relu(self.first(x))))) + x


def caught(x: Tensor) -> Tensor:
    """Goes on where its assertion fails."""
    try:
        assert x.shape[1] == 3
    except AssertionError:
        return x * 2
    return x


def either(x: Tensor) -> Tensor:
    """Asserts one thing or another."""
    assert x.shape[1] == 3 or x.shape[2] == 3
    return x


class _Odd(Exception):
    """An error of its own."""


def own_error(x: Tensor) -> Tensor:
    """Raises an error of its own."""
    if x.shape[1] % 2:
        raise _Odd
    return x


class Levels(nn.Module):
    """Code that takes as many maps as it has layers, each of four dimensions."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(levels))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """A layer and an activation for each."""
        assert len(maps) == len(self.convs)
        if len(maps[0].shape) != 4:
            raise ValueError("maps have four dimensions")
        return [F.relu(conv(x)) for conv, x in zip(self.convs, maps, strict=True)]


def some_lengths(x: Tensor) -> Tensor:
    """Takes two lengths."""
    assert len(x) in (5, 7)
    return x


def at_least(x: Tensor) -> Tensor:
    """Takes many lengths."""
    if len(x.shape) < 4:
        raise ValueError("too few")
    return x


def multiples(x: Tensor) -> Tensor:
    """Takes lengths that it does not name."""
    assert len(x) % 12 == 0
    return x
