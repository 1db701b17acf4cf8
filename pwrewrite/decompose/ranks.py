"""Rank choice: what a user writes, an energy threshold, and EVBMF, as a width of one side of a kernel.

A *width* is an integer. A *ratio* is a share of the channels on that side, per group. An explicit width is taken as it
is; one that was computed (from a ratio, an energy or EVBMF) is rounded to a multiple that hardware likes.

Empirical variational Bayesian matrix factorisation (EVBMF) gives the rank of a noisy matrix.
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
import operator
import re
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.numbers import ratio
from .layout import Factors, check_finite, compute_dtype
from .spectrum import Spectrum

#: What a rank may be given as: a width, a ratio, or either as text.
RankSpec = SupportsIndex | float | str


def default_multiple(channels: int) -> int:
    """8 for 64 channels and more, else 1."""
    return 8 if channels >= 64 else 1


def round_rank(rank: float, channels: int, multiple: int | None = None) -> int:
    """A computed rank as a width from 1 to ``channels`` (per group): the nearest multiple.

    A rank too small for any multiple is rounded to an integer instead, and one at the full width stays there. Raises
    `UsageError` for a multiple below 1.
    """
    multiple = default_multiple(channels) if multiple is None else multiple
    if multiple < 1:
        raise UsageError(f"cannot round ranks to a multiple of {multiple}", expected="1 or more", got=str(multiple))
    if rank >= channels:
        return channels
    rounded = multiple * math.floor(rank / multiple + 0.5)
    return min(channels, rounded or max(1, math.floor(rank + 0.5)))


def resolve_rank(spec: RankSpec, channels: int, multiple: int | None = None, name: str = "rank") -> int:
    """A width from 1 to ``channels`` (per group), from what a user wrote; raises `UsageError` for anything else.

    Args:
        spec: An integer or ``"32"`` is a width; a float in (0, 1], ``"0.5"`` or ``"50%"`` a ratio of ``channels``.
        channels: The channels on that side, per group where grouped.
        multiple: What a ratio is rounded to; None for `default_multiple`. A width is never rounded.
        name: What to call it in an error.
    """
    value = _parse(spec, name)
    if isinstance(value, int):
        if not 1 <= value <= channels:
            message, hint = f"{name} {spec!r} is not a width of {channels} channels", "a ratio is written 0.5 or 50%"
            raise UsageError(message, expected=f"an integer from 1 to {channels}", got=repr(spec), hint=hint)
        return value
    if not 0 < value <= 1:
        expected = "a number in (0, 1], or a percentage up to 100%"
        hint = "a width is written as an integer, without a point"
        raise UsageError(f"{name} {spec!r} is not a ratio", expected=expected, got=repr(spec), hint=hint)
    return round_rank(value * channels, channels, multiple)


def _parse(spec: RankSpec, name: str) -> int | float:
    """An int for a width and a float for a ratio."""
    try:
        if isinstance(spec, str):
            return int(spec) if re.fullmatch(r"\s*[+-]?\d+\s*", spec) else ratio(spec)
        if not isinstance(spec, bool):
            return operator.index(spec) if isinstance(spec, SupportsIndex) else float(spec)
    except (TypeError, ValueError):
        pass
    expected = "an integer such as 32, or a ratio such as 0.5 or '50%'"
    raise UsageError(f"{name} {spec!r} is neither a width nor a ratio", expected=expected, got=repr(spec))


def energy_rank(spectrum: Spectrum[Factors], energy: float) -> int:
    """The smallest rank, from 1, that keeps a share in (0, 1] of the energy ``‖W‖²`` (weighted, if the spectrum is)."""
    if not 0 < energy <= 1:
        raise UsageError(f"an energy of {energy!r} makes no sense", expected="a share in (0, 1]", got=repr(energy))
    lost = spectrum.relative_errors.square()
    return max(1, int(torch.argmax((lost <= 1 - energy).to(torch.int8)))) if lost[-1] <= 1 - energy else len(lost) - 1


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
