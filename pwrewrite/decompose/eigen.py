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


def ridged_cholesky(gram: Tensor, level: Tensor | float, ridge: float, step: float) -> tuple[Tensor, float]:
    """The Cholesky factor of a symmetric stack with ``ridge · level`` on its diagonal, and the ridge.

    That grows by ``step`` until there is a factor.
    """
    ridged = gram.clone()
    diagonal, on_diagonal = ridged.diagonal(dim1=-2, dim2=-1), gram.diagonal(dim1=-2, dim2=-1)
    shift = level[..., 0] if isinstance(level, Tensor) else level  # (groups, 1, 1)
    while True:
        diagonal.copy_(on_diagonal + ridge * shift)
        factor, bad = torch.linalg.cholesky_ex(ridged)
        if ridge >= 1 or not bool(bad.any()):
            return factor, ridge
        ridge *= step


def root_of(weight: Tensor) -> Tensor:
    """A lower triangle ``R (*batch, n, n)`` with ``R Rᵀ`` a symmetric positive semi-definite matrix, up to rounding."""
    return ridged_cholesky(weight, mean_diagonal(weight), 1e-12, 100)[0]


def mean_diagonal(normal: Tensor) -> Tensor:
    """``(*batch, 1, 1)``: the mean of the diagonal, never 0."""
    return normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(normal.dtype).tiny)[..., None, None]


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
