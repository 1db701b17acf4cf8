"""The loss of a form at every rank in the full norm, from one factorisation.

The first factors of a form at ranks 1, 2, … are nested: the first rows of a larger one span what a smaller one spans
(`pwrewrite.decompose.MatrixSpectrum.right_basis`). With the inner values ``M x`` in that order, the leading blocks of
one Cholesky factor ``L`` of ``M C Mᵀ`` are those of every rank, so with ``Z = L⁻¹ M C Wᵀ``

    loss(r) = tr(G W C Wᵀ) − Σ_{i ≤ r} Z_i G Z_iᵀ

is a cumulative sum. A bottleneck cuts what a reduction leaves once more, at the outputs: with the first ``r`` blocks of
``Z`` its loss at an output width ``s`` is ``tr(G W C Wᵀ)`` less the ``s`` largest eigenvalues of ``G^½ Zᵀ Z G^½``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..decompose import Depthwise, Factors, Reduction, Spatial
from .last_factor import RIDGE, Inner

_NARROW_FROM = 1200
"""From this size of a patch on, moments are multiplied in float32."""


class Nested:
    """One form of one layer at every rank.

    Args:
        first: First factor at the largest rank looked at: ``(groups, rank, n)``, or ``(channels, rank, taps)`` for
            depthwise; from `MatrixSpectrum.right_basis`.
        form: ``reduce``, ``spatial`` or ``depthwise``.
        rows: The kernel ``W (groups, out, patch)``.
        moment: ``C (groups, patch, patch)``.
        spatial: The kernel's spatial sizes.
        axes: For ``spatial``: those of the first factor.

    Attributes:
        rank: The largest rank looked at.
    """

    def __init__(
        self,
        first: Tensor,
        form: str,
        rows: Tensor,
        moment: Tensor,
        spatial: tuple[int, ...],
        axes: tuple[int, ...] | None,
    ) -> None:
        groups, out = rows.shape[:2]
        self.rank = first.shape[1]
        first = torch.linalg.qr(first.mT).Q.mT.contiguous()  # the same spans, well scaled
        self.rank = first.shape[1]
        inner = Inner(_chain(first, form, groups, out, spatial, axes), spatial)
        narrow = torch.float32 if rows.shape[2] > _NARROW_FROM else rows.dtype  # sums of many products; solved in wide
        half, normal = inner.normal(moment.to(narrow))
        cross, normal = (half @ rows.mT.to(narrow)).to(rows.dtype), normal.to(rows.dtype)
        if form == "depthwise":
            order = torch.arange(inner.size, device=rows.device).reshape(-1, self.rank).T.flatten()
            normal, cross = normal[:, order][:, :, order], cross[:, order]
        level = normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-300)[:, None, None]
        eye = torch.eye(inner.size, dtype=normal.dtype, device=normal.device)
        ridge = RIDGE
        factor, bad = torch.linalg.cholesky_ex(normal + ridge * level * eye)
        while bool(bad.any()) and ridge < 1:
            ridge *= 100
            factor, bad = torch.linalg.cholesky_ex(normal + ridge * level * eye)
        self._block = inner.size // self.rank
        self._solved = torch.linalg.solve_triangular(factor, cross, upper=False)  # Z (groups, inner, out)

    def explained(self, gradients: Tensor | None) -> Tensor:
        """``(rank + 1,)``: what ranks 0, 1, … keep of ``tr(G W C Wᵀ)``."""
        z = self._solved
        kept = (z * (z if gradients is None else z @ gradients)).sum((0, 2))
        sums = kept.reshape(self.rank, self._block).sum(1).cumsum(0)
        return torch.cat([sums.new_zeros(1), sums])

    def explained_cut(self, rank: int, root: Tensor | None) -> Tensor:
        """``(out + 1,)``: the same for one rank, cut to output widths 0, 1, ….

        Args:
            rank: The rank.
            root: ``G^½ (groups, out, out)``; the identity where None.
        """
        z = self._solved[:, : rank * self._block]
        z = z if root is None else z @ root
        values = torch.linalg.eigvalsh(z.mT @ z).clamp(min=0).flip(-1).sum(0)
        return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _chain(
    first: Tensor, form: str, groups: int, out: int, spatial: tuple[int, ...], axes: tuple[int, ...] | None
) -> Factors:
    """A chain with that first factor, and nothing in the last."""
    rank, nothing, errors = first.shape[1], first.new_zeros(0), {"relative_error": 0.0, "weighted_error": 0.0}
    if form == "reduce":
        core = first.new_zeros(1, rank, *(1,) * len(spatial))
        return Reduction(reduce=first.flatten(0, 1), core=core, groups=groups, **errors)
    if form == "spatial":
        assert axes is not None
        sizes = [size if axis in axes else 1 for axis, size in enumerate(spatial)]
        second = first.new_zeros(1, rank, *(1,) * len(spatial))
        shaped = first.reshape(groups * rank, -1, *sizes)
        return Spatial(first=shaped, second=second, first_axes=axes, groups=groups, **errors)
    filters = first.reshape(-1, 1, *spatial)
    return Depthwise(depthwise=filters, pointwise=nothing, terms=rank, groups=groups, **errors)
