"""The last of two factors, solved exactly in the norm of the whole patch.

A pair of factors is a chain ``Ŵ = F · M``: ``M (inner, patch)`` is the first factor as a map of patches, ``F (out,
inner)`` the last one as a matrix over what it reads at one output position. Given ``M``, a second moment ``C`` of the
patches and the kernel ``W``, the best ``F`` is linear least squares whatever the weight of the outputs,

    F = W C Mᵀ (M C Mᵀ)⁻¹

    axis split      M = first ⊗ 1 (rank·b, in·a·b)       F = second (out, rank·b)
    depthwise       M = filters (terms·in, in·k)         F = pointwise (out, terms·in)

All of it per group, with a leading group axis. The rows of ``M`` are rank first, so that its leading rows are those of
every smaller rank (`Nested`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .eigen import mean_diagonal, ridged_cholesky
from .layout import Factors

RIDGE = 1e-9
"""What is added to the diagonal of a normal matrix, as a share of its mean diagonal, before it is solved."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PairFactors(Factors):
    """A chain of two factors."""

    last: ClassVar[str]

    @property
    @abstractmethod
    def rank(self) -> int:
        """The width between."""

    @abstractmethod
    def inner(self, patches: Tensor, spatial: Sequence[int]) -> Tensor:
        """``M · patches (groups, inner, columns)`` of ``patches (groups, patch, columns)``, channel first."""

    def normal(self, moment: Tensor, spatial: Sequence[int]) -> Tensor:
        """``M C Mᵀ (groups, inner, inner)`` for a symmetric moment ``C (groups, patch, patch)``."""
        whole = self.inner(self.inner(moment, spatial).mT, spatial)
        return (whole + whole.mT) / 2

    def last_matrix(self) -> Tensor:
        """The last factor as ``(groups, out/groups, inner)``."""
        weight: Tensor = getattr(self, self.last)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def with_last(self, matrix: Tensor) -> Self:
        """The chain with another last factor ``(groups, out/groups, inner)``; its errors are no longer known."""
        weight: Tensor = getattr(self, self.last)
        return self._with(matrix.reshape(weight.shape).to(weight))

    def _with(self, last: Tensor) -> Self:
        changed: dict[str, Any] = {self.last: last, "relative_error": math.nan, "weighted_error": math.nan}
        return replace(self, **changed)


def solve_last(normal: Tensor, cross: Tensor, *, ridge: float = RIDGE, towards: Tensor | None = None) -> Tensor:
    """The least-squares last factor ``F (groups, out, inner)``.

    Args:
        normal: ``M C Mᵀ (groups, inner, inner)``.
        cross: ``W C Mᵀ (groups, out, inner)``, or the measured cross moment of outputs and inner values.
        ridge: Regularisation, as a share of the mean diagonal of ``normal``; more where that is not enough.
        towards: What the solution is drawn to, ``(groups, out, inner)``; to zero where None.
    """
    level = mean_diagonal(normal)
    factor, ridges = ridged_cholesky(normal, level, ridge, 100)
    right = cross if towards is None else cross + ridges * level * towards
    return torch.cholesky_solve(right.mT, factor).mT


class Nested:
    """Pairs of factors of one kernel at every rank up to ``rank``, and their losses in the full norm.

    The first factors at ranks 1, 2, … are nested (`Spectrum.right_basis`). With the inner values ``M x`` in that order,
    the leading blocks of one Cholesky factor ``L`` of ``M C Mᵀ`` are those of every rank, so with ``Z = L⁻¹ M C Wᵀ``

        loss(r) = tr(G W C Wᵀ) − Σ_{i ≤ r} Z_i G Z_iᵀ

    is a cumulative sum. A bottleneck cuts what a reduction leaves once more, at the outputs: with the first ``r``
    blocks of ``Z`` its loss at an output width ``s`` is ``tr(G W C Wᵀ)`` less the ``s`` largest eigenvalues of
    ``G^½ Zᵀ Z G^½``, which are those of ``Z G Zᵀ``.

    ``moved`` is ``W C (groups, out, patch)``, ``moment`` is ``C (groups, patch, patch)``, or None for the identity,
    with an orthonormal first factor. ``factors`` hold the first factor at the largest ``rank`` looked at, in the order
    of `Spectrum.right_basis`.
    """

    def __init__(
        self, factors: PairFactors, rank: int, moved: Tensor, moment: Tensor | None, spatial: Sequence[int]
    ) -> None:
        self.rank = rank
        self._solved = factors.inner(moved.mT, spatial)  # Z (groups, inner, out)
        self._block = self._solved.shape[1] // rank
        if moment is not None:
            narrow = torch.float32 if moved.shape[2] > 1200 else moved.dtype  # sums of many products; solved in wide
            normal = factors.normal(moment.to(narrow), spatial).to(moved.dtype)
            factor, _ = ridged_cholesky(normal, mean_diagonal(normal), RIDGE, 100)
            self._solved = torch.linalg.solve_triangular(factor, self._solved, upper=False)

    def explained(self, gradients: Tensor | None) -> Tensor:
        """``(rank + 1,)``: what ranks 0, 1, … keep of ``tr(G W C Wᵀ)``."""
        z = self._solved
        shares = (z * (z if gradients is None else z @ gradients)).sum((0, 2))
        sums = shares.reshape(self.rank, self._block).sum(1).cumsum(0)
        return torch.cat([sums.new_zeros(1), sums])

    def explained_cut(self, rank: int, root: Tensor | None) -> Tensor:
        """``(out + 1,)``: the same for one rank and ``G = root rootᵀ``, cut to output widths 0, 1, …."""
        z = self._solved[:, : rank * self._block]
        z = z if root is None else z @ root
        inner, out = z.shape[-2:]
        values = torch.linalg.eigvalsh(z @ z.mT if inner < out else z.mT @ z).clamp(min=0).flip(-1).sum(0)
        kept: Tensor = values.new_zeros(out + 1)
        kept[1 : len(values) + 1] = values
        return kept.cumsum(0)
