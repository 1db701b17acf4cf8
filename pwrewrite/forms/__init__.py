"""The forms that a layer can be factorised into, as chains of smaller convolutions: shapes and costs without weights.

A *form* replaces one convolution ``(out, in/groups, *k)`` by a chain. Stride, padding, dilation and output padding sit
on the stages that own the spatial axes, everything else is 1×1; only the last stage has a bias, so that padding
commutes with the channel mixing before it and the chain is exactly linear in the factors. Widths are per group::

    bottleneck   1×1 in→rank_in,  k×k rank_in→rank_out,  1×1 rank_out→out
    reduce       1×1 in→rank_in,  k×k rank_in→out
    expand       k×k in→rank_out, 1×1 rank_out→out
    spatial      k×1 in→rank,     1×k rank→out           (the axes of the first stage are a setting)
    depthwise    k×k depthwise in→in·terms, 1×1 in·terms→out
    pair         1×1 in→rank, 1×1 rank→out               (for a pointwise convolution or a linear map)

`pwrewrite.decompose` gives the weights and the sources of each form; this module joins it to `ConvSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from .. import decompose
from ..core.convolution import ConvSpec
from ..core.errors import PlanError

FORMS: dict[str, tuple[str, ...]] = {
    "bottleneck": ("rank_in", "rank_out"),
    "reduce": ("rank_in",),
    "expand": ("rank_out",),
    "spatial": ("rank",),
    "depthwise": ("terms",),
    "pair": ("rank",),
}
"""Form to the names of its widths."""


def linear_spec(in_features: int, out_features: int, bias: bool) -> ConvSpec:
    """A linear map as a convolution without spatial axes."""
    return ConvSpec(in_features, out_features, (), (), (), (), bias=bias)


def pointwise_spec(dims: int, in_channels: int, out_channels: int, bias: bool = False) -> ConvSpec:
    """A 1×1 convolution over some spatial dims; a linear map over none."""
    ones = (1,) * dims
    return ConvSpec(in_channels, out_channels, ones, ones, ((0, 0),) * dims, ones, 1, bias, output_padding=(0,) * dims)


def spec_to_dict(spec: ConvSpec) -> dict[str, Any]:
    """A spec as JSON data."""
    return {
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "kernel_size": list(spec.kernel_size),
        "stride": list(spec.stride),
        "padding": [list(p) for p in spec.padding],
        "dilation": list(spec.dilation),
        "groups": spec.groups,
        "bias": spec.bias,
        "padding_mode": spec.padding_mode,
        "transposed": spec.transposed,
        "output_padding": list(spec.output_padding),
    }


def spec_from_dict(data: Any, where: str) -> ConvSpec:
    """Reads what `spec_to_dict` wrote.

    Raises:
        PlanError: If it is not that.
    """
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
        _check_spec(spec)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(
            "not the shape facts of a layer",
            where=where,
            expected="what `pwrewrite plan` writes under 'layer'",
            got=repr(error),
        ) from None
    return spec


def _check_spec(spec: ConvSpec) -> None:
    counts = (spec.in_channels, spec.out_channels, spec.groups, *spec.kernel_size, *spec.stride, *spec.dilation)
    per_dim = (spec.stride, spec.padding, spec.dilation, spec.output_padding)
    if any(n < 1 for n in counts):
        raise ValueError("channels, groups, kernel size, stride and dilation are at least 1")
    if spec.dims > 3 or any(len(values) != spec.dims for values in per_dim):
        raise ValueError("kernel size, stride, padding, dilation and output padding have one entry per spatial dim")
    if spec.in_channels % spec.groups or spec.out_channels % spec.groups:
        raise ValueError("groups divide the channels")


def rank_limits(spec: ConvSpec, form: str, axes: Sequence[int] | None = None) -> dict[str, int]:
    """The largest width of each kind that a form can use, per group: at these it is exact.

    Args:
        spec: The layer.
        form: One of `FORMS`.
        axes: For ``spatial``: the axes of the first stage.
    """
    per_in, per_out = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    taps = 1
    for k in spec.kernel_size:
        taps *= k
    # No unfolding has more rank than its shorter side: few outputs cannot use many inputs, and the other way round.
    most_in, most_out = min(per_in, per_out * taps), min(per_out, per_in * taps)
    return {
        "bottleneck": {"rank_in": per_in, "rank_out": per_out},
        "reduce": {"rank_in": most_in},
        "expand": {"rank_out": most_out},
        "spatial": {"rank": _spatial_limit(spec, axes)},
        "depthwise": {"terms": min(taps, per_out)},
        "pair": {"rank": min(per_in, per_out)},
    }[form]


def default_axes(spec: ConvSpec) -> tuple[int, ...]:
    """The axes of the first stage of the spatial form: the first that has an extent."""
    extended = [i for i, k in enumerate(spec.kernel_size) if k > 1]
    return tuple(extended[:1])


def _spatial_limit(spec: ConvSpec, axes: Sequence[int] | None) -> int:
    axes = default_axes(spec) if axes is None else axes
    first, second = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    for i, k in enumerate(spec.kernel_size):
        if i in axes:
            first *= k
        else:
            second *= k
    return min(first, second)


def check_form(spec: ConvSpec, form: Any, axes: Any, where: Callable[[str], str]) -> tuple[int, ...] | None:
    """Checks that a form is known and that it splits a layer along axes that the layer has.

    Args:
        spec: The layer.
        form: Name of the form.
        axes: For ``spatial``: the axes of the first stage; the default where None.
        where: From the name of a setting to where it is found, for the error.

    Returns:
        The axes; None where the form has none.

    Raises:
        PlanError: If it is not or does not.
    """
    if form not in FORMS:
        raise PlanError(
            f"unknown form {form!r}", where=where("form"), expected=f"one of {', '.join(FORMS)}", got=repr(form)
        )
    if form != "spatial":
        if axes is not None:
            raise PlanError(f"the form {form} has no axes", where=where("axes"), got=repr(axes))
        return None
    if axes is None:
        return default_axes(spec)
    every = range(spec.dims)
    if not isinstance(axes, (list, tuple)) or not axes or any(type(a) is not int or a not in every for a in axes):
        raise PlanError(
            "axes are those of the first stage",
            where=where("axes"),
            expected=f"a list of some of {', '.join(map(str, every))}",
            got=repr(axes),
        )
    return tuple(axes)


def check_widths(
    spec: ConvSpec, form: str, widths: Any, where: Callable[[str], str], axes: Sequence[int] | None = None
) -> dict[str, int]:
    """Widths that make sense for a layer.

    Args:
        spec: The layer.
        form: One of `FORMS`.
        widths: Name to width, per group.
        where: From the name of a setting to where it is found, for the error.
        axes: For ``spatial``: the axes of the first stage.

    Raises:
        PlanError: If a width is missing, unknown, not an integer, below 1 or beyond the channels.
    """
    limits = rank_limits(spec, form, axes)
    if not isinstance(widths, Mapping) or set(widths) != set(limits):
        raise PlanError(
            f"not the widths of {form}",
            where=where("widths"),
            expected=f"an object with {' and '.join(limits)}",
            got=repr(widths),
        )
    for name, limit in limits.items():
        width = widths[name]
        if type(width) is not int or not 1 <= width <= limit:
            raise PlanError(
                f"{name} of {form} does not fit the layer",
                where=where(name),
                expected=f"an integer from 1 to {limit}",
                got=repr(width),
            )
    return {name: widths[name] for name in limits}


def stages(
    spec: ConvSpec, form: str, widths: Mapping[str, int], axes: Sequence[int] | None = None
) -> tuple[tuple[str, ConvSpec], ...]:
    """The chain that a form puts in place of a layer.

    Args:
        spec: The layer.
        form: One of `FORMS`.
        widths: The form's widths, per group.
        axes: For ``spatial``: the axes of the first stage.

    Returns:
        ``(name, spec)`` per stage, first to last.
    """
    g, last = spec.groups, spec.out_channels
    every = tuple(range(spec.dims))
    if form == "bottleneck":
        inner, outer = g * widths["rank_in"], g * widths["rank_out"]
        return (
            ("reduce", _stage(spec, spec.in_channels, inner, ())),
            ("core", _stage(spec, inner, outer, every)),
            ("expand", _stage(spec, outer, last, (), bias=spec.bias)),
        )
    if form == "reduce":
        inner = g * widths["rank_in"]
        return (
            ("reduce", _stage(spec, spec.in_channels, inner, ())),
            ("core", _stage(spec, inner, last, every, bias=spec.bias)),
        )
    if form == "expand":
        outer = g * widths["rank_out"]
        return (
            ("core", _stage(spec, spec.in_channels, outer, every)),
            ("expand", _stage(spec, outer, last, (), bias=spec.bias)),
        )
    if form == "spatial":
        first = tuple(default_axes(spec) if axes is None else axes)
        middle = g * widths["rank"]
        return (
            ("first", _stage(spec, spec.in_channels, middle, first)),
            ("second", _stage(spec, middle, last, tuple(a for a in every if a not in first), bias=spec.bias)),
        )
    if form == "depthwise":
        middle = spec.in_channels * widths["terms"]
        return (
            ("depthwise", _stage(spec, spec.in_channels, middle, every, groups=spec.in_channels)),
            ("pointwise", _stage(spec, middle, last, (), bias=spec.bias)),
        )
    middle = g * widths["rank"]
    return (
        ("reduce", _stage(spec, spec.in_channels, middle, () if spec.transposed else every)),
        ("expand", _stage(spec, middle, last, every if spec.transposed else (), bias=spec.bias)),
    )


def _stage(
    spec: ConvSpec, inputs: int, outputs: int, axes: Sequence[int], *, groups: int | None = None, bias: bool = False
) -> ConvSpec:
    """One stage: the original's settings on ``axes``, 1×1 elsewhere; transposed only where it owns an axis."""
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


