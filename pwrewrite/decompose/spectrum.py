"""One factorisation of a stack of matrices, truncated at any rank; the error at every rank.

For one matrix ``M (m, n)`` and weights ``G (m, m)`` on its rows and ``C (n, n)`` on its columns, the best rank-r ``M̂``
in ``‖G^½ (M − M̂) C^½‖`` follows from the left singular vectors ``U`` of ``G^½ M C^½`` (Eckart & Young 1936, after the
change of variables):

    M̂ = G^-½ U_r U_rᵀ G^½ M

``C`` enters through the Gram matrix ``G^½ M C Mᵀ G^½`` alone, so no root of it is taken. The projection works on the
shorter side of ``M``: there ``U`` is square at full rank, which so is exact however singular the weights are. The range
of the projection gets an orthonormal basis by QR, so that rounding a factor never meets a large inverse root.

The Gram matrix of a kernel with float32's values is formed in float64, where squaring the condition number costs
nothing that float32 could show; any other float64 kernel without weights goes through QR and SVD instead. All matrices
of a stack (the groups of a convolution) are truncated at the same rank, and their squared errors add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .eigen import LinAlgError, symmetric_eigen, symmetric_values
from .layout import Factors, check_finite, check_rank, frobenius, relative, wide_dtype
from .weighting import SideWeight, kronecker_multiply

_F = TypeVar("_F", bound=Factors, covariant=True)


@dataclass(frozen=True, eq=False)
class Truncation:
    """A stack of matrices at one rank, ``left (groups, m, rank) @ right (groups, rank, n)``, and its errors."""

    left: Tensor
    right: Tensor
    relative_error: float
    weighted_error: float


def left_basis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A complete orthonormal basis of left singular vectors of ``(*batch, m, n)``, and their squared singular values.

    ``(*batch, m, m)`` and ``(*batch, m)``, descending, both in the widest dtype.
    """
    gram = _gram_of(matrix)
    if gram is not None:
        return gram_basis(gram)
    rows, columns = matrix.shape[-2:]
    narrow = torch.linalg.qr(matrix.mT, mode="r")[1].mT if columns > rows else matrix
    try:
        vectors, values, _ = torch.linalg.svd(narrow, full_matrices=True)
    except LinAlgError:
        return gram_basis(matrix @ matrix.mT)
    energies = values.new_zeros(*values.shape[:-1], rows)
    energies[..., : values.shape[-1]] = values.square()
    return vectors, energies


def range_basis(matrix: Tensor) -> Tensor:
    """As the basis of `left_basis`, but only of what a matrix with more rows than columns spans: ``(*batch, m, n)``."""
    rows, columns = matrix.shape[-2:]
    if rows <= columns:
        return left_basis(matrix)[0]
    span, narrow = torch.linalg.qr(matrix.to(wide_dtype(matrix)))
    basis: Tensor = span @ left_basis(narrow)[0]
    return basis


def _gram_of(matrix: Tensor) -> Tensor | None:
    """``(*batch, m, m)``: ``M Mᵀ`` in a wider dtype than the values of a matrix; None where there is none."""
    wide = wide_dtype(matrix)
    if matrix.dtype == wide and not (wide is torch.float64 and bool((matrix == matrix.float()).all())):
        return None
    matrix = matrix.to(wide)
    return matrix @ matrix.mT


