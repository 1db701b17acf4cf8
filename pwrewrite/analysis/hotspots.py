"""Which layers hold the work, and what a bottleneck could save in each.

A *hotspot* is a dense k×k convolution (k > 1 in some dimension, not depthwise) with at least a given share of the
model's MACs. For each layer the table says either where a bottleneck breaks even (`pwrewrite.analysis.break_even`) or
why none may be inserted. Break-even is necessary, not sufficient: three small convolutions can be slower than one
large one, and how low a rank the weights allow is for their spectrum to say.

Limits: a dense layer that already stands between a 1×1 reduction and a 1×1 expansion is judged like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch

from ..capturing.eligibility import Owners, eligible
from ..capturing.records import Capture, Layer, NodeInfo
from ..core.plan import Skip, SkipReason
from .break_even import BottleneckCost
from .devices import DeviceProfile, bound
from .records import BreakEven, LayerReport

HOTSPOT_SHARE = 0.01
"""Share of the MACs from which a dense k×k layer is a hotspot."""


def hotspots(
    capture: Capture,
    infos: Mapping[str, NodeInfo],
    device: DeviceProfile,
    receptive_fields: Mapping[str, tuple[tuple[int, ...], bool]],
    *,
    total_macs: int,
    hotspot_share: float = HOTSPOT_SHARE,
) -> tuple[LayerReport, ...]:
    """One row per layer, largest MACs first; layers of equal MACs stay in graph order.

    Facts of nodes are by name, receptive fields as `pwrewrite.analysis.receptive_fields` returns them; ``total_macs``
    are those of the whole model, linear maps and attention included.
    """
    owners = Owners(capture)
    ranked = sorted(capture.layers, key=lambda layer: -layer.macs)
    shares = [layer.macs / total_macs if total_macs else 0.0 for layer in ranked]
    reports = []
    for layer, share, cumulative in zip(ranked, shares, accumulate(shares)):
        verdict = squeeze(capture, layer, owners)
        dtype = infos[layer.calls[0].node].outputs[0].dtype if layer.calls else torch.float32
        least = bound(layer.macs, sum(call.cost.bytes for call in layer.calls), dtype, device)
        spec, written = layer.spec, sum(call.cost.write_bytes for call in layer.calls)
        hotspot = spec is not None and spec.is_dense_spatial and layer.called and share >= hotspot_share
        extent, whole = receptive_fields.get(layer.calls[0].node, (None, False)) if layer.calls else (None, False)
        gain, skip = (None, verdict) if isinstance(verdict, Skip) else (verdict, None)
        work = (layer, share, min(1.0, cumulative), hotspot, gain, skip)
        reports.append(LayerReport(*work, extent, *least, activation_bytes=written, sees_whole_input=whole))
    return tuple(reports)


def squeeze(capture: Capture, layer: Layer, owners: Owners | None = None) -> BreakEven | Skip:
    """Where a bottleneck in place of a layer breaks even, or why none may be inserted."""
    spec = layer.spec
    if spec is None:
        why = "a linear map has no kernel to squeeze; a pair of low rank may apply"
        return Skip(layer.path, SkipReason.POINTWISE, why)
    if spec.is_pointwise:
        return Skip(layer.path, SkipReason.POINTWISE, "a 1×1 convolution has no kernel to squeeze")
    if spec.is_depthwise:
        why = "each channel is filtered on its own; there are no channels to squeeze"
        return Skip(layer.path, SkipReason.DEPTHWISE, why)
    return eligible(capture, layer, owners) or break_even(layer)


def break_even(layer: Layer) -> BreakEven | Skip:
    """Break-even of a called dense k×k convolution over all its calls, or the skip where no rank gains anything."""
    spec = layer.spec
    assert spec is not None
    macs = BottleneckCost.of_macs(spec, [(call.input_shape, call.output_shape) for call in layer.calls])
    params = BottleneckCost.of_params(spec)
    by_macs, by_params = macs.break_even(), params.break_even()
    if not any(by_macs) and not any(by_params):
        least = f"even a bottleneck of rank {spec.groups} has {macs.at(1, 1):,} MACs and {params.at(1, 1):,} weights"
        why = f"{least}, the layer {macs.original:,} and {params.original:,}"
        return Skip(layer.path, SkipReason.TOO_SMALL, why)
    return BreakEven(*by_macs, *by_params, macs.half, params.half + (spec.out_channels if spec.bias else 0))
