"""The low-rank pair: a linear map, or a pointwise (1×1) convolution, through a narrower one.

    W[o, i] ≈ Σ_r  expand[o, r] · reduce[r, i]

by one SVD per group, optimal at every rank (Eckart & Young 1936). A pointwise convolution may still have a stride and
padding: they sit on ``reduce``, so both factors run at the output's resolution; a transposed one upsamples in
``expand``, so both run at the input's.

Weights: ``input_weight`` over ``in``, ``output_weight`` over ``out``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.errors import UsageError
from .layout import Factors, Stage, from_forward_layout, pointwise_weight, prepare_kernel, spatial_size
from .spectrum import MatrixSpectrum, Spectrum, Truncation
from .weighting import side_weight


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank(Factors):
    """Two matrices in place of one.

    Attributes:
        reduce: ``(groups·rank, in/groups)``.
        expand: ``(out, rank)``.
        spatial_axes: Spatial axes of the kernel, all of size 1; 0 for a linear map.
    """

    reduce: Tensor
    expand: Tensor
    spatial_axes: int

    @property
    def rank(self) -> int:
        """The width between, per group."""
        return self.expand.shape[1]

    def reconstruct(self) -> Tensor:
        """The kernel ``(out, in/groups, 1, …)``."""
        out, rank = self.expand.shape
        product = self.expand.reshape(self.groups, -1, rank) @ self.reduce.reshape(self.groups, rank, -1)
        return pointwise_weight(product.reshape(out, -1), self.spatial_axes)

    def stages(self, transposed: bool = False) -> tuple[Stage, ...]:
        """Reduce, then expand; the stride is on reduce, or on expand when transposed."""
        axes = tuple(range(self.spatial_axes))
        reduce = pointwise_weight(self.reduce, self.spatial_axes)
        expand = pointwise_weight(self.expand, self.spatial_axes)
        return (
            Stage("reduce", reduce, self.groups, False, () if transposed else axes),
            Stage(
                "expand",
                from_forward_layout(expand, self.groups, transposed),
                self.groups,
                transposed,
                axes if transposed else (),
            ),
        )


def low_rank_spectrum(
    matrix: Tensor,
    groups: int = 1,
    input_weight: Tensor | None = None,
    output_weight: Tensor | None = None,
) -> Spectrum[LowRank]:
    """Factorises a matrix or pointwise kernel once for every rank.

    Args:
        matrix: ``(out, in/groups)``, or a kernel ``(out, in/groups, 1, …)`` in forward layout.
        groups: Number of groups.
        input_weight: ``C``, over ``in``.
        output_weight: ``G``, over ``out``.

    Returns:
        The spectrum; ``max_rank`` is ``min(out/groups, in/groups)``.

    Raises:
        UsageError: A kernel with a spatial extent, or a kernel or weight of the wrong shape or dtype.
        RefusedError: NaN or Inf.
    """
    prepared = prepare_kernel(matrix, groups, spatial=(0, 3))
    if spatial_size(prepared.shape) != 1:
        raise UsageError(
            f"a kernel of shape {tuple(matrix.shape)} is not pointwise",
            expected="(out, in/groups), or spatial sizes of 1",
            hint="use expansion, reduction, spatial, depthwise or tucker2",
        )
    out, channels, *spatial = prepared.shape
    left = side_weight(output_weight, groups, out // groups, 1, prepared, "output_weight")
    right = side_weight(input_weight, groups, channels, 1, prepared, "input_weight")

    def build(cut: Truncation) -> LowRank:
        rank = cut.left.shape[2]
        return LowRank(
            reduce=cut.right.reshape(groups * rank, channels).contiguous(),
            expand=cut.left.reshape(out, rank).contiguous(),
            spatial_axes=len(spatial),
            groups=groups,
            relative_error=cut.relative_error,
            weighted_error=cut.weighted_error,
        )

    return Spectrum(MatrixSpectrum(prepared.reshape(groups, out // groups, channels), left, right), build)


def low_rank(
    matrix: Tensor,
    rank: int,
    groups: int = 1,
    input_weight: Tensor | None = None,
    output_weight: Tensor | None = None,
) -> LowRank:
    """The best pair of one rank (per group); arguments as for `low_rank_spectrum`."""
    return low_rank_spectrum(matrix, groups, input_weight, output_weight).truncate(rank)
