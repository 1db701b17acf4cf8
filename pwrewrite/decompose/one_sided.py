"""One-sided forms: a 1×1 before (reduce) or after (expand) a k×k convolution, by one SVD per group.

**Reduction**, 1×1 → k×k. The kernel's matricisation ``(out·k, in)`` is cut to rank r:

    W[o, i, k] ≈ Σ_r  core[o, r, k] · reduce[r, i]

**Expansion**, k×k → 1×1. The matricisation ``(out, in·k)`` is cut to rank r:

    W[o, i, k] ≈ Σ_r  expand[o, r] · core[r, i, k]

Both are optimal at every rank (Eckart & Young 1936); expansion is the response reconstruction of Zhang et al. 2016
when weighted by the input's second moment. Stride, padding, dilation and output padding sit on the core: a reduction
runs at the input's resolution, an expansion at the output's.

Weights: ``input_weight`` over ``in`` (or, for the expansion, over the patch ``in·k``), ``output_weight`` over ``out``
(or, for the reduction, over ``out·k``); see `pwrewrite.decompose.weighting`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .layout import Factors, Stage, from_forward_layout, pointwise_weight, prepare_kernel, spatial_size
from .spectrum import MatrixSpectrum, Spectrum, Truncation
from .weighting import Weight, side_weight


@dataclass(frozen=True, eq=False, kw_only=True)
class Reduction(Factors):
    """A 1×1 reduction and a k×k core.

    Attributes:
        reduce: ``(groups·rank, in/groups)``.
        core: ``(out, rank, *k)``.
    """

    reduce: Tensor
    core: Tensor

    @property
    def rank(self) -> int:
        """The width between, per group."""
        return self.core.shape[1]

    def reconstruct(self) -> Tensor:
        """The kernel ``(out, in/groups, *k)``."""
        out, rank, *spatial = self.core.shape
        core = self.core.reshape(self.groups, out // self.groups, rank, -1)
        kernel = core.mT @ self.reduce.reshape(self.groups, 1, rank, -1)
        return kernel.mT.reshape(out, -1, *spatial)

    def stages(self, transposed: bool = False) -> tuple[Stage, ...]:
        """Reduce (1×1, ordinary), then core."""
        axes = tuple(range(self.core.dim() - 2))
        core = from_forward_layout(self.core, self.groups, transposed)
        return (
            Stage("reduce", pointwise_weight(self.reduce, len(axes)), self.groups, False, ()),
            Stage("core", core, self.groups, transposed, axes),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Expansion(Factors):
    """A k×k core and a 1×1 expansion.

    Attributes:
        core: ``(groups·rank, in/groups, *k)``.
        expand: ``(out, rank)``.
    """

    core: Tensor
    expand: Tensor

    @property
    def rank(self) -> int:
        """The width between, per group."""
        return self.expand.shape[1]

    def reconstruct(self) -> Tensor:
        """The kernel ``(out, in/groups, *k)``."""
        out, rank = self.expand.shape
        core = self.core.reshape(self.groups, rank, -1)
        return (self.expand.reshape(self.groups, -1, rank) @ core).reshape(out, *self.core.shape[1:])

    def stages(self, transposed: bool = False) -> tuple[Stage, ...]:
        """Core, then expand (1×1, ordinary)."""
        axes = tuple(range(self.core.dim() - 2))
        core = from_forward_layout(self.core, self.groups, transposed)
        return (
            Stage("core", core, self.groups, transposed, axes),
            Stage("expand", pointwise_weight(self.expand, len(axes)), self.groups, False, ()),
        )


def reduction_spectrum(
    kernel: Tensor,
    groups: int = 1,
    input_weight: Tensor | None = None,
    output_weight: Weight | None = None,
) -> Spectrum[Reduction]:
    """Factorises a kernel once for reductions of every rank.

    Args:
        kernel: ``(out, in/groups, *k)``, forward layout.
        groups: Number of groups.
        input_weight: ``C``, over ``in``.
        output_weight: ``G``, over ``out`` or ``out·k``, or a pair over ``out`` and ``k`` for their product.

    Returns:
        The spectrum; ``max_rank`` is ``min(in/groups, out/groups·k)``.

    Raises:
        UsageError: A kernel or weight of the wrong shape or dtype.
        RefusedError: NaN or Inf.
    """
    prepared = prepare_kernel(kernel, groups)
    out, channels, *spatial = prepared.shape
    size = spatial_size(prepared.shape)
    matrix = prepared.reshape(groups, out // groups, channels, size).mT.reshape(groups, -1, channels)
    left = side_weight(output_weight, groups, out // groups, size, prepared, "output_weight")
    right = side_weight(input_weight, groups, channels, 1, prepared, "input_weight")

    def build(cut: Truncation) -> Reduction:
        rank = cut.right.shape[1]
        core = cut.left.reshape(groups, out // groups, size, rank).mT.reshape(out, rank, *spatial)
        return Reduction(
            reduce=cut.right.reshape(groups * rank, channels).contiguous(),
            core=core.contiguous(),
            groups=groups,
            relative_error=cut.relative_error,
            weighted_error=cut.weighted_error,
        )

    return Spectrum(MatrixSpectrum(matrix, left, right), build)


def expansion_spectrum(
    kernel: Tensor,
    groups: int = 1,
    input_weight: Tensor | None = None,
    output_weight: Tensor | None = None,
) -> Spectrum[Expansion]:
    """Factorises a kernel once for expansions of every rank.

    Args:
        kernel: ``(out, in/groups, *k)``, forward layout.
        groups: Number of groups.
        input_weight: ``C``, over ``in`` or the patch ``in·k``.
        output_weight: ``G``, over ``out``.

    Returns:
        The spectrum; ``max_rank`` is ``min(out/groups, in/groups·k)``.

    Raises:
        UsageError: A kernel or weight of the wrong shape or dtype.
        RefusedError: NaN or Inf.
    """
    prepared = prepare_kernel(kernel, groups)
    out, channels, *spatial = prepared.shape
    matrix = prepared.reshape(groups, out // groups, -1)
    left = side_weight(output_weight, groups, out // groups, 1, prepared, "output_weight")
    right = side_weight(input_weight, groups, channels, spatial_size(prepared.shape), prepared, "input_weight")

    def build(cut: Truncation) -> Expansion:
        rank = cut.left.shape[2]
        return Expansion(
            core=cut.right.reshape(groups * rank, channels, *spatial).contiguous(),
            expand=cut.left.reshape(out, rank).contiguous(),
            groups=groups,
            relative_error=cut.relative_error,
            weighted_error=cut.weighted_error,
        )

    return Spectrum(MatrixSpectrum(matrix, left, right), build)


def reduction(
    kernel: Tensor,
    rank: int,
    groups: int = 1,
    input_weight: Tensor | None = None,
    output_weight: Weight | None = None,
) -> Reduction:
    """The best 1×1 → k×k of one rank (per group); arguments as for `reduction_spectrum`."""
    return reduction_spectrum(kernel, groups, input_weight, output_weight).truncate(rank)


def expansion(
    kernel: Tensor,
    rank: int,
    groups: int = 1,
    input_weight: Tensor | None = None,
    output_weight: Tensor | None = None,
) -> Expansion:
    """The best k×k → 1×1 of one rank (per group); arguments as for `expansion_spectrum`."""
    return expansion_spectrum(kernel, groups, input_weight, output_weight).truncate(rank)
