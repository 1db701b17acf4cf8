"""A k×k convolution between a 1×1 reduction and a 1×1 expansion: ``W ≈ E (out, r_out) · core · R (r_in, in)``.

Tucker-2 (Kim et al. 2016; `pwrewrite.decompose.tucker`), the shape of the bottleneck blocks of He et al. 2015. In the
norm of the statistics the reduction is that of `pwrewrite.forms.reduce`; given that, core and expansion are one exact
factorisation: the best core for the reduced patches, then the best cut of it in their moment. The two errors add up,
since the first is orthogonal to what the reduced patches can express.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan, prod

from torch import Tensor

from ..core.convolution import ConvSpec
from ..decompose import AxisSplit, Factors, Spectrum, Tucker2, Tucker2Spectrum, split_spectrum, tucker2
from .expand import FORM as EXPAND
from .form import Axes, Form, FormPass, ranks_to_try
from .reduce import FORM as REDUCE
from .specs import Chain, stage_spec
from .weighted import WeightedLayer


class Bottleneck(Form):
    """1×1 → k×k → 1×1."""

    name, widths, title = "bottleneck", ("rank_in", "rank_out"), "Bottleneck"
    pointwise = True
    passes = (
        FormPass(
            "insert-bottleneck", "1×1 reduction, k×k core, 1×1 expansion in place of a k×k convolution (Tucker-2)"
        ),
    )

    def limits(self, spec: ConvSpec, axes: Axes = None) -> dict[str, int]:
        return {"rank_in": spec.in_channels // spec.groups, "rank_out": spec.out_channels // spec.groups}

    def stages(self, spec: ConvSpec, widths: Mapping[str, int], axes: Axes = None) -> Chain:
        inner, outer = spec.groups * widths["rank_in"], spec.groups * widths["rank_out"]
        return (
            ("reduce", stage_spec(spec, spec.in_channels, inner, ())),
            ("core", stage_spec(spec, inner, outer, range(spec.dims))),
            ("expand", stage_spec(spec, outer, spec.out_channels, (), bias=spec.bias)),
        )

    def ladder(self, spec: ConvSpec, axes: Axes, multiple: int | None) -> list[dict[str, int]]:
        """Full input widths are left to `pwrewrite.forms.expand`."""
        most_out = self.limits(spec)["rank_out"]
        (most_in,) = REDUCE.limits(spec).values()
        return [
            {"rank_in": inner, "rank_out": outer}
            for inner in ranks_to_try(most_in, multiple, 8)
            for outer in ranks_to_try(most_out, multiple)
            if inner < most_in and outer <= inner * prod(spec.kernel_size)
        ]

    def spectra(self, kernel: Tensor, spec: ConvSpec, axes: Axes) -> dict[str, Spectrum[Factors]]:
        return REDUCE.spectra(kernel, spec, None) | EXPAND.spectra(kernel, spec, None)

    def truncate(self, kernel: Tensor, spec: ConvSpec, widths: Mapping[str, int], axes: Axes) -> Factors:
        return tucker2(kernel, rank_in=widths["rank_in"], rank_out=widths["rank_out"], groups=spec.groups)

    def predict(self, layer: WeightedLayer, axes: Axes, ladder: Sequence[Mapping[str, int]]) -> list[float]:
        pairs = [(widths["rank_in"], widths["rank_out"]) for widths in ladder]
        if layer.inputs is None:
            losses = self._tucker(layer).losses * layer.factor
            return [float(losses[outer, inner]) for inner, outer in pairs]
        nested = REDUCE.cuts(layer).nested(max(inner for inner, _ in pairs))
        root = layer.gradient_root()
        explained = {i: nested.explained_cut(min(i, nested.rank), root) for i in dict.fromkeys(i for i, _ in pairs)}
        return [layer.scale - float(explained[inner][outer]) * layer.factor for inner, outer in pairs]

    def solve(self, layer: WeightedLayer, widths: Mapping[str, int], axes: Axes) -> Factors:
        inner, outer = widths["rank_in"], widths["rank_out"]
        if layer.inputs is None:
            return self._tucker(layer).truncate(inner, outer, sweeps=5)
        limit = REDUCE.cuts(layer).max_rank
        reduction, cores = layer.once((self.name, min(inner, limit)), lambda: _cores(layer, min(inner, limit)))
        if inner > limit or outer > cores.max_rank:  # wider than the kernel's own rank: the plain form
            return tucker2(layer.kernel, rank_in=inner, rank_out=outer, groups=layer.spec.groups)
        cut, groups = cores.truncate(outer), layer.spec.groups
        reduce, expand = reduction.flatten(1), cut.second.flatten(1)
        return Tucker2(
            reduce=reduce, core=cut.first, expand=expand, groups=groups, relative_error=nan, weighted_error=nan
        )

    def _tucker(self, layer: WeightedLayer) -> Tucker2Spectrum:
        return layer.once(self.name, lambda: Tucker2Spectrum(layer.kernel, layer.spec.groups, None, layer.gradients))


def _cores(layer: WeightedLayer, rank_in: int) -> tuple[Tensor, Spectrum[AxisSplit]]:
    """The reduction of one width, and the cuts of its best core at every output width."""
    cuts = REDUCE.cuts(layer)
    factors, normal = cuts.solved(cuts.truncate(rank_in))
    assert isinstance(factors, AxisSplit)
    axes = range(layer.spec.dims)
    return factors.first, split_spectrum(factors.second, layer.spec.groups, axes, normal, layer.gradients)


FORM = Bottleneck()
