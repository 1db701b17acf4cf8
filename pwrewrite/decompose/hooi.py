"""Orthogonal factors of the two channel axes of a kernel, fast: HOSVD, and higher-order orthogonal iteration (HOOI).

A kernel ``T (out, k, in)`` is approximated by ``core ×_out U_out ×_in U_in`` with orthonormal ``U_out (out, rank_out)``
and ``U_in (in, rank_in)``; the core is then ``T ×_out U_outᵀ ×_in U_inᵀ``, and the best pair maximises its norm.

* **HOSVD** (De Lathauwer, De Moor & Vandewalle 2000a): the leading eigenvectors of the Gram matrix of each unfolding.
* **HOOI** (De Lathauwer et al. 2000b; Kim et al. 2016 for convolutions): alternately, each factor is the best for the
  tensor projected by the other. One factor (of the shorter axis) is started by HOSVD and the other from the projected
  tensor (Vannieuwenhoven et al. 2012), so the error is never above that of HOSVD.

An update is one step of subspace iteration from the factor at hand instead of a new eigendecomposition, ``U ← qr(T₂(G)
U)``, with the Chebyshev polynomial that damps eigenvalues between 0 and the smallest Ritz value (Zhou & Saad 2007). It
costs less than half and converges faster on flat spectra, since it overshoots a little; an update that loses energy is
repeated exactly. Updates end when the last two (one of each side) lower the error by less than ``tolerance`` each on
average. The layout ``(out, k, in)`` makes both unfoldings and projections plain matrix products without a copy.

A float32 Gram matrix cannot tell singular values below about 3e-4 of the largest. When what is to be cut off lies near
that floor, all is repeated in float64 (`_TRUST`). Full rank is exact whatever the Gram matrix lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .eigen import LinAlgError, symmetric_eigen
from .gram import row_gram
from .layout import wide_dtype

#: A Gram matrix is trusted where the energy cut off exceeds this times √n·eps times the largest eigenvalue.
_TRUST = 100.0
#: A first update that gains less than this times the tolerance and the squared aspect ratio leaves little: less than
#: the tolerance, over spectra from flat to steep, aspect ratios from 1 to 3 and rank ratios from 1/4 to 3/4.
_FIRST_GAIN = 5.0
#: Chebyshev steps pay from this size on; below it, an eigendecomposition is as fast.
_CHEBYSHEV_SIZE = 48
#: The largest ratio of leading eigenvalue to smallest Ritz value for a step of degree 1 and of degree 2: a float32
#: product loses eps times this ratio or its square of the weakest direction, at most 1%.
_CHEBYSHEV_SPREAD = (1e5, 3e2)

Subspaces = tuple[Tensor, Tensor, Tensor]
"""``(*batch, out, rank_out)`` and ``(*batch, in, rank_in)``, both orthonormal, and the core between them."""


class Untrusted(ArithmeticError):
    """The Gram matrices lost what the ranks ask for; the caller repeats in a wider dtype."""


def best_subspaces(
    tensor: Tensor, rank_out: int, rank_in: int, method: str, sweeps: int, tolerance: float, norm: float
) -> Subspaces:
    """The factors of one kernel or of a stack of kernels (the groups), each on its own, in the tensor's dtype.

    ``tensor (*batch, out, k, in)`` is contiguous, finite, of a scale whose square does not under- or overflow, and
    ``norm`` its Frobenius norm; the rest is as for `pwrewrite.decompose.tucker2`.
    """
    ranks = (rank_out, rank_in)
    try:
        return _Alternation(tensor, ranks, norm, strict=True).solve(method, sweeps, tolerance)
    except Untrusted:
        wide = tensor.to(wide_dtype(tensor))
        out, inner, core = _Alternation(wide, ranks, norm, strict=False).solve(method, sweeps, tolerance)
        return out.to(tensor.dtype), inner.to(tensor.dtype), core.to(tensor.dtype)


class _Alternation:
    """The two sides of a kernel, 0 (out) and 1 (in), and what is needed to update one from the other."""

    def __init__(self, tensor: Tensor, ranks: tuple[int, int], norm: float, strict: bool) -> None:
        self.tensor = tensor
        self.energy = norm * norm
        self.ranks = ranks
        self.sizes = (tensor.shape[-3], tensor.shape[-1])
        self.strict = strict

    def solve(self, method: str, sweeps: int, tolerance: float) -> Subspaces:
        if method == "hosvd":
            out, inner = self.start(0), self.start(1)
            return self.result(out, inner, project(1, inner.mT, self.tensor), 1)
        return self.iterate(sweeps, tolerance)

    def gram(self, side: int, tensor: Tensor) -> Tensor:
        batch, (out, size, inner) = tensor.shape[:-3], tensor.shape[-3:]
        if side == 0:
            return row_gram(tensor.reshape(*batch, out, size * inner))
        return row_gram(tensor.reshape(*batch, out * size, inner).mT)

    def start(self, side: int, tensor: Tensor | None = None) -> Tensor:
        """Leading eigenvectors of one side, of the kernel itself or of a projected one."""
        values, vectors = symmetric_eigen(self.gram(side, self.tensor if tensor is None else tensor))
        size, rank = self.sizes[side], self.ranks[side]
        if self.strict and rank < size and self.tensor.dtype != wide_dtype(self.tensor):
            noise = _TRUST * math.sqrt(size) * torch.finfo(values.dtype).eps
            if bool((values[..., : size - rank].clamp(min=0).sum(-1) < noise * values[..., -1]).any()):
                raise Untrusted
        return vectors[..., size - rank :].flip(-1)

    def result(self, out: Tensor, inner: Tensor, partial: Tensor, done: int) -> Subspaces:
        """The factors with their core; ``partial`` is the kernel already projected on side ``done``."""
        return out, inner, project(1 - done, (out if done else inner).mT, partial)

    def iterate(self, sweeps: int, tolerance: float) -> Subspaces:
        """HOOI from a sequentially truncated start, the shorter side first."""
        first = 0 if self.sizes[0] <= self.sizes[1] else 1
        factors: list[Tensor] = [self.tensor, self.tensor]
        factors[first] = self.start(first)
        partial = project(first, factors[first].mT, self.tensor)
        side = 1 - first
        factors[side] = self.start(side, partial)
        updates, previous = 0, math.inf
        aspect = min(self.sizes) / max(self.sizes)
        free = [rank < size for rank, size in zip(self.ranks, self.sizes)]
        while all(free) and updates < 2 * sweeps:
            side = 1 - side
            partial = project(1 - side, factors[1 - side].mT, self.tensor)
            factors[side], gain = self.update(side, factors[side], self.gram(side, partial))
            updates += 1
            # the sides may gain alternately much and little; but one that gains far less than the other has converged
            if gain + min(previous, 4 * gain) < 2 * tolerance:
                break
            if updates == 1 and gain < _FIRST_GAIN * aspect**2 * tolerance:
                break
            previous = gain
        return self.result(factors[0], factors[1], partial, 1 - side)

    def update(self, side: int, factor: Tensor, gram: Tensor) -> tuple[Tensor, float]:
        """A better factor for a Gram matrix, and by which share it lowers the error."""
        product = gram @ factor
        quotients = (factor * product).sum(-2)
        before = float(quotients.sum())
        updated = self._chebyshev(factor, gram, product, float(quotients.max()))
        after = -math.inf if updated is None else _captured(gram, updated)
        if updated is None or after < before:
            updated = symmetric_eigen(gram)[1][..., gram.shape[-1] - factor.shape[-1] :].flip(-1)
            after = _captured(gram, updated)
        return updated, (after - before) / (2 * max(self.energy - before, 1e-30 * self.energy))

    def _chebyshev(self, factor: Tensor, gram: Tensor, product: Tensor, top: float) -> Tensor | None:
        """One Chebyshev-filtered step for ``G``, ``U``, ``G U`` and the largest Rayleigh quotient; None where an
        eigendecomposition does better.
        """
        size, rank = factor.shape[-2:]
        if factor.dim() != 2 or size < _CHEBYSHEV_SIZE or rank > 3 * size // 4:
            return None
        try:
            floor = float(torch.linalg.eigvalsh(factor.mT @ product)[0])
        except LinAlgError:
            return None
        if not floor * _CHEBYSHEV_SPREAD[0] > top:
            return None
        scale = 2 / floor
        once = torch.sub(scale * product, factor)
        if floor * _CHEBYSHEV_SPREAD[1] >= top:
            once = torch.addmm(torch.add(factor, once, alpha=2), gram, once, beta=-1, alpha=2 * scale)
        basis: Tensor = torch.linalg.qr(once)[0]
        return basis


def project(side: int, matrix: Tensor, tensor: Tensor) -> Tensor:
    """``matrix (*batch, new, old)`` along the out axis (side 0) or the in axis (1) of a ``(*batch, out, k, in)``."""
    batch, (out, size, inner) = tensor.shape[:-3], tensor.shape[-3:]
    if side == 0:
        return (matrix @ tensor.reshape(*batch, out, size * inner)).reshape(*batch, -1, size, inner)
    return (tensor.reshape(*batch, out * size, inner) @ matrix.mT).reshape(*batch, out, size, -1)


def _captured(gram: Tensor, factor: Tensor) -> float:
    """``tr(Uᵀ G U)``: the energy that a factor keeps."""
    return float((factor * (gram @ factor)).sum())
