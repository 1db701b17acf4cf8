"""Gram matrices: products of a matrix with its own transpose, of which one half follows from the other."""

from __future__ import annotations

import torch
from torch import Tensor

_BY_BLOCKS = 256
"""From this size on the lower blocks are computed and mirrored, on a CPU; a GPU prefers one large product."""
_BLOCKS = 6


def row_gram(rows: Tensor) -> Tensor:
    """``rows @ rowsᵀ`` of ``(*batch, n, m)``; of a large single matrix on a CPU exactly symmetric."""
    size = rows.shape[-2]
    if rows.dim() != 2 or size < _BY_BLOCKS or rows.device.type != "cpu":
        return rows @ rows.mT
    gram = rows.new_empty(size, size)
    for low, high in blocks(size):
        torch.mm(rows[low:high], rows[:high].T, out=gram[low:high, :high])
        gram[:low, low:high] = gram[low:high, :low].T
    return gram


def blocks(size: int) -> list[tuple[int, int]]:
    """Where the blocks of rows of a large symmetric matrix begin and end."""
    step = -(-size // _BLOCKS)
    return [(low, min(low + step, size)) for low in range(0, size, step)]
