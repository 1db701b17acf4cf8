"""Eigendecompositions and Cholesky factors that do not give up.

LAPACK's divide and conquer fails on some float32 Gram matrices with many equal eigenvalues, above all on those of
kernels with dead filters. The same matrix in float64 decomposes; should it not, its ties are broken by a perturbation
of the size of rounding, and the last resort is a singular value decomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import wide_dtype

#: What torch raises when LAPACK does not converge.
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


_SMALL_RIDGE = 1e-10
"""With more on its diagonal a root is no longer that of a matrix."""
_NOTHING = 1e-12


def ridged_cholesky(gram: Tensor, level: Tensor, ridge: float, step: float) -> tuple[Tensor, Tensor]:
    """The Cholesky factors of a symmetric stack with ``ridge · level`` on its diagonals, and the ridges, as ``level``.

    Each ridge grows by ``step`` until there is a factor.
    """
    ridged, ridges = gram.clone(), torch.full_like(level, ridge)  # (*batch, 1, 1)
    diagonal, on_diagonal = ridged.diagonal(dim1=-2, dim2=-1), gram.diagonal(dim1=-2, dim2=-1)
    while True:
        diagonal.copy_(on_diagonal + (ridges * level)[..., 0])
        factor, failed = torch.linalg.cholesky_ex(ridged)
        again = (failed[..., None, None] != 0) & (ridges < 1)
        if not bool(again.any()):
            return factor, ridges
        ridges = torch.where(again, ridges * step, ridges)


def root_of(weight: Tensor) -> Tensor:
    """Some ``R (*batch, n, n)`` with ``R Rᵀ`` a symmetric positive semi-definite matrix, up to rounding."""
    root, ridges = ridged_cholesky(weight, mean_diagonal(weight), 1e-12, 10)
    if bool((ridges > _SMALL_RIDGE).any()):
        values, vectors = symmetric_eigen(weight)
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return root


def mean_diagonal(normal: Tensor) -> Tensor:
    """``(*batch, 1, 1)``: the mean of the diagonal; where it is next to nothing beside others, a little more."""
    level = normal.diagonal(dim1=-2, dim2=-1).mean(-1)
    most = level.max()
    return torch.where(level > _NOTHING * most, level, torch.where(most > 0, _NOTHING * most, 1.0))[..., None, None]


def symmetric_eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(*batch, n)``, ascending, and eigenvectors of a finite symmetric positive semi-definite stack."""
    try:
        values, vectors = torch.linalg.eigh(gram)
        return values, vectors
    except LinAlgError:
        pass
    wide = gram.to(wide_dtype(gram))
    scale = wide.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].abs()
    scaled = wide / torch.where(scale > 0, scale, 1)
    ties = torch.diag(torch.linspace(0, 1, gram.shape[-1], dtype=wide.dtype, device=wide.device))
    for noise in (0.0, 1.0, 100.0):
        try:
            values, vectors = torch.linalg.eigh(scaled + noise * torch.finfo(wide.dtype).eps * ties)
        except LinAlgError:
            continue
        return (values * scale[..., 0]).to(gram.dtype), vectors.to(gram.dtype)
    left, values, _ = torch.linalg.svd(scaled)
    return (values.flip(-1) * scale[..., 0]).to(gram.dtype), left.flip(-1).to(gram.dtype)


def symmetric_values(gram: Tensor) -> Tensor:
    """The eigenvalues that `symmetric_eigen` gives, without the vectors."""
    try:
        values: Tensor = torch.linalg.eigvalsh(gram)
    except LinAlgError:
        return symmetric_eigen(gram)[0]
    return values
