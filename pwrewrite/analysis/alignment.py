"""How positions of a tensor line up with positions of the model's input: the algebra behind receptive fields.

For one spatial dim of the input (a *frame dim*) and one tensor, the question is which input positions each tensor
position sees. Two functions answer it, the first and the last position, and both are *quasi-linear*: after a period P
of tensor positions they repeat, shifted by a whole number of input positions::

    f(o) = rise · (o // P) + offset[o mod P]          (`Steps`)

A stack of ordinary convolutions has P = 1, and then ``rise`` is its jump (effective stride) and ``hi - lo + 1`` its
receptive field, by the recurrences of Araujo, Norris & Sim 2019 (*Computing receptive fields of convolutional neural
networks*, Distill, equations 1 to 3). Upsampling by s, a transposed convolution of stride s, a pixel shuffle or an
uneven adaptive pool make the period longer, where a rational jump alone would overstate the extent by up to one step.

Operations move positions by `Taps`: the finite set of input positions that one output position reads, again up to a
period. Pulling `Steps` back through `Taps` is exact, as is the hull of two branches (the smaller first, the larger last
position). All of it is integer arithmetic on tuples of a few numbers.

Positions outside the input (in the padding) count as seen, as is usual: the field of a deep network exceeds its
input. Limits: the hull of a dilated field counts the holes in it; branches whose jumps differ are lined up position
by position, over the positions that the tensor has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor, gcd, lcm

EMPTY_LOW, EMPTY_HIGH = 1 << 62, -(1 << 62)
"""First and last position of an output position that sees nothing (a gap of a transposed convolution)."""

LONGEST = 4096
"""Longest period that is kept exactly."""


@dataclass(frozen=True, slots=True)
class Steps:
    """A quasi-linear integer function, ``f(o) = rise · (o // P) + offsets[o mod P]`` with ``P = len(offsets)``."""

    rise: int
    offsets: tuple[int, ...]

    def __call__(self, position: int) -> int:
        """``f(position)``."""
        turns, phase = divmod(position, len(self.offsets))
        return self.rise * turns + self.offsets[phase]

    def shifted(self, by: int) -> Steps:
        """``f(o) + by``."""
        return Steps(self.rise, tuple([value + by for value in self.offsets]))

    def pull(self, taps: Taps, pick: Callable[..., int]) -> Steps | None:
        """``o ↦ pick of f over the taps of o``, with ``pick`` one of ``min`` and ``max``; None past `LONGEST`."""
        own, other = len(self.offsets), len(taps.positions)
        if own == other == 1 and self.rise >= 0:
            ends = taps.positions[0]
            reach = (ends[0] if pick is min else ends[-1]) if ends else None
            value = _nothing(pick) if reach is None else self.rise * reach + self.offsets[0]
            return Steps(self.rise * taps.rise, (value,))
        repeats = own // gcd(taps.rise, own)
        if other * repeats > LONGEST:
            return None
        offsets = []
        for turn in range(repeats):
            start = taps.rise * turn
            for positions in taps.positions:
                offsets.append(pick([self(start + p) for p in positions], default=_nothing(pick)))
        return Steps(self.rise * (taps.rise * repeats // own), tuple(offsets))

    def join(self, other: Steps, pick: Callable[..., int], size: int) -> Steps:
        """``o ↦ pick(f(o), g(o))``, exact on positions ``0 … size - 1`` and, where both rise alike, everywhere."""
        if self == other:
            return self
        period = lcm(len(self.offsets), len(other.offsets))
        rise = self.rise * (period // len(self.offsets))
        if rise != other.rise * (period // len(other.offsets)):
            period = max(size, 1)
            rise = self.rise * period // len(self.offsets)
        return Steps(rise, tuple([pick(self(o), other(o)) for o in range(period)]))


def _nothing(pick: Callable[..., int]) -> int:
    return EMPTY_LOW if pick is min else EMPTY_HIGH


@dataclass(frozen=True, slots=True)
class Taps:
    """Which positions of an operation's input each position of its output reads.

    Output position ``q · P + r``, with ``P = len(positions)``, reads ``q · rise + positions[r]`` (ascending; may be
    empty).
    """

    rise: int
    positions: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=1024)
def window_taps(kernel: int, stride: int, padding: int, dilation: int, transposed: bool = False) -> Taps:
    """Taps of a convolution or a local pooling along one dim; ``padding`` is that before the first position."""
    if not transposed:
        return Taps(stride, (tuple([-padding + dilation * t for t in range(kernel)]),))
    phases = []
    for phase in range(stride):
        reached = [phase + padding - dilation * t for t in range(kernel)]
        phases.append(tuple(sorted({r // stride for r in reached if r % stride == 0})))
    return Taps(1, tuple(phases))


@lru_cache(maxsize=1024)
def adaptive_taps(size: int, out: int) -> Taps:
    """Taps of adaptive pooling from ``size`` to ``out`` positions: ``floor(i n/m) … ceil((i + 1) n/m) - 1``."""
    step = gcd(size, out)
    rise, period = size // step, out // step
    return Taps(rise, tuple(tuple(range(r * rise // period, -(-(r + 1) * rise // period))) for r in range(period)))


@lru_cache(maxsize=1024)
def resize_taps(ratio: Fraction, mode: str, align_corners: bool, antialias: bool = False) -> Taps:
    """Taps of ``interpolate`` away from the border.

    Args:
        ratio: Input positions per output position, as the kernel computes source positions.
        mode: ``nearest``, ``nearest-exact``, ``linear`` and its kin, or ``bicubic``.
        align_corners: Whether source positions are ``o · ratio`` rather than ``(o + ½) · ratio - ½``.
        antialias: Whether the filter widens when it shrinks.
    """
    phases: list[tuple[int, ...]] = []
    for o in range(ratio.denominator):
        source = o * ratio if align_corners else (o + Fraction(1, 2)) * ratio - Fraction(1, 2)
        if mode == "nearest":
            phases.append((floor(o * ratio),))
            continue
        if mode == "nearest-exact":
            phases.append((floor(source + Fraction(1, 2)),))
            continue
        support = Fraction(2 if mode == "bicubic" else 1) * (max(ratio, Fraction(1)) if antialias else 1)
        # positions strictly within the support have a weight that is not zero
        low, high = floor(source - support) + 1, ceil(source + support) - 1
        phases.append(tuple(range(low, high + 1)))
    return Taps(ratio.numerator, tuple(phases))


def slice_taps(start: int, step: int = 1) -> Taps:
    """Taps of ``x[start::step]``; a negative ``start`` is padding."""
    return Taps(step, ((start,),))


@lru_cache(maxsize=64)
def shuffle_taps(factor: int, inverse: bool = False) -> Taps:
    """Taps of a pixel shuffle (``factor`` positions out of one) or its inverse."""
    return Taps(factor, (tuple(range(factor)),)) if inverse else Taps(1, ((0,),) * factor)


@dataclass(frozen=True, slots=True)
class Whole:
    """Every position sees the whole frame dim, or something that does."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Positions moved in a way that is not followed."""


@dataclass(frozen=True, slots=True)
class Span:
    """Positions along one tensor axis line up with the frame dim.

    Attributes:
        axis: Which, counted from the end (-1 is the last); None where no axis does and all positions see the same part.
        low: First input position seen.
        high: Last input position seen.
    """

    axis: int | None
    low: Steps
    high: Steps

    @property
    def extent(self) -> int:
        """Most input positions that one position sees, from the first to the last."""
        return max(0, *[high - low + 1 for low, high in zip(self.low.offsets, self.high.offsets, strict=True)])

    def pull(self, taps: Taps) -> Span | Unknown:
        """The span of an operation's output."""
        low, high = self.low.pull(taps, min), self.high.pull(taps, max)
        if low is None or high is None:
            return Unknown()
        return Span(self.axis, low, high)

    def at(self, position: int) -> Span:
        """What one position sees, as a span without an axis."""
        return Span(None, Steps(0, (self.low(position),)), Steps(0, (self.high(position),)))

    def moved(self, axis: int | None) -> Span:
        """The same along another axis."""
        return self if axis == self.axis else Span(axis, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Scan:
    """Positions along one tensor axis run through the frame dim together with other dims, as tokens do.

    Token p stands at position ``(p // inner) mod size`` along the frame dim, until the tokens are cut or joined.

    Attributes:
        axis: Which, counted from the end.
        low: First input position seen from a position along the frame dim.
        high: Last input position seen.
        size: Number of positions along the frame dim.
        inner: Tokens from one position to the next; 0 where the order is lost.
    """

    axis: int
    low: Steps
    high: Steps
    size: int
    inner: int

    @property
    def extent(self) -> int:
        """Most input positions that one token sees, from the first to the last."""
        return Span(None, self.low, self.high).extent

    def moved(self, axis: int) -> Scan:
        """The same along another axis."""
        return Scan(axis, self.low, self.high, self.size, self.inner)

    def loose(self) -> Scan:
        """The same with the order of the tokens lost."""
        return Scan(self.axis, self.low, self.high, self.size, 0)


State = Span | Scan | Whole | Unknown
Field = tuple[State, ...]
"""What positions of a tensor see: one state per frame dim."""

WHOLE, UNKNOWN = Whole(), Unknown()


def join_states(a: State, b: State, size: int) -> State:
    """The hull of two branches; ``size`` is that of the common axis."""
    if a is b:
        return a
    if isinstance(a, Whole) or isinstance(b, Whole):
        return WHOLE
    if isinstance(a, Span) and isinstance(b, Span) and (a.axis is None or b.axis is None or a.axis == b.axis):
        if a.axis is None:
            a, b = b, a
        if size > LONGEST and a.low.rise != b.low.rise:
            return UNKNOWN
        return Span(a.axis, a.low.join(b.low, min, size), a.high.join(b.high, max, size))
    if isinstance(a, Scan) and isinstance(b, Scan) and a.axis == b.axis:
        if (a.size, a.inner) == (b.size, b.inner):
            return Scan(a.axis, a.low.join(b.low, min, a.size), a.high.join(b.high, max, a.size), a.size, a.inner)
        return (a if a.extent >= b.extent else b).loose()
    return UNKNOWN