def chain_params(chain: Sequence[tuple[str, ConvSpec]]) -> int:
    """Parameters of a chain."""
    return sum(spec.params for _, spec in chain)


def chain_macs(chain: Sequence[tuple[str, ConvSpec]], input_shape: Sequence[int], output_shape: Sequence[int]) -> int:
    """MACs of a chain on one input.

    Args:
        chain: Its stages.
        input_shape: Shape of the layer's input.
        output_shape: Shape of the layer's output; decides the size that a transposed stage makes.
    """
    total, shape = 0, tuple(input_shape)
    for _, spec in chain:
        out = stage_output(spec, shape, output_shape)
        if spec.dims:
            total += spec.macs(shape, out)
        else:
            total += prod(shape) * spec.out_channels
        shape = out
    return total


def stage_output(spec: ConvSpec, shape: Sequence[int], output_shape: Sequence[int]) -> tuple[int, ...]:
    """The output shape of one stage.

    Args:
        spec: The stage.
        shape: Shape of its input.
        output_shape: Shape of the whole layer's output; decides the size that a transposed stage makes.
    """
    if not spec.dims:
        return (*shape[:-1], spec.out_channels)
    wanted = None
    if spec.transposed:
        here, there = shape[-spec.dims :], output_shape[-spec.dims :]
        wanted = tuple(m if k_owned(spec, i) else n for i, (n, m) in enumerate(zip(here, there)))
    return spec.output_shape(shape, wanted)


