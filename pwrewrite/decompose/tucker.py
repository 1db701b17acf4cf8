"""Bottlenecks: 1×1 reduce → k×k core → 1×1 expand, by a Tucker-2 decomposition of the two channel axes.

    W[o, i, k] ≈ Σ_a Σ_b  expand[o, a] · core[a, b, k] · reduce[b, i]

after Kim et al. 2016 ("Compression of deep convolutional neural networks for fast and low power mobile applications").
The factors are orthonormal (`pwrewrite.decompose.hooi`). Stride, padding, dilation and output padding sit on the core.
Grouped convolutions are cut group by group, to equal ranks, and all three convolutions run with the same groups.

With weights ``G`` over ``out`` and ``C`` over ``in``, ``‖G^½ (W − Ŵ) C^½‖`` is minimised by decomposing ``G^½ W C^½``
in float64 and mapping the factors back with the inverse roots; they are made orthonormal again and their triangles go
into the core. At full rank a side is projected by ``Q Qᵀ`` instead, so singular weights cannot break exactness. A
weight over the whole patch ``in·k`` is not of this form: take `pwrewrite.decompose.weighting.split_moment`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import UsageError
from .hooi import best_subspaces, project
from .layout import (
    Factors,
    Stage,
    check_finite,
    check_rank,
    frobenius,
    from_forward_layout,
    pointwise_weight,
    prepare_kernel,
    relative,
    wide_dtype,
)
from .spectrum import range_basis
from .weighting import side_weight

#: Below the first of these squared relative errors ‖W‖² − ‖core‖² has to be corrected for factors that are orthonormal
#: to working precision only; below the second it has lost too many digits, and the residual itself is formed.
_CANCELLATION = (2e-2, 4e-3)
#: Below this relative error the factors' own rounding is most of it, and a refinement pays.
_NEARLY_EXACT = 1e-4
#: Norms outside of this range are scaled to 1, so that no square under- or overflows in float32.
_SCALE = (1e-8, 1e8)


@dataclass(frozen=True, eq=False, kw_only=True)
class Tucker2(Factors):
    """``reduce (groups·rank_in, in/groups)``, ``core (groups·rank_out, rank_in, *k)``, ``expand (out, rank_out)``."""

    reduce: Tensor
    core: Tensor
    expand: Tensor

    @property
    def rank_in(self) -> int:
        """The width after the reduction, per group."""
        return self.core.shape[1]

    @property
    def rank_out(self) -> int:
        """The width before the expansion, per group."""
        return self.expand.shape[1]

    def reconstruct(self) -> Tensor:
        groups, rank_in, rank_out = self.groups, self.rank_in, self.rank_out
        core = self.core.reshape(groups, rank_out, rank_in, -1)
        inner = (core.mT @ self.reduce.reshape(groups, 1, rank_in, -1)).mT
        _, _, channels, size = inner.shape
        kernel = self.expand.reshape(groups, -1, rank_out) @ inner.reshape(groups, rank_out, channels * size)
        return kernel.reshape(-1, channels, *self.core.shape[2:])

    def stages(self, transposed: bool = False) -> tuple[Stage, ...]:
        """Reduce (1×1, ordinary), core, expand (1×1, ordinary)."""
        axes = tuple(range(self.core.dim() - 2))
        core = from_forward_layout(self.core, self.groups, transposed)
        return (
            Stage(pointwise_weight(self.reduce, len(axes)), self.groups, False, ()),
            Stage(core, self.groups, transposed, axes),
            Stage(pointwise_weight(self.expand, len(axes)), self.groups, False, ()),
        )


def tucker2(
    kernel: Tensor,
    *,
    rank_in: int,
    rank_out: int,
    groups: int = 1,
    method: str = "hooi",
    sweeps: int = 5,
    tolerance: float = 4e-4,
    input_weight: Tensor | None = None,
    output_weight: Tensor | None = None,
) -> Tucker2:
    """Decomposes a kernel into reduce, core and expand, in float32 or, for a float64 kernel, float64.

    Args:
        kernel: ``(out, in/groups, *k)`` with 1 to 3 spatial axes, forward layout; any real floating dtype.
        rank_in: Width after the reduction, per group, 1 to ``in/groups``.
        rank_out: Width before the expansion, per group, 1 to ``out/groups``.
        groups: Number of groups.
        method: ``hooi``, or ``hosvd`` for the truncation that `Tucker2Spectrum` tabulates.
        sweeps: For ``hooi``: at most this many updates of both factors.
        tolerance: For ``hooi``: share of the error that an update has to gain, on the average of the last two.
        input_weight: ``C``, over ``in``.
        output_weight: ``G``, over ``out``.

    Raises:
        UsageError: A kernel, rank, method or weight that does not fit.
        RefusedError: NaN or Inf.

    >>> import torch
    >>> factors = tucker2(torch.randn(64, 32, 3, 3), rank_in=8, rank_out=16)
    >>> [tuple(t.shape) for t in (factors.reduce, factors.core, factors.expand)]
    [(8, 32), (16, 8, 3, 3), (64, 16)]
    """
    prepared = prepare_kernel(kernel, groups)
    rank_in = check_rank(rank_in, prepared.shape[1], "rank_in")
    rank_out = check_rank(rank_out, prepared.shape[0] // groups, "rank_out")
    if method not in ("hooi", "hosvd"):
        raise UsageError(f"method {method!r} is not known", expected="'hooi' or 'hosvd'")
    problem = TuckerProblem(prepared, groups, input_weight, output_weight)
    return problem.solve(rank_in, rank_out, method, sweeps, tolerance)


class TuckerProblem:
    """A kernel prepared for decomposition: laid out, scaled, weighted; and the way back to factors.

    Attributes:
        tensor: ``(*groups, out/groups, k, in/groups)``, without a group axis when there is one group; scaled to norm 1
            where its square would leave float32. ``norm`` is its norm and ``scale`` what the core is multiplied by.
        weighted: ``G^½ tensor C^½`` in the widest dtype, with its norm; ``tensor`` itself without weights.
    """

    def __init__(self, kernel: Tensor, groups: int, input_weight: Tensor | None, output_weight: Tensor | None) -> None:
        out, channels, *spatial = kernel.shape
        self.groups, self.spatial, self.dtype = groups, spatial, kernel.dtype
        batch = () if groups == 1 else (groups,)
        tensor = kernel.reshape(*batch, out // groups, channels, -1).mT.contiguous()
        norm = frobenius(tensor)
        check_finite(norm, kernel)
        self.scale = 1.0 if norm == 0 or _SCALE[0] < norm < _SCALE[1] else norm
        self.tensor = tensor if self.scale == 1 else tensor / self.scale
        self.norm = norm / self.scale
        left = side_weight(output_weight, groups, out // groups, 1, kernel, "output_weight")
        right = side_weight(input_weight, groups, channels, 1, kernel, "input_weight")
        roots = [None if side is None else side.roots() for side in (left, right)]  # each with its inverse
        self._roots = [pair and tuple(root[0] if groups == 1 else root for root in pair) for pair in roots]
        self.plain = left is None and right is None
        self.weighted = self.tensor if self.plain else self._weigh(self.tensor.to(wide_dtype(kernel)))
        self.weighted_norm = self.norm if self.plain else frobenius(self.weighted)

    def _weigh(self, tensor: Tensor) -> Tensor:
        """``G^½ tensor C^½``."""
        left, right = self._roots
        if left is not None:
            tensor = project(0, left[0], tensor)
        return tensor if right is None else project(1, right[0], tensor)

    def solve(self, rank_in: int, rank_out: int, method: str, sweeps: int, tolerance: float) -> Tucker2:
        """Decomposes from scratch."""
        if self.weighted_norm == 0:
            eye = [torch.eye(size, dtype=self.dtype, device=self.tensor.device) for size in self.weighted.shape[-3::2]]
            batch = self.tensor.shape[:-3]
            return self.finish(eye[0][:, :rank_out].expand(*batch, -1, -1), eye[1][:, :rank_in].expand(*batch, -1, -1))
        return self.finish(
            *best_subspaces(self.weighted, rank_out, rank_in, method, sweeps, tolerance, self.weighted_norm)
        )

    def finish(self, out: Tensor, inner: Tensor, core: Tensor | None = None) -> Tucker2:
        """Orthonormal factors of the weighted tensor as a bottleneck of the kernel; with their core, if it is known."""
        if self.plain:
            out, inner = out.to(self.dtype), inner.to(self.dtype)
            core = project(0, out.mT, project(1, inner.mT, self.tensor)) if core is None else core.to(self.dtype)
            error = self._plain_error(out, inner, core)
            if error < _NEARLY_EXACT:
                out, inner, core = self._refined(out, inner)
                error = self._plain_error(out, inner, core)
            weighted_error = error
        else:
            out, reach_out = self._unweigh(0, out)
            inner, reach_in = self._unweigh(1, inner)
            wide = self.tensor.to(out.dtype)
            core = project(0, reach_out.mT, project(1, reach_in.mT, wide)).to(self.dtype)
            out, inner = out.to(self.dtype), inner.to(self.dtype)
            residual = self.tensor - project(0, out, project(1, inner, core))
            error = relative(frobenius(residual), self.norm)
            weighted_error = relative(frobenius(self._weigh(residual.to(wide.dtype))), self.weighted_norm)
        rank_out, rank_in = core.shape[-3], core.shape[-1]
        core = core if self.scale == 1 else core * self.scale
        return Tucker2(
            reduce=inner.mT.reshape(self.groups * rank_in, -1).contiguous(),
            core=core.mT.reshape(self.groups * rank_out, rank_in, *self.spatial).contiguous(),
            expand=out.reshape(-1, rank_out).contiguous(),
            groups=self.groups,
            relative_error=error,
            weighted_error=weighted_error,
        )

    def _refined(self, out: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors and core where hardly anything is cut off: one Newton–Schulz step in a wider dtype squares what the
        factors lack in orthonormality, which is the whole error then.
        """
        wide = wide_dtype(self.tensor)
        out, inner = (1.5 * u - 0.5 * u @ (u.mT @ u) for u in (out.to(wide), inner.to(wide)))
        core = project(0, out.mT, project(1, inner.mT, self.tensor.to(wide)))
        return out.to(self.dtype), inner.to(self.dtype), core.to(self.dtype)

    def _unweigh(self, side: int, factor: Tensor) -> tuple[Tensor, Tensor]:
        """An orthonormal basis for one side of the unweighted kernel, and the (transposed) projection to it."""
        roots = self._roots[side]
        if roots is None or factor.shape[-1] == factor.shape[-2]:
            return factor, factor
        basis, triangle = torch.linalg.qr(roots[1] @ factor)
        return basis, roots[0] @ factor @ triangle.mT

    def _plain_error(self, out: Tensor, inner: Tensor, core: Tensor) -> float:
        """The relative error, from the norms where they are precise enough and from the residual where not:
        ``‖W − Ŵ‖² = ‖W‖² − 2‖core‖² + ‖Ŵ‖²``, and ``‖Ŵ‖² = ‖core‖²`` up to what the factors lack in orthonormality.
        """
        share = 1 - (relative(frobenius(core), self.norm)) ** 2
        if self.norm and share > _CANCELLATION[1]:
            if share < _CANCELLATION[0]:
                for side, factor in enumerate((out, inner)):
                    defect = factor.mT @ factor
                    defect.diagonal(dim1=-2, dim2=-1).sub_(1)
                    share += float((core * project(side, defect, core)).sum()) / self.norm**2
            return math.sqrt(share)
        return relative(frobenius(project(0, out, project(1, inner, core)).sub_(self.tensor)), self.norm)


