"""The loss of a pair of factors at every rank in the full norm, from one factorisation.

The first factors at ranks 1, 2, … are nested (`Spectrum.right_basis`). With the inner values ``M x`` in that order, the
leading blocks of one Cholesky factor ``L`` of ``M C Mᵀ`` are those of every rank, so with ``Z = L⁻¹ M C Wᵀ``

    loss(r) = tr(G W C Wᵀ) − Σ_{i ≤ r} Z_i G Z_iᵀ

is a cumulative sum. A bottleneck cuts what a reduction leaves once more, at the outputs: with the first ``r`` blocks of
``Z`` its loss at an output width ``s`` is ``tr(G W C Wᵀ)`` less the ``s`` largest eigenvalues of ``G^½ Zᵀ Z G^½``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .last_factor import RIDGE, PairFactors, mean_diagonal
from .spectrum import Spectrum

_NARROW_FROM = 1200
"""From this size of a patch on, moments are multiplied in float32."""


class Nested:
    """Pairs of factors of one kernel at every rank up to ``rank``.

    Args:
        spectrum: Where the first factors come from.
        rank: The largest rank looked at.
        rows: The kernel ``W (groups, out, patch)``.
        moment: ``C (groups, patch, patch)``.
        spatial: The kernel's spatial sizes.
    """

    def __init__(
        self, spectrum: Spectrum[PairFactors], rank: int, rows: Tensor, moment: Tensor, spatial: Sequence[int]
    ) -> None:
        first = torch.linalg.qr(spectrum.right_basis(rank).mT).Q.mT.contiguous()  # the same spans, well scaled
        self.rank = first.shape[1]
        factors = spectrum.with_right(first)
        narrow = torch.float32 if rows.shape[2] > _NARROW_FROM else rows.dtype  # sums of many products; solved in wide
        half, normal = factors.normal(moment.to(narrow), spatial)
        cross, normal = (half @ rows.mT.to(narrow)).to(rows.dtype), normal.to(rows.dtype)
        size = normal.shape[-1]
        level, eye = mean_diagonal(normal), torch.eye(size, dtype=normal.dtype, device=normal.device)
        ridge = RIDGE
        factor, bad = torch.linalg.cholesky_ex(normal + ridge * level * eye)
        while bool(bad.any()) and ridge < 1:
            ridge *= 100
            factor, bad = torch.linalg.cholesky_ex(normal + ridge * level * eye)
        self._block = size // self.rank
        self._solved = torch.linalg.solve_triangular(factor, cross, upper=False)  # Z (groups, inner, out)

    def explained(self, gradients: Tensor | None) -> Tensor:
        """``(rank + 1,)``: what ranks 0, 1, … keep of ``tr(G W C Wᵀ)``."""
        z = self._solved
        shares = (z * (z if gradients is None else z @ gradients)).sum((0, 2))
        sums = shares.reshape(self.rank, self._block).sum(1).cumsum(0)
        return torch.cat([sums.new_zeros(1), sums])

    def explained_cut(self, rank: int, root: Tensor | None) -> Tensor:
        """``(out + 1,)``: the same for one rank and ``root = G^½``, cut to output widths 0, 1, …."""
        z = self._solved[:, : rank * self._block]
        z = z if root is None else z @ root
        values = torch.linalg.eigvalsh(z.mT @ z).clamp(min=0).flip(-1).sum(0)
        return torch.cat([values.new_zeros(1), values.cumsum(0)])
