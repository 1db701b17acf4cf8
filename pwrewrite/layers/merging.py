"""Two linear layers as one: shape facts only."""

from __future__ import annotations

from dataclasses import replace

from ..core.convolution import ConvSpec


def merged_spec(first: ConvSpec, second: ConvSpec) -> ConvSpec | str:
    """The shape facts of two layers as one, or why there is none."""
    if first.dims != second.dims or first.transposed or second.transposed:
        return "they are of different kinds"
    if first.groups != 1 or second.groups != 1:
        return "one of them is grouped"
    if not (first.is_pointwise or second.is_pointwise):
        return "neither is 1×1"
    bias = first.bias or second.bias
    if second.is_pointwise and not any(map(any, second.padding)):
        stride = tuple(a * b for a, b in zip(first.stride, second.stride))
        return replace(first, out_channels=second.out_channels, stride=stride, bias=bias)
    if not first.is_pointwise or any(map(any, first.padding)) or any(s != 1 for s in first.stride):
        return "the 1×1 has a stride or a padding of its own"
    if first.bias and second.padding_mode == "zeros" and any(map(any, second.padding)):
        return "the bias of the 1×1 is missing in what the second one pads with"
    return replace(second, in_channels=first.in_channels, bias=bias)
