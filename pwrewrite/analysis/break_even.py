"""Ranks at which a bottleneck costs as much as the convolution it replaces.

A bottleneck is ``reduce`` (1×1, in → R) ∘ ``core`` (k×k with the stride, R → S) ∘ ``expand`` (1×1, S → out), all with
the groups g of the original. With K taps, P input and Q output positions (of all calls, batch included; C is Q, or P
where transposed)::

    original    C K in out / g
    bottleneck  P in R / g  +  C K R S / g  +  Q S out / g        for MACs
                  in R / g  +    K R S / g  +    S out / g        for parameters

This is the Tucker-2 form of Kim et al. 2016 (*Compression of deep convolutional neural networks for fast and low
power mobile applications*, section 3.1), extended to groups, strides and transposed convolutions. A bias stays where
it was and does not enter.

Both ranks follow one ratio r in (0, 1]: each group keeps ``max(1, floor(r in/g))`` and ``max(1, floor(r out/g))``
channels. The cost is a step function that never falls as r grows; break-even is the last step that does not raise it,
found in integers from a floating-point guess that is corrected.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod, sqrt

from ..core.convolution import ConvSpec


@dataclass(frozen=True, slots=True)
class BottleneckCost:
    """Cost of the bottlenecks of one convolution, as a function of the channels that each group keeps.

    Attributes:
        fan_in: Input channels per group.
        fan_out: Output channels per group.
        reduce: Cost per rank_in, all groups: g P in/g.
        core: Cost per rank_in and rank_out, all groups: g C K.
        expand: Cost per rank_out, all groups: g Q out/g.
    """

    fan_in: int
    fan_out: int
    groups: int
    reduce: int
    core: int
    expand: int

    @classmethod
    def of_params(cls, spec: ConvSpec) -> BottleneckCost:
        """In weights."""
        return cls._of(spec, 1, 1)

    @classmethod
    def of_macs(cls, spec: ConvSpec, shapes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> BottleneckCost:
        """In MACs; ``shapes`` are input and output shape of each of its calls, batched or not."""
        before = after = 0
        for input_shape, output_shape in shapes:
            before += _positions(input_shape, spec.dims)
            after += _positions(output_shape, spec.dims)
        return cls._of(spec, before, after)

    @classmethod
    def _of(cls, spec: ConvSpec, before: int, after: int) -> BottleneckCost:
        taps = prod(spec.kernel_size)
        core = (before if spec.transposed else after) * taps * spec.groups
        fans = spec.in_channels // spec.groups, spec.out_channels // spec.groups
        return cls(*fans, spec.groups, before * spec.in_channels, core, after * spec.out_channels)

    @property
    def original(self) -> int:
        """Cost of the convolution itself."""
        return self.core * self.fan_in * self.fan_out

    def at(self, rank_in: int, rank_out: int) -> int:
        """Cost of a bottleneck whose groups keep ``rank_in`` and ``rank_out`` channels each."""
        return self.reduce * rank_in + self.core * rank_in * rank_out + self.expand * rank_out

    @property
    def half(self) -> int:
        """Cost at half width on both sides."""
        return self.at(max(1, self.fan_in // 2), max(1, self.fan_out // 2))

    def break_even(self) -> tuple[int, int]:
        """Largest total ranks on the equal-ratio line that do not raise the cost; ``(0, 0)`` where none."""
        limit = self.original
        if self.at(1, 1) > limit:
            return 0, 0
        if not limit:  # called with nothing, as a detector's heads are where nothing was found
            return self.fan_in * self.groups, self.fan_out * self.groups
        # core' r² + linear' r = original, with r the common ratio
        linear = self.reduce * self.fan_in + self.expand * self.fan_out
        guess = (sqrt(linear * linear + 4.0 * limit * limit) - linear) / (2.0 * limit)
        rank_in = min(self.fan_in, max(1, int(guess * self.fan_in)))
        while rank_in > 1 and self.at(rank_in, self._first(rank_in)) > limit:
            rank_in -= 1
        while rank_in < self.fan_in and self.at(rank_in + 1, self._first(rank_in + 1)) <= limit:
            rank_in += 1
        affordable = (limit - self.reduce * rank_in) // (self.core * rank_in + self.expand)
        rank_out = max(1, min(affordable, self._last(rank_in), self.fan_out))
        return rank_in * self.groups, rank_out * self.groups

    def _first(self, rank_in: int) -> int:
        """Smallest rank_out at a ratio that gives ``rank_in``."""
        return 1 if rank_in == 1 else max(1, rank_in * self.fan_out // self.fan_in)

    def _last(self, rank_in: int) -> int:
        """Largest rank_out at a ratio below that of ``rank_in + 1``: ceil((rank_in + 1) out / in) - 1."""
        return -(-(rank_in + 1) * self.fan_out // self.fan_in) - 1


def _positions(shape: tuple[int, ...], dims: int) -> int:
    batch = shape[0] if len(shape) == dims + 2 else 1
    return batch * prod(shape[len(shape) - dims :])
