"""Two thin maps in place of one: `FactorizePointwise` for 1×1 convolutions, `FactorizeLinear` for ``nn.Linear``.

``W (out, in) ≈ E (out, r) · R (r, in)``, the truncated SVD, which is optimal in the Frobenius norm (Eckart & Young
1936). It gains below ``r = in · out / (in + out)``. Half of ResNet-50's MACs are in 1×1 convolutions, so a budget below
that needs it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import decompose
from ..capturing.records import Layer
from ..core.convolution import ConvSpec
from ..core.plan import Skip, SkipReason
from .base import LayerPass
from .bottleneck import output_unfolding


class FactorizePointwise(LayerPass):
    """Replaces a 1×1 convolution by two thinner ones."""

    name = "factorize-pointwise"
    summary = "two thin 1×1 convolutions in place of one (SVD)"
    form = "pair"
    default_rank = 0.25

    def _refuses(self, layer: Layer) -> Skip | None:
        spec = layer.spec
        assert spec is not None
        if spec.is_depthwise:
            return Skip(layer.path, SkipReason.DEPTHWISE, "a depthwise convolution mixes no channels")
        if not spec.is_pointwise:
            return Skip(layer.path, SkipReason.WRONG_FORM, "not a 1×1 convolution; insert-bottleneck is for these")
        return None

    def _spectra(self, kernel: Tensor, spec: ConvSpec, axes: tuple[int, ...] | None) -> dict[str, Any]:
        return {"rank": decompose.low_rank_spectrum(kernel, spec.groups)}

    def _unfoldings(self, kernel: Tensor, spec: ConvSpec, axes: tuple[int, ...] | None) -> dict[str, Tensor]:
        return {"rank": output_unfolding(kernel, spec.groups)}


class FactorizeLinear(FactorizePointwise):
    """Replaces a linear map by two thinner ones."""

    name = "factorize-linear"
    summary = "two thin linear maps in place of one (SVD)"

    def _concerns(self, layer: Layer) -> bool:
        return layer.op == "linear"

    def _refuses(self, layer: Layer) -> Skip | None:
        return None
