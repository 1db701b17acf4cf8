"""Separable forms of a k×k: `FactorizeSpatial` (k×1 → 1×k) and `SeparateDepthwise` (depthwise k×k → 1×1).

Sources: Jaderberg et al. 2014 and Zhang et al. 2016 (spatial pairs); Howard et al. 2017 (MobileNet) and Guo et al.
2018, *Network decoupling* (a kernel as a sum of depthwise–pointwise pairs, exact with as many terms as the kernel has
taps).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import decompose
from ..capturing.records import Layer
from ..core.convolution import ConvSpec
from ..core.plan import Skip, SkipReason
from ..forms import default_axes
from .base import LayerPass
from .bottleneck import output_unfolding


class FactorizeSpatial(LayerPass):
    """Replaces a k×k convolution by one over the first axis and one over the others."""

    name = "factorize-spatial"
    summary = "k×1 then 1×k in place of a k×k convolution"
    form = "spatial"
    default_rank = 0.25

    def _refuses(self, layer: Layer) -> Skip | None:
        refusal = super()._refuses(layer)
        if refusal is None and layer.spec is not None and sum(k > 1 for k in layer.spec.kernel_size) < 2:
            return Skip(
                layer.path, SkipReason.WRONG_FORM, "has an extent along one axis only, so there is nothing to split"
            )
        return refusal

    def _axes(self, spec: ConvSpec) -> tuple[int, ...]:
        return default_axes(spec)

    def _spectra(self, kernel: Tensor, spec: ConvSpec, axes: tuple[int, ...] | None) -> dict[str, Any]:
        return {"rank": decompose.spatial_spectrum(kernel, spec.groups, axes or default_axes(spec))}

    def _unfoldings(self, kernel: Tensor, spec: ConvSpec, axes: tuple[int, ...] | None) -> dict[str, Tensor]:
        first = kernel[: kernel.shape[0] // spec.groups]
        own = [2 + axis for axis in axes or default_axes(spec)]
        others = [axis for axis in range(2, kernel.dim()) if axis not in own]
        rows = first.permute(0, *others, 1, *own)
        return {"rank": rows.flatten(1 + len(others)).flatten(0, len(others))}


class SeparateDepthwise(LayerPass):
    """Replaces a k×k convolution by depthwise filters and a 1×1."""

    name = "separate-depthwise"
    summary = "depthwise k×k (one or several terms) then 1×1 in place of a k×k convolution"
    form = "depthwise"
    default_rank = 1

    def _spectra(self, kernel: Tensor, spec: ConvSpec, axes: tuple[int, ...] | None) -> dict[str, Any]:
        return {"terms": decompose.depthwise_spectrum(kernel, spec.groups)}

    def _unfoldings(self, kernel: Tensor, spec: ConvSpec, axes: tuple[int, ...] | None) -> dict[str, Tensor]:
        per_channel = output_unfolding(kernel, spec.groups).reshape(kernel.shape[0] // spec.groups, kernel.shape[1], -1)
        return {"terms": per_channel[:, 0]}
