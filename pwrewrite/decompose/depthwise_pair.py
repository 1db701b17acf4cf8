"""Depthwise k×k followed by pointwise: ``terms`` spatial filters per input channel, then a 1×1 that mixes them.

Network decoupling (Guo et al. 2018): for each input channel the slice ``(out, k)`` of the kernel is cut to rank
``terms``, by one SVD per input channel:

    W[o, i, k] ≈ Σ_t  pointwise[o, i·terms + t] · depthwise[i·terms + t, k]

which is optimal at every number of terms and exact at ``min(out/groups, k)``. One term is the depthwise-separable
convolution of MobileNet (Howard et al. 2017). Stride, padding, dilation and output padding sit on the depthwise one.
Of an ``input_weight`` only the diagonal blocks, one per input channel, are seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .last_factor import PairFactors
from .layout import Stage, from_forward_layout, pointwise_weight, prepare_kernel
from .spectrum import Spectrum, Truncation
from .weighting import RepeatedWeight, SideWeight, Weight, side_weight


@dataclass(frozen=True, eq=False, kw_only=True)
class Depthwise(PairFactors):
    """A depthwise k×k convolution with ``terms`` filters per channel, and a pointwise one."""

    depthwise: Tensor  # (in·terms, 1, *k), to run with ``in`` groups
    pointwise: Tensor  # (out, in/groups·terms), to run with ``groups`` groups
    terms: int

    last = "pointwise"

    @property
    def rank(self) -> int:
        return self.terms

    @property
    def in_channels(self) -> int:
        """Input channels, over all groups."""
        return self.depthwise.shape[0] // self.terms

    def reconstruct(self) -> Tensor:
        groups, terms, out = self.groups, self.terms, self.pointwise.shape[0]
        channels = self.in_channels // groups
        filters = self.depthwise.reshape(groups, channels, terms, -1)
        mixing = self.pointwise.reshape(groups, out // groups, channels, terms).transpose(1, 2)
        kernel = (mixing @ filters).transpose(1, 2)
        return kernel.reshape(out, channels, *self.depthwise.shape[2:])

    def stages(self, transposed: bool = False) -> tuple[Stage, ...]:
        """Depthwise (transposed when the original is), then pointwise (ordinary)."""
        axes = tuple(range(self.depthwise.dim() - 2))
        depthwise = from_forward_layout(self.depthwise, self.in_channels, transposed)
        return (
            Stage(depthwise, self.in_channels, transposed, axes),
            Stage(pointwise_weight(self.pointwise, len(axes)), self.groups, False, ()),
        )

    def inner(self, patches: Tensor, spatial: Sequence[int]) -> Tensor:
        """Rows are ``(terms, in)``."""
        taps, columns = math.prod(spatial), patches.shape[-1]
        filters = self.depthwise.reshape(-1, self.terms, taps).to(patches)  # (in, terms, taps)
        values = (filters @ patches.reshape(-1, taps, columns)).reshape(self.groups, -1, self.terms, columns)
        return values.transpose(1, 2).reshape(self.groups, -1, columns)

    def last_matrix(self) -> Tensor:
        out = self.pointwise.shape[0] // self.groups
        by_channel = self.pointwise.reshape(self.groups, out, -1, self.terms)
        return by_channel.transpose(2, 3).reshape(self.groups, out, -1)

    def with_last(self, matrix: Tensor) -> Self:
        by_term = matrix.reshape(*matrix.shape[:2], self.terms, -1)
        return self._with(by_term.transpose(2, 3).reshape(self.pointwise.shape).to(self.pointwise))


def depthwise_spectrum(
    kernel: Tensor, groups: int = 1, input_weight: Weight | None = None, output_weight: Weight | None = None
) -> Spectrum[Depthwise]:
    """Factorises a kernel once for every number of terms up to ``min(out/groups, k)``.

    As `split_spectrum`; of ``input_weight``, over ``in·k`` or ``in``, the diagonal blocks count.
    """
    prepared = prepare_kernel(kernel, groups)
    out, channels, *spatial = prepared.shape
    size = math.prod(spatial)
    sliced = prepared.reshape(groups, out // groups, channels, size).transpose(1, 2)
    matrix = sliced.reshape(groups * channels, out // groups, size)
    left = side_weight(output_weight, groups, out // groups, 1, prepared, "output_weight")
    if left is not None:
        left = RepeatedWeight(left.matrix, 1, channels)
    right = side_weight(input_weight, groups, channels, size, prepared, "input_weight")
    if right is not None:  # its diagonal blocks (in, k, k), or (in, 1, 1) of one over channels
        block = right.matrix.shape[-1] // channels
        grouped = right.matrix.reshape(-1, channels, block, channels, block)
        blocks = torch.diagonal(grouped, dim1=1, dim2=3).movedim(-1, 1).reshape(-1, block, block)
        right = SideWeight(blocks, size // block)

    def build(cut: Truncation) -> Depthwise:
        terms = cut.left.shape[2]
        mixing = cut.left.reshape(groups, channels, out // groups, terms).transpose(1, 2)
        return Depthwise(
            depthwise=cut.right.reshape(groups * channels * terms, 1, *spatial).contiguous(),
            pointwise=mixing.reshape(out, channels * terms).contiguous(),
            terms=terms,
            groups=groups,
            relative_error=cut.relative_error,
            weighted_error=cut.weighted_error,
        )

    return Spectrum(matrix, left, right, build)
