"""1×1 convolutions around a k×k: `InsertBottleneck`, `InsertReduction`, `InsertExpansion`.

For a kernel ``W (out, in, *k)`` and widths ``r_in``, ``r_out``::

    bottleneck   W ≈ E · core · R     E (out, r_out),  core (r_out, r_in, *k),  R (r_in, in)     Tucker-2
    reduce       W ≈ core · R         core (out, r_in, *k)                       SVD of the input unfolding
    expand       W ≈ E · core         core (r_out, in, *k)                       SVD of the output unfolding

Sources: Kim et al. 2016, *Compression of deep convolutional neural networks for fast and low power mobile applications*
(Tucker-2 with EVBMF ranks); Szegedy et al. 2014 (reductions, figure 2 b); He et al. 2015 (bottleneck blocks). Linear,
so equal to the original in both modes at full width; below it the error is the part of the spectrum that is cut off.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import decompose
from ..core.convolution import ConvSpec
from .base import LayerPass


def input_unfolding(kernel: Tensor, groups: int) -> Tensor:
    """The first group's kernel as ``(in/groups, out/groups · k)``."""
    first = kernel[: kernel.shape[0] // groups]
    return first.transpose(0, 1).flatten(1)


def output_unfolding(kernel: Tensor, groups: int) -> Tensor:
    """The first group's kernel as ``(out/groups, in/groups · k)``."""
    return kernel[: kernel.shape[0] // groups].flatten(1)


class InsertReduction(LayerPass):
    """Puts a 1×1 reduction before a k×k convolution."""

    name = "insert-reduction"
    summary = "1×1 reduction before a k×k convolution (1×1 → k×k)"
    form = "reduce"

    def _spectra(self, kernel: Tensor, spec: ConvSpec, axes: tuple[int, ...] | None) -> dict[str, Any]:
        return {"rank_in": decompose.reduction_spectrum(kernel, spec.groups)}

    def _unfoldings(self, kernel: Tensor, spec: ConvSpec, axes: tuple[int, ...] | None) -> dict[str, Tensor]:
        return {"rank_in": input_unfolding(kernel, spec.groups)}


class InsertExpansion(LayerPass):
    """Puts a 1×1 expansion behind a narrower k×k convolution."""

    name = "insert-expansion"
    summary = "narrower k×k convolution with a 1×1 expansion behind it (k×k → 1×1)"
    form = "expand"

    def _spectra(self, kernel: Tensor, spec: ConvSpec, axes: tuple[int, ...] | None) -> dict[str, Any]:
        return {"rank_out": decompose.expansion_spectrum(kernel, spec.groups)}

    def _unfoldings(self, kernel: Tensor, spec: ConvSpec, axes: tuple[int, ...] | None) -> dict[str, Tensor]:
        return {"rank_out": output_unfolding(kernel, spec.groups)}


class InsertBottleneck(LayerPass):
    """Puts a k×k convolution between a 1×1 reduction and a 1×1 expansion."""

    name = "insert-bottleneck"
    summary = "1×1 reduction, k×k core, 1×1 expansion in place of a k×k convolution (Tucker-2)"
    form = "bottleneck"

    def _spectra(self, kernel: Tensor, spec: ConvSpec, axes: tuple[int, ...] | None) -> dict[str, Any]:
        return {
            "rank_in": decompose.reduction_spectrum(kernel, spec.groups),
            "rank_out": decompose.expansion_spectrum(kernel, spec.groups),
        }

    def _unfoldings(self, kernel: Tensor, spec: ConvSpec, axes: tuple[int, ...] | None) -> dict[str, Tensor]:
        return {"rank_in": input_unfolding(kernel, spec.groups), "rank_out": output_unfolding(kernel, spec.groups)}
