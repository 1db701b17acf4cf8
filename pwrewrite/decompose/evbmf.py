"""The rank of a noisy matrix by empirical variational Bayesian matrix factorisation (EVBMF).

Model: ``V = B Aᵀ + noise``, ``V (L, M)`` with ``L ≤ M``, Gaussian priors on the columns of ``A`` and ``B`` whose
variances are estimated too, and Gaussian noise of variance σ². Nakajima, Sugiyama, Babacan & Tomioka (JMLR 14, 2013)
show that the global optimum keeps exactly the singular values ``γ`` with ``γ² > σ² M x̄``, where with ``α = L/M``

    τ̄ ≈ 2.5129 √α        x̄ = (1 + τ̄)(1 + α/τ̄)          (a numerical fit of theirs for τ̄)

When σ² is unknown it minimises the free energy (terms constant in σ² dropped)

    Ω(σ²) = Σ_h ψ(γ_h² / (M σ²)),   ψ(x) = x − log x + [x > x̄] ψ₁(x),
    ψ₁(x) = log(τ(x) + 1) + α log(τ(x)/α + 1) − τ(x),   τ(x) = (x − 1 − α + √((x − 1 − α)² − 4α)) / 2

over a bounded interval, which is searched in log σ² on a grid and then by Brent's method: Ω has several local minima.
Kim et al. 2016 choose the ranks of a Tucker-2 decomposition so, from the two channel unfoldings of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.errors import UsageError
from .layout import check_finite, compute_dtype


def evbmf_rank(values: Tensor, shape: Sequence[int] | None = None) -> int:
    """The number of singular values that EVBMF keeps, from 0 (nothing but noise) to ``min(shape)``.

    ``values`` are a matrix ``(L, M)``; or, with its ``shape``, its singular values in any order. Raises `UsageError`
    for anything else, and `RefusedError` for NaN or Inf.
    """
    if shape is None:
        if values.dim() != 2 or values.numel() == 0:
            raise UsageError(f"evbmf_rank needs a matrix, or singular values and a shape, not {tuple(values.shape)}")
        shape = tuple(values.shape)
        check_finite(float(values.detach().abs().amax()), values, "matrix")
        values = torch.linalg.svdvals(values.detach().to(compute_dtype(values.dtype)))
    low, high = sorted(shape)
    if values.dim() != 1 or not 0 < len(values) <= low:
        raise UsageError(f"{tuple(values.shape)} singular values do not fit a matrix of shape {tuple(shape)}")
    squares = np.sort(values.detach().to("cpu", torch.float64).square().numpy())[::-1]
    check_finite(float(squares[0]), values, "singular values")
    if squares[0] == 0:
        return 0
    alpha = low / high
    tau = 2.5129 * math.sqrt(alpha)
    threshold = (1 + tau) * (1 + alpha / tau)
    variance = float(squares[0]) * _noise_variance(squares / squares[0], low, high, threshold)
    return int(np.count_nonzero(squares > variance * high * threshold))


def _noise_variance(squares: npt.NDArray[np.float64], low: int, high: int, threshold: float) -> float:
    """The σ² that minimises the free energy, for squared singular values scaled to a largest one of 1."""
    from scipy.optimize import minimize_scalar

    alpha = low / high
    padded = np.zeros(low)
    padded[: len(squares)] = squares
    noisiest = min(low, math.ceil(low / (1 + alpha)) - 1)
    upper = float(padded.sum()) / (low * high)
    tail = padded[noisiest:]
    lower = max(float(tail[0]) / (high * threshold), float(tail.mean()) / high) if len(tail) else 0.0
    lower = max(lower, upper * 1e-15)
    if lower >= upper:
        return upper
    positive = np.maximum(padded, np.finfo(np.float64).tiny)

    def energy(log_sigma2: float) -> float:
        x = positive / (high * math.exp(log_sigma2))
        shifted = x[x > threshold] - 1 - alpha
        tau = (shifted + np.sqrt(np.maximum(shifted**2 - 4 * alpha, 0))) / 2
        return float(np.sum(x - np.log(x)) + np.sum(np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau))

    grid = np.linspace(math.log(lower), math.log(upper), 64)
    best = int(np.argmin([energy(float(point)) for point in grid]))
    around = (float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)]))
    minimum = minimize_scalar(energy, bounds=around, method="bounded")
    return math.exp(float(minimum.x) if minimum.fun <= energy(float(grid[best])) else float(grid[best]))
