"""The error of a bottleneck at every pair of ranks, from one HOSVD.

With complete orthonormal factors, HOSVD only rotates a kernel: ``‖W‖ = ‖core‖``, and the truncation at ``(rank_out,
rank_in)`` keeps the block ``core[:rank_out, :rank_in]``. Its squared error is the energy outside of the block,

    loss[ro, ri] = ‖W‖² − ‖core[:ro, :ri]‖² = Σ_{a ≥ ro} E[a, :] + Σ_{a < ro} Σ_{b ≥ ri} E[a, b],      E[a, b] = Σ_k
    core[a, b, k]²

two cumulative sums of positive terms, so small errors are as precise as large ones. Groups add up. With weights all
of this holds for ``G^½ W C^½``.

HOOI at the same ranks does better, by up to a few percent on flat spectra: `Tucker2Spectrum.truncate` can refine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import UsageError
from .hooi import project
from .layout import check_rank, prepare_kernel, wide_dtype
from .ranks import default_multiple, evbmf_rank, round_rank
from .spectrum import left_basis
from .tucker import Tucker2, TuckerProblem


class Tucker2Spectrum:
    """One HOSVD of a kernel. Ranks are per group throughout.

    Args:
        kernel: ``(out, in/groups, *k)``, forward layout.
        groups: Number of groups.
        input_weight: ``C``, over ``in``.
        output_weight: ``G``, over ``out``.

    Attributes:
        max_ranks: ``(in/groups, out/groups)``, in the order of `Tucker2Spectrum.truncate`.
        losses: ``(out/groups + 1, in/groups + 1)``: the squared weighted error at ``[rank_out, rank_in]``, in the
            widest dtype.
        relative_errors: The square root of that over the loss at rank 0.
        energies_in: ``(groups, in/groups)``: squared singular values of the in unfolding, descending.
        energies_out: ``(groups, out/groups)``: those of the out unfolding.
    """

    def __init__(
        self,
        kernel: Tensor,
        groups: int = 1,
        input_weight: Tensor | None = None,
        output_weight: Tensor | None = None,
    ) -> None:
        prepared = prepare_kernel(kernel, groups)
        self._problem = TuckerProblem(prepared, groups, input_weight, output_weight)
        weighted = self._problem.weighted
        out, size, inner = weighted.shape[-3:]
        batch = weighted.shape[:-3]
        self.max_ranks = (inner, out)
        self._shape = (groups, out, size, inner)
        self._out, energies_out = left_basis(weighted.reshape(*batch, out, size * inner))
        self._in, energies_in = left_basis(weighted.reshape(*batch, out * size, inner).mT)
        scale = self._problem.scale**2
        self.energies_out = energies_out.reshape(groups, out) * scale
        self.energies_in = energies_in.reshape(groups, inner) * scale
        core = project(0, self._out.mT, project(1, self._in.mT, weighted.to(wide_dtype(weighted))))
        energy = core.square().sum(-2).reshape(groups, out, inner).sum(0) * scale
        self.losses = _complement_sums(energy)
        whole = self.losses[0, 0]
        self.relative_errors = (self.losses / whole).sqrt() if whole > 0 else torch.zeros_like(self.losses)

    def truncate(self, rank_in: int, rank_out: int, sweeps: int = 0, tolerance: float = 4e-4) -> Tucker2:
        """The bottleneck at one pair of ranks.

        Args:
            rank_in: Width after the reduction.
            rank_out: Width before the expansion.
            sweeps: 0 for the tabulated truncation; more to refine it by HOOI, as `tucker2` does.
            tolerance: When to stop refining, as for `tucker2`.

        Raises:
            UsageError: A rank out of range.
        """
        rank_in = check_rank(rank_in, self.max_ranks[0], "rank_in")
        rank_out = check_rank(rank_out, self.max_ranks[1], "rank_out")
        if sweeps:
            return self._problem.solve(rank_in, rank_out, "hooi", sweeps, tolerance)
        return self._problem.finish(self._out[..., :rank_out], self._in[..., :rank_in])

    def energy_ranks(self, energy: float, multiple: int | None = None) -> tuple[int, int]:
        """The cheapest ``(rank_in, rank_out)`` that keep a share of the energy, by the parameters of the three
        convolutions.

        Args:
            energy: The share of ``‖W‖²`` to keep, in (0, 1].
            multiple: Only ranks that are multiples of this, or full; None for `default_multiple` of each side.

        Raises:
            UsageError: A share out of (0, 1], or a multiple below 1.
        """
        if not 0 < energy <= 1:
            raise UsageError(f"an energy of {energy!r} makes no sense", expected="a share in (0, 1]", got=repr(energy))
        if multiple is not None and multiple < 1:
            raise UsageError(f"cannot round ranks to a multiple of {multiple}", expected="1 or more", got=str(multiple))
        _, out, size, inner = self._shape
        ins, outs = _rank_grid(inner, multiple), _rank_grid(out, multiple)
        rank_in = torch.tensor(ins, device=self.losses.device)
        rank_out = torch.tensor(outs, device=self.losses.device)[:, None]
        cost = (rank_in * inner + rank_in * rank_out * size + out * rank_out).double()
        enough = self.losses[rank_out, rank_in] <= (1 - energy) * self.losses[0, 0]
        enough[-1, -1] = True
        best = int(torch.where(enough, cost, torch.inf).argmin())
        return ins[best % len(ins)], outs[best // len(ins)]

    def evbmf_ranks(self, multiple: int | None = None) -> tuple[int, int]:
        """``(rank_in, rank_out)`` by EVBMF of the two unfoldings, as Kim et al. 2016 choose them; the largest over
        the groups.

        Args:
            multiple: What to round to; None for `default_multiple` of each side.
        """
        _, out, size, inner = self._shape
        rank_in = max(evbmf_rank(energies.sqrt(), (inner, out * size)) for energies in self.energies_in)
        rank_out = max(evbmf_rank(energies.sqrt(), (out, inner * size)) for energies in self.energies_out)
        return round_rank(rank_in, inner, multiple), round_rank(rank_out, out, multiple)


def tucker2_spectrum(
    kernel: Tensor,
    groups: int = 1,
    input_weight: Tensor | None = None,
    output_weight: Tensor | None = None,
) -> Tucker2Spectrum:
    """Factorises a kernel once for bottlenecks at every pair of ranks; see `Tucker2Spectrum`.

    Raises:
        UsageError: A kernel or weight of the wrong shape or dtype.
        RefusedError: NaN or Inf.
    """
    return Tucker2Spectrum(kernel, groups, input_weight, output_weight)


def _complement_sums(energy: Tensor) -> Tensor:
    """``(out, in)`` energies to ``(out + 1, in + 1)`` sums over everything outside of ``[:ro, :ri]``."""
    out, inner = energy.shape
    right = energy.new_zeros(out + 1, inner + 1)
    right[1:, :inner] = energy.flip(1).cumsum(1).flip(1).cumsum(0)
    below = energy.new_zeros(out + 1)
    below[:out] = energy.sum(1).flip(0).cumsum(0).flip(0)
    return right + below[:, None]


def _rank_grid(channels: int, multiple: int | None) -> list[int]:
    """The multiples below the full rank, and the full rank."""
    step = default_multiple(channels) if multiple is None else multiple
    return [*range(step, channels, step), channels]
