"""A narrower k×k convolution with a 1×1 expansion behind it: ``W ≈ E (out, r) · core (r, in, *k)``.

The SVD of the output unfolding, optimal at every rank in the full norm of the statistics too (Zhang et al. 2016, the
response reconstruction). The expansion runs at the output's resolution.
"""

from __future__ import annotations

from ..core.convolution import ConvSpec
from .form import Axes, FormPass, SplitForm


class Expand(SplitForm):
    """k×k → 1×1."""

    name, widths, title = "expand", ("rank_out",), "Bottleneck"
    stage_names = ("core", "expand")
    pointwise = True
    passes = (FormPass("insert-expansion", "narrower k×k convolution with a 1×1 expansion behind it (k×k → 1×1)"),)

    def first_axes(self, spec: ConvSpec, axes: Axes) -> tuple[int, ...]:
        return tuple(range(spec.dims))


FORM = Expand()