class Tucker2Spectrum:
    """The error of a bottleneck at every pair of ranks, per group, from one HOSVD; arguments are those of `tucker2`.

    With complete orthonormal factors HOSVD only rotates a kernel, and the truncation at ``(rank_out, rank_in)`` keeps
    the block ``core[:rank_out, :rank_in]``. With ``E[a, b] = Σ_k core[a, b, k]²`` its squared error is

        loss[ro, ri] = Σ_{a ≥ ro} E[a, :] + Σ_{a < ro} Σ_{b ≥ ri} E[a, b]

    two cumulative sums of positive terms, so small errors are as precise as large ones. Groups add up; with weights all
    of this holds for ``G^½ W C^½``. HOOI at the same ranks does better, by up to a few percent on flat spectra.

    Attributes:
        max_ranks: ``(in/groups, out/groups)``, in the order of `Tucker2Spectrum.truncate`.
        losses: ``(out/groups + 1, in/groups + 1)``: the squared weighted error at ``[rank_out, rank_in]``.
        relative_errors: The square root of that over the loss at rank 0.
    """

    def __init__(
        self, kernel: Tensor, groups: int = 1, input_weight: Tensor | None = None, output_weight: Tensor | None = None
    ) -> None:
        prepared = prepare_kernel(kernel, groups)
        self._problem = TuckerProblem(prepared, groups, input_weight, output_weight)
        weighted = self._problem.weighted
        *batch, out, size, inner = weighted.shape
        self.max_ranks = (inner, out)
        # Where a kernel has more channels than all else can span, the rest of the basis meets zeros only.
        self._out = range_basis(weighted.reshape(*batch, out, size * inner))
        self._in = range_basis(weighted.reshape(*batch, out * size, inner).mT)
        core = project(0, self._out.mT, project(1, self._in.mT, weighted.to(wide_dtype(weighted))))
        block = core.square().sum(-2)
        block = block.reshape(groups, *block.shape[-2:]).sum(0) * self._problem.scale**2
        energy = block.new_zeros(out, inner)
        energy[: len(block), : block.shape[1]] = block
        self.losses = energy.new_zeros(out + 1, inner + 1)
        self.losses[1:, :inner] = energy.flip(1).cumsum(1).flip(1).cumsum(0)
        self.losses[:out] += energy.sum(1).flip(0).cumsum(0).flip(0)[:, None]
        whole = self.losses[0, 0]
        self.relative_errors = (self.losses / whole).sqrt() if whole > 0 else torch.zeros_like(self.losses)

    def truncate(self, rank_in: int, rank_out: int, sweeps: int = 0, tolerance: float = 4e-4) -> Tucker2:
        """The bottleneck at one pair of ranks: as tabulated, or with ``sweeps`` refined by HOOI as `tucker2` does."""
        rank_in = check_rank(rank_in, self.max_ranks[0], "rank_in")
        rank_out = check_rank(rank_out, self.max_ranks[1], "rank_out")
        if sweeps:
            return self._problem.solve(rank_in, rank_out, "hooi", sweeps, tolerance)
        return self._problem.finish(_columns(self._out, rank_out), _columns(self._in, rank_in))


def _columns(basis: Tensor, rank: int) -> Tensor:
    """The first columns of an orthonormal basis, of more than it has in any order."""
    return (torch.linalg.qr(basis, "complete")[0] if rank > basis.shape[-1] else basis)[..., :rank]
