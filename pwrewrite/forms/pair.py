"""Two thin maps in place of a 1×1 convolution or a linear map: ``W (out, in) ≈ E (out, r) · R (r, in)``.

The truncated SVD, optimal at every rank (Eckart & Young 1936). It gains below ``r = in · out / (in + out)``. Half of
ResNet-50's MACs are in 1×1 convolutions, so a budget below that needs it. A stride and padding sit on ``reduce``, so
both run at the output's resolution; a transposed one upsamples in ``expand``, so both run at the input's.
"""

from __future__ import annotations

from ..core.convolution import ConvSpec
from ..core.errors import PlanError
from ..core.plan import SkipReason
from .form import Axes, FormPass, SplitForm, Where


class Pair(SplitForm):
    """1×1 → 1×1, or linear → linear."""

    name, widths, title = "pair", ("rank",), "LowRankPair"
    stage_names = ("reduce", "expand")
    pointwise = True
    passes = (
        FormPass("factorize-pointwise", "two thin 1×1 convolutions in place of one (SVD)", 0.25),
        FormPass("factorize-linear", "two thin linear maps in place of one (SVD)", 0.25, linear=True),
    )

    def unfit(self, spec: ConvSpec) -> tuple[SkipReason, str] | None:
        if spec.is_depthwise:
            return SkipReason.DEPTHWISE, "a depthwise convolution mixes no channels"
        if not spec.is_pointwise:
            return SkipReason.WRONG_FORM, "not a 1×1 convolution; insert-bottleneck is for these"
        return None

    def read_axes(self, spec: ConvSpec, axes: Axes, where: Where) -> Axes:
        if not spec.is_pointwise:
            message = f"the form pair is not for a kernel of {spec.kernel_size}"
            expected = "a 1×1 convolution or a linear map"
            hint = "bottleneck, reduce, expand, spatial and depthwise are for k×k"
            raise PlanError(message, where=where("form"), expected=expected, hint=hint)
        return super().read_axes(spec, axes, where)

    def first_axes(self, spec: ConvSpec, axes: Axes) -> tuple[int, ...]:
        return () if spec.transposed else tuple(range(spec.dims))


FORM = Pair()
