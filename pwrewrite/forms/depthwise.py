"""Depthwise k×k filters, ``terms`` per input channel, and a 1×1 that mixes them.

Howard et al. 2017 (MobileNet) with one term; Guo et al. 2018, *Network decoupling*, with several: exact with as many
terms as the kernel has taps. The algebra is in `pwrewrite.decompose.depthwise_pair`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import Tensor

from ..core.convolution import ConvSpec
from ..decompose import PairFactors, Spectrum, depthwise_spectrum
from ..decompose.weighting import SideWeight
from .form import Axes, FormPass, OneRank
from .specs import Chain, stage_spec
from .weighted import WeightedLayer


class Depthwise(OneRank):
    """Depthwise k×k → 1×1."""

    name, widths, title = "depthwise", ("terms",), "DepthwiseSeparable"
    passes = (
        FormPass(
            "separate-depthwise", "depthwise k×k (one or several terms) then 1×1 in place of a k×k convolution", 1
        ),
    )

    def limits(self, spec: ConvSpec, axes: Axes = None) -> dict[str, int]:
        return {"terms": min(prod(spec.kernel_size), spec.out_channels // spec.groups)}

    def stages(self, spec: ConvSpec, widths: Mapping[str, int], axes: Axes = None) -> Chain:
        middle = spec.in_channels * widths["terms"]
        filters = stage_spec(spec, spec.in_channels, middle, range(spec.dims), groups=spec.in_channels)
        return ("depthwise", filters), ("pointwise", stage_spec(spec, middle, spec.out_channels, (), bias=spec.bias))

    def spectrum(self, kernel: Tensor, spec: ConvSpec, axes: Axes) -> Spectrum[PairFactors]:
        return depthwise_spectrum(kernel, spec.groups)

    def weighted_spectrum(self, layer: WeightedLayer, axes: Axes) -> tuple[Spectrum[PairFactors], bool]:
        """Correlations between input channels are not seen."""
        inputs = None if layer.inputs is None else SideWeight(layer.inputs, 1)
        weighted = depthwise_spectrum(layer.kernel, layer.spec.groups, inputs, layer.gradients)
        return weighted, layer.inputs is None


FORM = Depthwise()
