"""Gram matrices: products of a matrix with its own transpose, of which one half follows from the other.

On a CPU those of large single matrices are computed in blocks of rows up to the diagonal; a GPU prefers one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE, _BLOCKS = 256, 6


def row_gram(rows: Tensor) -> Tensor:
    """``rows @ rowsᵀ`` of ``(*batch, n, m)``; of a large single matrix on a CPU exactly symmetric."""
    if not _by_blocks(rows):
        return rows @ rows.mT
    size = len(rows)
    gram = rows.new_empty(size, size)
    for low, high in _blocks(size):
        torch.mm(rows[low:high], rows[:high].T, out=gram[low:high, :high])
        gram[:low, low:high] = gram[low:high, :low].T
    return gram


def add_gram(sums: Tensor, rows: Tensor, weight: float) -> None:
    """Adds ``weight · rows @ rowsᵀ`` of ``(n, m)`` to ``(n, n)`` sums, all but what `mirror` follows up with."""
    if not _by_blocks(rows):
        sums.add_((rows @ rows.mT).to(sums.dtype), alpha=weight)
        return
    for low, high in _blocks(len(rows)):
        sums[low:high, :high].add_((rows[low:high] @ rows[:high].T).to(sums.dtype), alpha=weight)


def mirror(sums: Tensor) -> None:
    """Makes what `add_gram` has summed up in ``(n, n)`` symmetric."""
    for low, high in _blocks(len(sums)):
        sums[:low, low:high] = sums[low:high, :low].T


def _by_blocks(rows: Tensor) -> bool:
    return rows.dim() == 2 and len(rows) >= _LARGE and rows.device.type == "cpu"


def _blocks(size: int) -> list[tuple[int, int]]:
    """Where the blocks of rows begin and end."""
    step = -(-size // _BLOCKS)
    return [(low, min(low + step, size)) for low in range(0, size, step)]
