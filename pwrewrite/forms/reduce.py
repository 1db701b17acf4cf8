"""A 1×1 reduction before the k×k convolution: ``W ≈ core (out, r, *k) · R (r, in)``.

The SVD of the input unfolding, optimal at every rank (Eckart & Young 1936); as in GoogLeNet (Szegedy et al. 2014,
figure 2 b). The reduction runs at the input's resolution.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..core.convolution import ConvSpec
from .form import Axes, FormPass, SplitForm
from .specs import Chain, stage_spec


class Reduce(SplitForm):
    """1×1 → k×k."""

    name, widths, title = "reduce", ("rank_in",), "Bottleneck"
    pointwise = True
    passes = (FormPass("insert-reduction", "1×1 reduction before a k×k convolution (1×1 → k×k)"),)

    def first_axes(self, spec: ConvSpec, axes: Axes) -> tuple[int, ...]:
        """See `SplitForm.first_axes`."""
        return ()

    def stages(self, spec: ConvSpec, widths: Mapping[str, int], axes: Axes = None) -> Chain:
        """See `Form.stages`."""
        middle = spec.groups * widths["rank_in"]
        return (
            ("reduce", stage_spec(spec, spec.in_channels, middle, ())),
            ("core", stage_spec(spec, middle, spec.out_channels, range(spec.dims), bias=spec.bias)),
        )


FORM = Reduce()
