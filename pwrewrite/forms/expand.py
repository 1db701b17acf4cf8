"""A narrower k×k convolution with a 1×1 expansion behind it: ``W ≈ E (out, r) · core (r, in, *k)``.

The SVD of the output unfolding, optimal at every rank in the full norm of the statistics too (Zhang et al. 2016, the
response reconstruction). The expansion runs at the output's resolution.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..core.convolution import ConvSpec
from .form import Axes, FormPass, SplitForm
from .specs import Chain, stage_spec


class Expand(SplitForm):
    """k×k → 1×1."""

    name, widths, title = "expand", ("rank_out",), "Bottleneck"
    pointwise = True
    passes = (
        FormPass("insert-expansion", "narrower k×k convolution with a 1×1 expansion behind it (k×k → 1×1)"),
    )  # fmt: skip

    def first_axes(self, spec: ConvSpec, axes: Axes) -> tuple[int, ...]:
        """See `SplitForm.first_axes`."""
        return tuple(range(spec.dims))

    def stages(self, spec: ConvSpec, widths: Mapping[str, int], axes: Axes = None) -> Chain:
        """See `Form.stages`."""
        middle = spec.groups * widths["rank_out"]
        return (
            ("core", stage_spec(spec, spec.in_channels, middle, range(spec.dims))),
            ("expand", stage_spec(spec, middle, spec.out_channels, (), bias=spec.bias)),
        )


FORM = Expand()
