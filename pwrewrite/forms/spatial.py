"""One convolution over some spatial axes and one over the others, such as k×1 → 1×k.

Jaderberg et al. 2014 and Zhang et al. 2016; in 3-D also (k,1,1) → (1,k,k) and the other way round (Tran et al. 2018).
Optimal at every rank, see `pwrewrite.decompose.axis_split`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from ..core.convolution import ConvSpec
from ..core.errors import PlanError
from ..core.plan import SkipReason
from .form import Axes, FormPass, SplitForm, Where


class Spatial(SplitForm):
    """k×1 → 1×k; the axes of the first stage are a setting."""

    name, widths, title = "spatial", ("rank",), "SpatialPair"
    stage_names = ("first", "second")
    passes = (FormPass("factorize-spatial", "k×1 then 1×k in place of a k×k convolution", 0.25),)

    def unfit(self, spec: ConvSpec) -> tuple[SkipReason, str] | None:
        if super().unfit(spec) is None and sum(k > 1 for k in spec.kernel_size) < 2:
            return SkipReason.WRONG_FORM, "has an extent along one axis only, so there is nothing to split"
        return super().unfit(spec)

    def splits(self, spec: ConvSpec) -> Sequence[Axes]:
        """Every way to divide the axes that have an extent; the first of them alone comes first."""
        extended = [axis for axis, size in enumerate(spec.kernel_size) if size > 1]
        return [axes for count in range(1, len(extended)) for axes in combinations(extended, count)] or [(0,)]

    def read_axes(self, spec: ConvSpec, axes: Axes, where: Where) -> Axes:
        axes = self.splits(spec)[0] if axes is None else axes
        if not axes or not set(axes) < set(range(spec.dims)):
            message = f"axes {axes} do not divide the {spec.dims} spatial axes of the layer between two stages"
            expected = f"some but not all of {', '.join(map(str, range(spec.dims)))}, those of the first stage"
            raise PlanError(message, where=where("axes"), expected=expected, got=repr(axes))
        return axes

    def first_axes(self, spec: ConvSpec, axes: Axes) -> tuple[int, ...]:
        assert axes is not None
        return axes


FORM = Spatial()
