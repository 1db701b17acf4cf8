"""The error of a bottleneck at every pair of ranks, from one HOSVD.

With complete orthonormal factors HOSVD only rotates a kernel, and the truncation at ``(rank_out, rank_in)`` keeps the
block ``core[:rank_out, :rank_in]``. With ``E[a, b] = Σ_k core[a, b, k]²`` its squared error is

    loss[ro, ri] = Σ_{a ≥ ro} E[a, :] + Σ_{a < ro} Σ_{b ≥ ri} E[a, b]

two cumulative sums of positive terms, so small errors are as precise as large ones. Groups add up; with weights all of
this holds for ``G^½ W C^½``. HOOI at the same ranks does better, by up to a few percent on flat spectra.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hooi import project
from .layout import check_rank, prepare_kernel, wide_dtype
from .spectrum import left_basis
from .tucker import Tucker2, TuckerProblem


class Tucker2Spectrum:
    """One HOSVD of a kernel. Ranks are per group throughout; arguments and errors are those of `tucker2`.

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
        self._out, _ = left_basis(weighted.reshape(*batch, out, size * inner))
        self._in, _ = left_basis(weighted.reshape(*batch, out * size, inner).mT)
        scale = self._problem.scale**2
        core = project(0, self._out.mT, project(1, self._in.mT, weighted.to(wide_dtype(weighted))))
        energy = core.square().sum(-2).reshape(groups, out, inner).sum(0) * scale
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
        return self._problem.finish(self._out[..., :rank_out], self._in[..., :rank_in])
