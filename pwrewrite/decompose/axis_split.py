"""Two convolutions that share the axes of one kernel: the first takes some spatial axes, the second the others.

With the spatial axes split into ``a`` (first) and ``b`` (second), the matricisation ``(out·b, in·a)`` is cut to rank r,
by one SVD per group:

    W[o, i, a, b] ≈ Σ_r  second[o, r, b] · first[r, i, a]

which is optimal at every rank (Eckart & Young 1936) and exact at ``min(out·b, in·a)``. Which axes are ``a`` makes the
form:

    no axis       1×1 → k×k, a reduction
    every axis    k×k → 1×1, an expansion: the response reconstruction of Zhang et al. 2016 when weighted by the
                  input's second moment
    some axes     k×1 → 1×k (Jaderberg et al. 2014, scheme 2); in 3-D (k,1,1) → (1,k,k), or ``(1, 2)`` for the
                  (2+1)-D form (Tran et al. 2018)
    no extent     a linear map or pointwise convolution through a narrower one

An axis' stride, padding, dilation and output padding sit on the convolution that owns it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..core.errors import UsageError
from .last_factor import PairFactors
from .layout import Stage, from_forward_layout, prepare_kernel
from .spectrum import Spectrum, Truncation
from .weighting import Weight, side_weight


@dataclass(frozen=True, eq=False, kw_only=True)
class AxisSplit(PairFactors):
    """Two convolutions, each over its own spatial axes and with size 1 on the others."""

    first: Tensor  # (groups·rank, in/groups, *k)
    second: Tensor  # (out, rank, *k)
    first_axes: tuple[int, ...]  # the spatial axes of the first, counted from 0

    last = "second"

    @property
    def rank(self) -> int:
        return self.first.shape[0] // self.groups

    @property
    def second_axes(self) -> tuple[int, ...]:
        """The spatial axes of the second."""
        return tuple(axis for axis in range(self.first.dim() - 2) if axis not in self.first_axes)

    def reconstruct(self) -> Tensor:
        groups, rank, (out, channels) = self.groups, self.rank, (self.second.shape[0], self.first.shape[1])
        second = self.second.reshape(groups, out // groups, rank, -1).mT.reshape(groups, -1, rank)
        pairs = second @ self.first.reshape(groups, rank, -1)
        own, others = self.first_axes, self.second_axes
        sizes = [*(self.second.shape[2 + axis] for axis in others), channels]
        order = _matrix_order(own, others)
        kernel = pairs.reshape(out, *sizes, *(self.first.shape[2 + axis] for axis in own))
        return kernel.permute([order.index(axis) for axis in range(len(order))]).contiguous()

    def stages(self, transposed: bool = False) -> tuple[Stage, ...]:
        """First, then second; each transposed when the original is and it owns an axis."""
        return tuple(
            Stage(from_forward_layout(weight, self.groups, up := transposed and bool(axes)), self.groups, up, axes)
            for weight, axes in ((self.first, self.first_axes), (self.second, self.second_axes))
        )

    def inner(self, patches: Tensor, spatial: Sequence[int]) -> Tensor:
        """Rows are ``(rank, *b)``."""
        groups, columns = self.groups, patches.shape[-1]
        first = self.first.reshape(groups, self.rank, -1).to(patches)
        apart = math.prod(spatial[axis] for axis in self.second_axes)
        if apart > 1 and self.first_axes:
            order = [0, 1, *(2 + a for a in self.first_axes), *(2 + a for a in self.second_axes), 2 + len(spatial)]
            patches = patches.reshape(groups, -1, *spatial, columns).permute(order)
        return (first @ patches.reshape(groups, first.shape[2], -1)).reshape(groups, -1, columns)


def _matrix_order(first_axes: Iterable[int], second_axes: Iterable[int]) -> list[int]:
    """The axes of a kernel ``(out, in, *k)`` in the order ``(out, *b, in, *a)``."""
    return [0, *(2 + axis for axis in second_axes), 1, *(2 + axis for axis in first_axes)]


def split_spectrum(
    kernel: Tensor,
    groups: int = 1,
    first_axes: Iterable[int] = (),
    input_weight: Weight | None = None,
    output_weight: Weight | None = None,
) -> Spectrum[AxisSplit]:
    """Factorises a kernel once for pairs of every rank up to ``min(out/groups·b, in/groups·a)``.

    Args:
        kernel: ``(out, in/groups, *k)`` with up to 3 spatial axes, forward layout; a matrix for a linear map.
        groups: Number of groups.
        first_axes: The spatial axes of the first convolution.
        input_weight: ``C``, over ``in`` or ``in·a``.
        output_weight: ``G``, over ``out`` or ``out·b``, or a pair over ``out`` and ``b`` for their product.

    Raises:
        UsageError: A kernel, weight or axes that do not fit.
        RefusedError: NaN or Inf.
    """
    prepared = prepare_kernel(kernel, groups, spatial=(0, 3))
    out, channels, *spatial = prepared.shape
    first = tuple(sorted(set(first_axes)))
    if any(axis not in range(len(spatial)) for axis in first):
        raise UsageError(f"first_axes={first} are not among {len(spatial)} spatial axes", got=str(first))
    second = tuple(axis for axis in range(len(spatial)) if axis not in first)
    a, b = math.prod(spatial[axis] for axis in first), math.prod(spatial[axis] for axis in second)
    matrix = prepared.permute(_matrix_order(first, second)).reshape(groups, out // groups * b, channels * a)
    left = side_weight(output_weight, groups, out // groups, b, prepared, "output_weight")
    right = side_weight(input_weight, groups, channels, a, prepared, "input_weight")
    first_sizes = [size if axis in first else 1 for axis, size in enumerate(spatial)]
    second_sizes = [size if axis in second else 1 for axis, size in enumerate(spatial)]

    def build(cut: Truncation) -> AxisSplit:
        rank = cut.left.shape[2]
        pairs = cut.left.reshape(groups, out // groups, b, rank).mT
        return AxisSplit(
            first=cut.right.reshape(groups * rank, channels, *first_sizes).contiguous(),
            second=pairs.reshape(out, rank, *second_sizes).contiguous(),
            first_axes=first,
            groups=groups,
            relative_error=cut.relative_error,
            weighted_error=cut.weighted_error,
        )

    return Spectrum(matrix, left, right, build)
