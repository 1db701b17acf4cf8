"""What the forms cost, and the largest ranks at which they cost no more than the convolution they replace.

Counts exclude biases, which are the same on both sides. With ``P_in`` and ``P_out`` positions (the product of the
spatial sizes) at the input and the output, and the core at ``P = P_out`` (``P_in`` for a transposed convolution,
whose multiplications are one per input position and weight):

    bottleneck   P_in · rank_in · in  +  P · g · rank_in · rank_out · k  +  P_out · out · rank_out

and so on: a 1×1 before the core runs at the input's resolution, one behind it at the output's. So the break-even
ranks of parameters and of MACs differ as soon as a stride does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.errors import UsageError


@dataclass(frozen=True)
class FactorCost:
    """Parameters and multiply-accumulates (per sample), biases apart."""

    params: int
    macs: int


@dataclass(frozen=True)
class ConvShape:
    """The shape facts that a cost needs.

    Attributes:
        in_channels: Input channels, over all groups.
        out_channels: Output channels, over all groups.
        kernel: Spatial sizes of the kernel.
        input_size: Spatial sizes of the input, in positions.
        output_size: Spatial sizes of the output.
        groups: Number of groups.
        transposed: Whether it is a transposed convolution.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def in_group(self) -> int:
        """Input channels per group."""
        return self.in_channels // self.groups

    @property
    def out_group(self) -> int:
        """Output channels per group."""
        return self.out_channels // self.groups

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return math.prod(self.kernel)

    @property
    def before(self) -> int:
        """Input positions."""
        return math.prod(self.input_size)

    @property
    def behind(self) -> int:
        """Output positions."""
        return math.prod(self.output_size)

    @property
    def at_core(self) -> int:
        """Positions at which a convolution with the original's stride multiplies."""
        return self.before if self.transposed else self.behind

    def _cost(self, *parts: tuple[int, int]) -> FactorCost:
        return FactorCost(sum(params for params, _ in parts), sum(params * positions for params, positions in parts))

    def original(self) -> FactorCost:
        """The convolution itself."""
        return self._cost((self.out_channels * self.in_group * self.taps, self.at_core))

    def bottleneck(self, rank_in: int, rank_out: int) -> FactorCost:
        """1×1 → k×k → 1×1."""
        return self._cost(
            (rank_in * self.in_channels, self.before),
            (self.groups * rank_in * rank_out * self.taps, self.at_core),
            (self.out_channels * rank_out, self.behind),
        )

    def reduction(self, rank: int) -> FactorCost:
        """1×1 → k×k."""
        return self._cost((rank * self.in_channels, self.before), (self.out_channels * rank * self.taps, self.at_core))

    def expansion(self, rank: int) -> FactorCost:
        """k×k → 1×1."""
        return self._cost((rank * self.in_channels * self.taps, self.at_core), (self.out_channels * rank, self.behind))

    def spatial(self, rank: int, first_axes: Sequence[int] = (0,)) -> FactorCost:
        """The pair of `pwrewrite.decompose.spatial`; in between, the first's axes have the output's size."""
        middle = [
            after if axis in first_axes else size
            for axis, (size, after) in enumerate(zip(self.input_size, self.output_size))
        ]
        first = math.prod(size for axis, size in enumerate(self.kernel) if axis in first_axes)
        second = self.taps // first
        return self._cost(
            (rank * self.in_channels * first, self.before if self.transposed else math.prod(middle)),
            (self.out_channels * rank * second, math.prod(middle) if self.transposed else self.behind),
        )

    def depthwise(self, terms: int) -> FactorCost:
        """Depthwise k×k → pointwise."""
        return self._cost(
            (self.in_channels * terms * self.taps, self.at_core),
            (self.out_channels * self.in_group * terms, self.behind),
        )

    def low_rank(self, rank: int) -> FactorCost:
        """The pair in place of a pointwise convolution or a linear map."""
        return self._cost((rank * self.in_channels, self.at_core), (self.out_channels * rank, self.at_core))


