"""The pointwise map that is nearest to what lies between two tensors: least squares from their joint moment.

With ``S`` the covariance of inputs ``x`` and outputs ``y`` side by side, the map and its bias with the least
``E‖y − K x − b‖²``, drawn a little to a map ``K₀`` (the identity where there is one, else none), and what it misses are

    K = K₀ + (S_yx − K₀ S_xx)(S_xx + λ)⁻¹        b = E[y] − K E[x]        R = S_yy − K S_xy − S_yx Kᵀ + K S_xx Kᵀ

Whatever the weight ``G`` of the outputs, no other map has a smaller ``tr(G R)`` (at ``λ = 0``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Factors, Stage, pointwise_weight


@dataclass(frozen=True, eq=False, kw_only=True)
class NearestMap(Factors):
    """A map ``kernel (out, in)`` with a ``bias (out,)``, over so many spatial ``dims``; ``missed (out, out)`` is R."""

    kernel: Tensor
    bias: Tensor
    missed: Tensor
    dims: int

    def reconstruct(self) -> Tensor:
        return pointwise_weight(self.kernel, self.dims)

    def stages(self, transposed: bool = False) -> tuple[Stage, ...]:
        return (Stage(self.reconstruct(), 1, False, tuple(range(self.dims))),)


def nearest_map(covariance: Tensor, mean: Tensor, inputs: int, dims: int, ridge: float) -> NearestMap:
    """The nearest map over ``dims`` spatial dims, from ``S (in + out, in + out)``, inputs first, and their ``mean``.

    ``ridge`` is ``λ``, as a share of the mean variance of an input.
    """
    xx, xy, yy = covariance[:inputs, :inputs], covariance[:inputs, inputs:], covariance[inputs:, inputs:]
    eye = torch.eye(inputs, dtype=xx.dtype, device=xx.device)
    start = eye if len(yy) == inputs else torch.zeros_like(xy.mT)
    level = xx.diagonal().mean().clamp(min=1e-30)
    solved = torch.linalg.solve(xx + ridge * level * eye, xy - xx @ start.mT)
    kernel = start + solved.mT
    crossed = kernel @ xy
    missed = yy - crossed - crossed.mT + kernel @ xx @ kernel.mT
    total = float(yy.diagonal().sum())
    error = (max(float(missed.diagonal().sum()), 0.0) / total) ** 0.5 if total > 0 else 0.0
    bias = mean[inputs:] - kernel @ mean[:inputs]
    return NearestMap(
        groups=1, relative_error=error, weighted_error=error, kernel=kernel, bias=bias, missed=missed, dims=dims
    )
