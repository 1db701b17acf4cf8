"""The shape facts of layers and of the chains that replace them: as JSON data, and what they cost.

Stride, padding, dilation and output padding sit on the stages of a chain that own the spatial axes, everything else is
1×1; only the last stage has a bias, so that padding commutes with the channel mixing before it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod

from ..core.convolution import ConvSpec
from ..core.errors import PlanError
from ..core.records import Json, as_data

Chain = Sequence[tuple[str, ConvSpec]]
"""The stages of a form, first to last: name and shape facts."""


def linear_spec(in_features: int, out_features: int, bias: bool) -> ConvSpec:
    """A linear map as a convolution without spatial axes."""
    return ConvSpec(int(in_features), int(out_features), (), (), (), (), bias=bias)


def pointwise_spec(dims: int, in_channels: int, out_channels: int, bias: bool = False) -> ConvSpec:
    """A 1×1 convolution over some spatial dims; a linear map over none."""
    ones = (1,) * dims
    return ConvSpec(in_channels, out_channels, ones, ones, ((0, 0),) * dims, ones, 1, bias, output_padding=(0,) * dims)


def spec_to_dict(spec: ConvSpec) -> dict[str, Json]:
    """A spec as JSON data."""
    data: dict[str, Json] = as_data(spec)
    return data


def spec_from_dict(data: Json, where: str) -> ConvSpec:
    """Reads what `spec_to_dict` wrote; raises `PlanError` for anything else."""
    try:
        spec = ConvSpec(
            int(data["in_channels"]),
            int(data["out_channels"]),
            tuple(map(int, data["kernel_size"])),
            tuple(map(int, data["stride"])),
            tuple((int(left), int(right)) for left, right in data["padding"]),
            tuple(map(int, data["dilation"])),
            int(data["groups"]),
            bool(data["bias"]),
            str(data["padding_mode"]),
            bool(data["transposed"]),
            tuple(map(int, data["output_padding"])),
        )
        counts = (spec.in_channels, spec.out_channels, spec.groups, *spec.kernel_size, *spec.stride, *spec.dilation)
        per_dim = (spec.stride, spec.padding, spec.dilation, spec.output_padding)
        if any(n < 1 for n in counts):
            raise ValueError("channels, groups, kernel size, stride and dilation are at least 1")
        if spec.dims > 3 or any(len(values) != spec.dims for values in per_dim):
            raise ValueError("kernel size, stride, padding, dilation and output padding have one entry per spatial dim")
        if spec.in_channels % spec.groups or spec.out_channels % spec.groups:
            raise ValueError("groups divide the channels")
        written = spec_to_dict(spec)
        if odd := [key for key in {**written, **data} if json.dumps(data.get(key)) != json.dumps(written.get(key))]:
            raise ValueError(f"{odd[0]} is {data.get(odd[0])!r}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        wanted = "what `pwrewrite plan` writes under 'layer'"
        raise PlanError("not the shape facts of a layer", where=where, expected=wanted, got=repr(error)) from None
    return spec


def stage_spec(
    spec: ConvSpec, inputs: int, outputs: int, axes: Sequence[int], *, groups: int | None = None, bias: bool = False
) -> ConvSpec:
    """One stage of a chain: the layer's settings on the axes it owns, 1×1 elsewhere; transposed only with an axis."""
    dims = range(spec.dims)
    transposed = spec.transposed and bool(axes)
    return ConvSpec(
        inputs,
        outputs,
        tuple(spec.kernel_size[i] if i in axes else 1 for i in dims),
        tuple(spec.stride[i] if i in axes else 1 for i in dims),
        tuple(spec.padding[i] if i in axes else (0, 0) for i in dims),
        tuple(spec.dilation[i] if i in axes else 1 for i in dims),
        groups or spec.groups,
        bias,
        spec.padding_mode if axes else "zeros",
        transposed,
        tuple(spec.output_padding[i] if transposed and i in axes else 0 for i in dims),
    )


def chain_params(chain: Chain) -> int:
    """Parameters of a chain."""
    return sum(spec.params for _, spec in chain)


def chain_macs(chain: Chain, input_shape: Sequence[int], output_shape: Sequence[int]) -> int:
    """MACs of a chain on one input of the layer; the output's shape decides the size that a transposed stage makes."""
    total, shape = 0, tuple(input_shape)
    for _, spec in chain:
        out = stage_output(spec, shape, output_shape)
        total += spec.macs(shape, out)
        shape = out
    return total


def moved(chain: Chain, shape: Sequence[int], output_shape: Sequence[int]) -> int:
    """Numbers that a chain reads and writes: activations and weights of every stage."""
    total = 0
    for _, spec in chain:
        after = stage_output(spec, shape, output_shape)
        total += prod(shape) + prod(after) + spec.params
        shape = after
    return total


def stage_output(spec: ConvSpec, shape: Sequence[int], output_shape: Sequence[int]) -> tuple[int, ...]:
    """The output shape of one stage; that of the whole layer decides the size that a transposed stage makes."""
    if not spec.dims:
        return (*shape[:-1], spec.out_channels)
    wanted = None
    if spec.transposed:
        here, there = shape[-spec.dims :], output_shape[-spec.dims :]
        wanted = tuple(m if owns_axis(spec, i) else n for i, (n, m) in enumerate(zip(here, there)))
    return spec.output_shape(shape, wanted)


def owns_axis(spec: ConvSpec, axis: int) -> bool:
    """Whether a stage changes the size along an axis, so that a wanted output size is its business."""
    extended = spec.kernel_size[axis] > 1 or spec.stride[axis] > 1
    return extended or spec.padding[axis] != (0, 0) or spec.output_padding[axis] != 0
