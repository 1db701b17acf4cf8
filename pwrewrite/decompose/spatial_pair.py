"""Spatially separable pairs: the first convolution takes some spatial axes, the second the others.

In 2-D, k×1 → 1×k (Jaderberg et al. 2014, scheme 2; Zhang et al. 2016). With the spatial axes split into ``a`` (first)
and ``b`` (second), the matricisation ``(out·b, in·a)`` is cut to rank r, by one SVD per group:

    W[o, i, a, b] ≈ Σ_r  second[o, r, b] · first[r, i, a]

which is optimal at every rank and exact at ``min(out·b, in·a)``. In 3-D, ``first_axes=(0,)`` is (k,1,1) → (1,k,k),
the (2+1)-D form the other way round (Tran et al. 2018), and ``first_axes=(1, 2)`` is (1,k,k) → (k,1,1).

Each of stride, padding, dilation and output padding is split per axis: an axis' value sits on the convolution that
owns the axis. So between the two, an axis of ``a`` has the output's size and an axis of ``b`` still the input's.

Weights: ``input_weight`` over ``in`` or ``in·a``, ``output_weight`` over ``out`` or ``out·b``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..core.errors import UsageError
from .layout import Factors, Stage, from_forward_layout, prepare_kernel
from .spectrum import MatrixSpectrum, Spectrum, Truncation
from .weighting import Weight, side_weight


@dataclass(frozen=True, eq=False, kw_only=True)
class Spatial(Factors):
    """Two convolutions, each over its own spatial axes.

    Attributes:
        first: ``(groups·rank, in/groups, *k)`` with size 1 on the axes that it does not own.
        second: ``(out, rank, *k)`` with size 1 on the axes of the first.
        first_axes: The spatial axes of the first, counted from 0.
    """

    first: Tensor
    second: Tensor
    first_axes: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The width between, per group."""
        return self.second.shape[1]

    @property
    def second_axes(self) -> tuple[int, ...]:
        """The spatial axes of the second."""
        return tuple(axis for axis in range(self.first.dim() - 2) if axis not in self.first_axes)

    def reconstruct(self) -> Tensor:
        """The kernel ``(out, in/groups, *k)``."""
        groups, rank, out = self.groups, self.rank, self.second.shape[0]
        channels = self.first.shape[1]
        spatial = [max(a, b) for a, b in zip(self.first.shape[2:], self.second.shape[2:])]
        first = self.first.reshape(groups, rank, -1)
        second = self.second.reshape(groups, out // groups, rank, -1)
        pairs = second.mT.reshape(groups, -1, rank) @ first
        sizes = [spatial[axis] for axis in self.second_axes] + [channels] + [spatial[axis] for axis in self.first_axes]
        return pairs.reshape(out, *sizes).permute(_to_kernel(self.first_axes, self.second_axes)).contiguous()

    def stages(self, transposed: bool = False) -> tuple[Stage, ...]:
        """First, then second; both transposed when the original is."""
        first = from_forward_layout(self.first, self.groups, transposed)
        second = from_forward_layout(self.second, self.groups, transposed)
        return (
            Stage("first", first, self.groups, transposed, self.first_axes),
            Stage("second", second, self.groups, transposed, self.second_axes),
        )


def _to_kernel(first_axes: Sequence[int], second_axes: Sequence[int]) -> list[int]:
    """The permutation from ``(out, *b, in, *a)`` to ``(out, in, *k)``."""
    place = {axis: 1 + position for position, axis in enumerate(second_axes)}
    middle = 1 + len(second_axes)
    place |= {axis: middle + 1 + position for position, axis in enumerate(first_axes)}
    return [0, middle, *(place[axis] for axis in range(len(place)))]


def _split(axes: Sequence[int], dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Checks the first's axes; returns them sorted, and the others."""
    first = tuple(sorted(set(axes)))
    second = tuple(axis for axis in range(dims) if axis not in first)
    if not first or not second or any(not 0 <= axis < dims for axis in first):
        raise UsageError(
            f"first_axes={tuple(axes)} does not split {dims} spatial axes in two",
            expected="some but not all of the axes " + ", ".join(map(str, range(dims))),
            got=str(tuple(axes)),
        )
    return first, second


def spatial_spectrum(
    kernel: Tensor,
    groups: int = 1,
    first_axes: Sequence[int] = (0,),
    input_weight: Tensor | None = None,
    output_weight: Weight | None = None,
) -> Spectrum[Spatial]:
    """Factorises a kernel once for spatial pairs of every rank.

    Args:
        kernel: ``(out, in/groups, *k)`` with 2 or 3 spatial axes, forward layout.
        groups: Number of groups.
        first_axes: The spatial axes of the first convolution.
        input_weight: ``C``, over ``in`` or ``in·a``.
        output_weight: ``G``, over ``out`` or ``out·b``, or a pair over ``out`` and ``b`` for their product.

    Returns:
        The spectrum; ``max_rank`` is ``min(out/groups·b, in/groups·a)``.

    Raises:
        UsageError: A kernel, weight or split of the wrong shape.
        RefusedError: NaN or Inf.
    """
    prepared = prepare_kernel(kernel, groups, spatial=(2, 3))
    out, channels, *spatial = prepared.shape
    first, second = _split(first_axes, len(spatial))
    a, b = math.prod(spatial[axis] for axis in first), math.prod(spatial[axis] for axis in second)
    order = [0, *(2 + axis for axis in second), 1, *(2 + axis for axis in first)]
    matrix = prepared.permute(order).reshape(groups, out // groups * b, channels * a)
    left = side_weight(output_weight, groups, out // groups, b, prepared, "output_weight")
    right = side_weight(input_weight, groups, channels, a, prepared, "input_weight")
    first_sizes = [size if axis in first else 1 for axis, size in enumerate(spatial)]
    second_sizes = [size if axis in second else 1 for axis, size in enumerate(spatial)]

    def build(cut: Truncation) -> Spatial:
        rank = cut.left.shape[2]
        pairs = cut.left.reshape(groups, out // groups, b, rank).mT
        return Spatial(
            first=cut.right.reshape(groups * rank, channels, *first_sizes).contiguous(),
            second=pairs.reshape(out, rank, *second_sizes).contiguous(),
            first_axes=first,
            groups=groups,
            relative_error=cut.relative_error,
            weighted_error=cut.weighted_error,
        )

    return Spectrum(MatrixSpectrum(matrix, left, right), build)


def spatial(
    kernel: Tensor,
    rank: int,
    groups: int = 1,
    first_axes: Sequence[int] = (0,),
    input_weight: Tensor | None = None,
    output_weight: Weight | None = None,
) -> Spatial:
    """The best spatial pair of one middle width (per group); arguments as for `spatial_spectrum`."""
    return spatial_spectrum(kernel, groups, first_axes, input_weight, output_weight).truncate(rank)
