"""``channels-last``: 2-D convolutions compute in channels_last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...core.convolution import ConvSpec
from ...core.plan import Edit, Op
from ...layers import PointwiseActivation
from .bench import Bench, check_spec


@dataclass(frozen=True)
class ChannelsLastSettings:
    """Settings of ``channels-last``: path of a layer to its shape facts."""

    layers: Mapping[str, ConvSpec]


def use_channels_last(bench: Bench, op: Op, settings: ChannelsLastSettings) -> Edit:
    """Carries out a ``channels-last`` op; no layer is changed where one of them must stay as it is."""
    fused, plain = [], []
    for path, spec in settings.layers.items():
        module = bench.find(op, path, "layers")
        if isinstance(module, PointwiseActivation):
            check_spec(op, module.spec, spec, path)
            fused.append(module)
        else:
            plain.append((bench.layer(op, path, spec, "layers"), spec))
    for module in fused:
        module.channels_last = True
    for layer, spec in plain:
        bench.replace(layer, PointwiseActivation.of_layer(layer, spec, "none", channels_last=True))
    return Edit(op, "module", "channels-last", exact="both")
