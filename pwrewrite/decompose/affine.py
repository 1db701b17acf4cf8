"""`Affine`: convolutions, norms, scales and identities as one kernel and one bias; their chains and their sums.

With ``y_o(p) = Σ_ik K_oik x_i(s p + d k - l) + b_o``, zeros around ``x``, an identity is ``K = 1`` at one tap, a norm
and a scale a diagonal one, an average pool a constant one. A chain with a 1×1 is a product over channels, a sum the sum
of kernels that start at the same ``l``, padded with zeros (RepVGG, Ding et al. 2021; Diverse Branch Block, same year)::

    1×1 behind k×k      K_oik = Σ_c B_oc A_cik    b_o = b_o + Σ_c B_oc a_c       strides multiply
    k×k behind 1×1      K_oik = Σ_c B_ock A_ci    b_o = b_o + Σ_ck B_ock a_c     if it pads nothing, or a is none
    sum                 K = K' + K''              b = b' + b''                   if strides and extents agree

Kernels are ``(out, in/groups, *k)``. Those of two group counts meet in their greatest common divisor, whose blocks hold
the blocks of both. On meta tensors all of this gives shapes only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.convolution import ConvSpec


class NotExact(ValueError):
    """Two maps that are not one convolution, with the reason; ``padding`` says that this is what is padded with."""

    def __init__(self, reason: str, *, padding: bool = False) -> None:
        super().__init__(reason)
        self.padding = padding


@dataclass(frozen=True)
class Affine:
    """A convolution, or a linear map, with its numbers."""

    spec: ConvSpec
    weight: Tensor  # (out, in/groups, *k)
    bias: Tensor | None  # (out,), where the spec has one

    @classmethod
    def on_meta(cls, spec: ConvSpec) -> Affine:
        """A map of which only the shapes are known."""
        bias = torch.empty(spec.out_channels, device="meta") if spec.bias else None
        return cls(spec, torch.empty(spec.weight_shape, device="meta"), bias)

    @classmethod
    def diagonal(cls, scale: Tensor, shift: Tensor | None, dims: int) -> Affine:
        """One scale, ``(channels,)``, and one shift per channel."""
        n, ones = len(scale), (1,) * dims
        spec = ConvSpec(n, n, ones, ones, ((0, 0),) * dims, ones, n, shift is not None, output_padding=(0,) * dims)
        return cls(spec, scale.reshape(n, 1, *ones), shift)

    @classmethod
    def pool(cls, like: Tensor, channels: int, kernel: ConvSpec) -> Affine:
        """An average pool that counts what it pads, with the kernel, stride and padding of some spec."""
        spec = replace(kernel, in_channels=channels, out_channels=channels, groups=channels, bias=False)
        weight = like.new_ones(spec.weight_shape)
        return cls(spec, weight / weight[0].numel(), None)

    def then(self, other: Affine) -> Affine:
        """The map that another one behind this one makes; `NotExact` where that is no convolution."""
        a, b = self.spec, other.spec
        if (a.dims, a.out_channels) != (b.dims, b.in_channels):
            raise NotExact("the second does not take what the first makes")
        if b.is_pointwise and not any(map(any, b.padding)):
            spec = replace(a, stride=tuple(s * t for s, t in zip(a.stride, b.stride)))
        elif not a.is_pointwise or any(map(any, a.padding)) or any(s != 1 for s in a.stride):
            raise NotExact("of two kernels in a row neither is 1×1 without a stride or padding of its own")
        elif self.bias is not None and b.padding_mode == "zeros" and any(map(any, b.padding)):
            raise NotExact("what comes before a padded kernel has a shift, which the padding has not", padding=True)
        else:
            spec = b
        groups = gcd(a.groups, b.groups)
        first, second = (_regrouped(m.weight, m.spec.groups, groups) for m in (self, other))
        per_group = second.reshape(groups, b.out_channels // groups, a.out_channels // groups, -1)
        inner = first.reshape(groups, a.out_channels // groups, a.in_channels // groups, -1)
        weight = torch.einsum("gock,gcij->goikj", per_group, inner)  # k or j has one entry
        weight = weight.reshape(b.out_channels, a.in_channels // groups, *spec.kernel_size)
        bias = other.bias
        if self.bias is not None:
            carried = torch.einsum("gock,gc->go", per_group, self.bias.reshape(groups, -1)).flatten()
            bias = carried if bias is None else bias + carried
        return _affine(replace(spec, in_channels=a.in_channels, out_channels=b.out_channels), groups, weight, bias)

    def plus(self, other: Affine) -> Affine:
        """The sum of two maps of one input; `NotExact` where that is no convolution."""
        a, b = self.spec, other.spec
        if (a.dims, a.in_channels, a.out_channels, a.stride) != (b.dims, b.in_channels, b.out_channels, b.stride):
            raise NotExact("their channels or strides differ")
        axes = [_joined(a, b, axis) for axis in range(a.dims)]
        groups = gcd(a.groups, b.groups)
        spec = replace(
            a,
            kernel_size=tuple(axis[0] for axis in axes),
            padding=tuple(axis[1] for axis in axes),
            dilation=tuple(axis[2] for axis in axes),
        )
        weight = sum(_placed(m, spec, groups) for m in (self, other))
        biases = [m.bias for m in (self, other) if m.bias is not None]
        assert isinstance(weight, Tensor)
        return _affine(spec, groups, weight, sum(biases[1:], biases[0]) if biases else None)

    def scaled(self, factor: float | Tensor) -> Affine:
        """The map times a number, ``()``."""
        return Affine(self.spec, self.weight * factor, None if self.bias is None else self.bias * factor)

    def shifted(self, shift: float | Tensor) -> Affine:
        """The map plus a number, or one for each channel."""
        bias = self.weight.new_zeros(self.spec.out_channels) if self.bias is None else self.bias
        return _affine(self.spec, self.spec.groups, self.weight, bias + shift)

    def symmetric(self) -> Affine:
        """The same with as much padding on the left as on the right, as modules have it; `NotExact` where none is."""
        spec = self.spec
        for axis, ((left, right), step) in enumerate(zip(spec.padding, spec.dilation)):
            more, rest = divmod(abs(right - left), step)
            if rest:
                raise NotExact("no module pads one side more than the other")
            if more:
                kernels, sides = list(spec.kernel_size), list(spec.padding)
                kernels[axis] += more
                sides[axis] = (max(left, right),) * 2
                spec = replace(spec, kernel_size=tuple(kernels), padding=tuple(sides))
        return replace(self, spec=spec, weight=_placed(self, spec, spec.groups))


def _affine(spec: ConvSpec, groups: int, weight: Tensor, bias: Tensor | None) -> Affine:
    return Affine(replace(spec, groups=groups, bias=bias is not None), weight, bias)


def _joined(a: ConvSpec, b: ConvSpec, axis: int) -> tuple[int, tuple[int, int], int]:
    """Kernel size, padding and dilation along an axis of a kernel that holds the taps of two."""
    sizes = [(spec.kernel_size[axis], spec.padding[axis], spec.dilation[axis]) for spec in (a, b)]
    steps = {d for k, _, d in sizes if k > 1} or {1}
    step = max(steps)
    excess = {left + right - d * (k - 1) for k, (left, right), d in sizes}
    begin = max(left for _, (left, _), _ in sizes)
    if len(steps) > 1 or any((begin - left) % step for _, (left, _), _ in sizes):
        raise NotExact("their taps lie on different grids")
    if len(excess) > 1:
        raise NotExact("their paddings give outputs of different sizes")
    end = max(d * (k - 1) - left for k, (left, _), d in sizes)  # position of the last tap
    return (begin + end) // step + 1, (begin, end + excess.pop()), step


def _placed(m: Affine, spec: ConvSpec, groups: int) -> Tensor:
    """A kernel with zeros around it, as it lies in that of a spec."""
    pads: list[int] = []
    for axis in reversed(range(spec.dims)):
        before = (spec.padding[axis][0] - m.spec.padding[axis][0]) // spec.dilation[axis]
        pads += [before, spec.kernel_size[axis] - m.spec.kernel_size[axis] - before]
    return F.pad(_regrouped(m.weight, m.spec.groups, groups), pads)


def _regrouped(weight: Tensor, groups: int, wanted: int) -> Tensor:
    """The weight of the same map with fewer groups, zeros between its blocks."""
    parts, (out, inputs, *k) = groups // wanted, weight.shape
    if parts == 1:
        return weight
    blocks = weight.reshape(wanted, parts, out // groups, inputs, *k)
    dense = weight.new_zeros(wanted, parts, out // groups, parts, inputs, *k)
    each = torch.arange(parts, device=weight.device)
    dense[:, each, :, each] = blocks.transpose(0, 1)
    return dense.reshape(out, parts * inputs, *k)