@dataclass(frozen=True)
class BreakEven:
    """The largest ranks (per group) of each form that cost at most the original; 0 where no rank does.

    Attributes:
        bottleneck: ``(rank_in, rank_out)`` along the line of equal ratios.
        reduction: One rank.
        expansion: One rank.
        spatial: One middle width, with the first spatial axis first; 0 for 1-D and for linear maps.
        depthwise: Terms.
        low_rank: One rank; 0 unless the kernel is pointwise.
    """

    bottleneck: tuple[int, int]
    reduction: int
    expansion: int
    spatial: int
    depthwise: int
    low_rank: int


@dataclass(frozen=True)
class BreakEvenRanks:
    """Break-even by multiply-accumulates and by parameters."""

    macs: BreakEven
    params: BreakEven


def break_even_ranks(
    in_channels: int,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int] | int = 1,
    groups: int = 1,
    transposed: bool = False,
    input_size: Sequence[int] | None = None,
    output_size: Sequence[int] | None = None,
) -> BreakEvenRanks:
    """The largest ranks of each form that cost no more than the convolution.

    Args:
        in_channels: Input channels, over all groups.
        out_channels: Output channels, over all groups.
        kernel: Spatial sizes; empty for a linear map.
        stride: Used when the sizes are not given: then one side has ``stride`` times the positions of the other.
        groups: Number of groups.
        transposed: Whether it is a transposed convolution.
        input_size: Spatial sizes of the input.
        output_size: Spatial sizes of the output.

    Returns:
        Ranks by MACs and by parameters. Only a rank that the form can have is returned, so a form that is always
        cheaper gives its full rank.

    Raises:
        UsageError: Channels that do not divide into the groups, or sizes that do not match the kernel's axes.
    """
    dims = len(kernel)
    strides = (stride,) * dims if isinstance(stride, int) else tuple(stride)
    ones = (1,) * dims
    if input_size is None:
        input_size = ones if transposed else strides
    if output_size is None:
        output_size = strides if transposed else ones
    if groups < 1 or in_channels % groups or out_channels % groups or min(in_channels, out_channels) < 1:
        raise UsageError(f"{in_channels} and {out_channels} channels do not divide into {groups} groups")
    if len(input_size) != dims or len(output_size) != dims:
        raise UsageError(
            f"sizes {tuple(input_size)} and {tuple(output_size)} do not match a kernel of {dims} spatial axes"
        )
    shape = ConvShape(
        in_channels, out_channels, tuple(kernel), tuple(input_size), tuple(output_size), groups, transposed
    )
    return BreakEvenRanks(_break_even(shape, lambda cost: cost.macs), _break_even(shape, lambda cost: cost.params))


def ratio_ranks(step: int, in_group: int, out_group: int) -> tuple[int, int]:
    """``(rank_in, rank_out)`` on the line of equal ratios, at ``step`` of ``max(in_group, out_group)``; at least 1."""
    longest = max(in_group, out_group)
    return max(1, step * in_group // longest), max(1, step * out_group // longest)


def _break_even(shape: ConvShape, measure: Callable[[FactorCost], int]) -> BreakEven:
    budget = measure(shape.original())
    inner, out, taps = shape.in_group, shape.out_group, shape.taps

    def largest(cost: Callable[[int], FactorCost], limit: int) -> int:
        return _last(lambda rank: measure(cost(rank)) <= budget, limit)

    step = largest(lambda step: shape.bottleneck(*ratio_ranks(step, inner, out)), max(inner, out))
    spatial = 0
    if len(shape.kernel) > 1:
        spatial = largest(shape.spatial, min(inner * shape.kernel[0], out * taps // shape.kernel[0]))
    return BreakEven(
        bottleneck=ratio_ranks(step, inner, out) if step else (0, 0),
        reduction=largest(shape.reduction, min(inner, out * taps)),
        expansion=largest(shape.expansion, min(out, inner * taps)),
        spatial=spatial,
        depthwise=largest(shape.depthwise, min(out, taps)),
        low_rank=largest(shape.low_rank, min(inner, out)) if taps == 1 else 0,
    )


def _last(holds: Callable[[int], bool], limit: int) -> int:
    """The largest step in 1..limit for which a condition that only turns false holds; 0 for none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