def gram_basis(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of a symmetric positive semi-definite matrix, largest first, none below 0."""
    values, vectors = symmetric_eigen(gram)
    return vectors.flip(-1), values.flip(-1).clamp(min=0)


class Spectrum(Generic[_F]):
    """One factorisation of a kernel as a stack of matrices, from which a form at any rank is read off.

    Args:
        matrix: The kernel's matricisation ``(groups, m, n)`` in the compute dtype.
        left: The weight of the rows, None for the identity.
        right: The weight of the columns, None for the identity.
        build: Turns a truncation of the matrices into the form.

    Attributes:
        max_rank: ``min(m, n)``, the rank (per group) at which the form is exact.
    """

    def __init__(
        self, matrix: Tensor, left: SideWeight | None, right: SideWeight | None, build: Callable[[Truncation], _F]
    ) -> None:
        self.matrix = matrix
        self._build = build
        self.norm = frobenius(matrix)
        check_finite(self.norm, matrix)
        self._left, self._right = left, right
        self.max_rank = min(matrix.shape[-2:])
        self._on_columns = matrix.shape[-1] < matrix.shape[-2]
        rows, near, far = (matrix.mT, right, left) if self._on_columns else (matrix, left, right)
        self._root: Tensor | None = None
        self._inverse: Tensor | None = None
        if near is None and far is None:
            self._gram = _gram_of(rows)
            if self._gram is None:
                self._solution = left_basis(rows)
            return
        wide = rows.to(wide_dtype(matrix))
        gram = (far.multiply(wide.mT).mT if far is not None else wide) @ wide.mT
        if near is not None:
            self._root, self._inverse = near.roots()
            gram = kronecker_multiply(self._root, kronecker_multiply(self._root, gram).mT)
        self._gram = (gram + gram.mT) / 2

    @cached_property
    def energies(self) -> Tensor:
        """``(groups, max_rank)``: squared singular values of ``G^½ M C^½``, descending, in the widest dtype."""
        if self._gram is None or "_solution" in vars(self):
            return self._solution[1]
        return symmetric_values(self._gram).flip(-1).clamp(min=0)  # in half the time of vectors, which may not be asked

    @cached_property
    def _solution(self) -> tuple[Tensor, Tensor]:
        assert self._gram is not None
        return gram_basis(self._gram)

    @property
    def _basis(self) -> Tensor:
        return self._solution[0]

    @property
    def losses(self) -> Tensor:
        """``(max_rank + 1,)``: the squared weighted error ``‖G^½ (W − Ŵ) C^½‖²`` at rank 0, 1, …"""
        energies = self.energies.sum(0)
        tails = energies.flip(0).cumsum(0).flip(0)
        return torch.cat([tails, tails.new_zeros(1)])

    @property
    def relative_errors(self) -> Tensor:
        """``(max_rank + 1,)``: the relative (weighted) error at rank 0, 1, …"""
        losses = self.losses
        return (losses / losses[0]).sqrt() if losses[0] > 0 else torch.zeros_like(losses)

    def right_basis(self, rank: int) -> Tensor:
        """Orthonormal rows ``(groups, rank, n)``, of which the first r span what the first factor of rank r spans."""
        basis = self._basis[..., : check_rank(rank, self.max_rank)]
        if self._on_columns:
            columns = basis if self._inverse is None else kronecker_multiply(self._inverse, basis)
        else:
            reach = basis if self._root is None else kronecker_multiply(self._root, basis)
            columns = self.matrix.to(basis.dtype).mT @ reach
        rows: Tensor = torch.linalg.qr(columns).Q.mT.contiguous()
        return rows

    def with_right(self, rows: Tensor) -> _F:
        """The form with a first factor given as ``(groups, rank, n)``, and zeros in the last."""
        groups, rank, _ = rows.shape
        nothing = rows.new_zeros(1).expand(groups, self.matrix.shape[1], rank)
        return self._build(Truncation(nothing, rows, math.nan, math.nan))

    def truncate(self, rank: int) -> _F:
        """The form at one rank (per group) from 1 to ``max_rank``, else a `UsageError`."""
        rank = check_rank(rank, self.max_rank)
        basis = self._basis[..., :rank]
        dtype, rows = self.matrix.dtype, self.matrix.mT if self._on_columns else self.matrix
        if self._root is None or self._inverse is None or rank == self.max_rank:
            tall = basis.to(dtype)
            wide = tall.mT @ rows
        else:
            orthonormal, triangle = torch.linalg.qr(kronecker_multiply(self._inverse, basis))
            tall = orthonormal.to(dtype)
            projected = kronecker_multiply(self._root, basis).mT @ rows.to(basis.dtype)
            wide = (triangle @ projected).to(dtype)
        left, right = (wide.mT, tall.mT) if self._on_columns else (tall, wide)
        residual = torch.baddbmm(self.matrix, left, right, alpha=-1)
        error = relative(frobenius(residual), self.norm)
        weighted = error
        if self._left is not None or self._right is not None:
            weighted = float(self.relative_errors[rank])
        return self._build(Truncation(left, right, error, weighted))
