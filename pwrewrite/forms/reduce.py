"""A 1×1 reduction before the k×k convolution: ``W ≈ core (out, r, *k) · R (r, in)``.

The SVD of the input unfolding, optimal at every rank (Eckart & Young 1936); as in GoogLeNet (Szegedy et al. 2014,
figure 2 b). The reduction runs at the input's resolution.
"""

from __future__ import annotations

from ..core.convolution import ConvSpec
from .form import Axes, FormPass, SplitForm


class Reduce(SplitForm):
    """1×1 → k×k."""

    name, widths, title = "reduce", ("rank_in",), "Bottleneck"
    stage_names = ("reduce", "core")
    pointwise = True
    passes = (FormPass("insert-reduction", "1×1 reduction before a k×k convolution (1×1 → k×k)"),)

    def first_axes(self, spec: ConvSpec, axes: Axes) -> tuple[int, ...]:
        return ()


FORM = Reduce()