def k_owned(spec: ConvSpec, axis: int) -> bool:
    """Whether a stage changes the size along an axis, so that a wanted output size is its business."""
    return (
        spec.kernel_size[axis] > 1
        or spec.stride[axis] > 1
        or spec.padding[axis] != (0, 0)
        or spec.output_padding[axis] != 0
    )


def factorize(
    weight: Tensor,
    spec: ConvSpec,
    form: str,
    widths: Mapping[str, int],
    *,
    axes: Sequence[int] | None = None,
    method: str = "hooi",
) -> decompose.Factors:
    """The weights of a form.

    Args:
        weight: The layer's weight: ``(out, in/groups, *k)``, ``(in, out/groups, *k)`` where transposed, or
            ``(out, in)``.
        spec: The layer.
        form: One of `FORMS`.
        widths: The form's widths, per group.
        axes: For ``spatial``: the axes of the first stage.
        method: For ``bottleneck``: ``hooi`` or ``hosvd``.

    Returns:
        Factors whose ``stages(transposed)`` carry the weight of each stage of `stages` in order.
    """
    kernel = decompose.to_forward_layout(weight.detach(), spec.groups, spec.transposed)
    g = spec.groups
    if form == "bottleneck":
        return decompose.tucker2(
            kernel, rank_in=widths["rank_in"], rank_out=widths["rank_out"], groups=g, method=method
        )
    if form == "reduce":
        return decompose.reduction(kernel, widths["rank_in"], groups=g)
    if form == "expand":
        return decompose.expansion(kernel, widths["rank_out"], groups=g)
    if form == "spatial":
        return decompose.spatial(kernel, widths["rank"], groups=g, first_axes=tuple(axes or default_axes(spec)))
    if form == "depthwise":
        return decompose.depthwise(kernel, widths["terms"], groups=g)
    return decompose.low_rank(kernel, widths["rank"], groups=g)
