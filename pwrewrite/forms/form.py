"""What a form is: one way to replace a layer by a chain of smaller convolutions.

A `Form` answers everything that the rest of the package asks about it: for which layers it is, which widths it has and
how large they can be, what the chain looks like, its weights, and what it loses at which width. Widths are per group.
`OneRank` does most of that for the forms of two factors with one width between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from .. import decompose
from ..core.convolution import ConvSpec
from ..core.errors import PlanError
from ..core.plan import SkipReason
from ..decompose import Factors, PairFactors, RankSpec, Spectrum, default_multiple
from ..decompose.weighting import SideWeight
from .specs import Chain, stage_spec
from .weighted import Cuts, WeightedLayer

Axes = tuple[int, ...] | None
"""The spatial axes of a form's first stage; None where the form leaves no choice."""

Where = Callable[[str], str]
"""From the name of a setting to where it stands in a plan, for errors."""


@dataclass(frozen=True, slots=True)
class FormPass:
    """A pass that proposes a form, with the width or ratio it takes where none is given; ``linear`` for linear maps."""

    name: str
    summary: str
    default_rank: RankSpec = 0.5
    linear: bool = False


@dataclass(frozen=True, slots=True)
class FormLoss:
    """A form at some widths (per group) and axes, and what it loses: ``½ · positions · tr(G Δ C Δᵀ)``, and its root
    relative to the loss of an all-zero kernel.
    """

    widths: Mapping[str, int]
    axes: Axes
    loss: float
    error: float


Worth = Callable[[Mapping[str, int], Axes], bool]
"""Whether widths are worth a look, such as whether they cost less than the layer."""


class Form(ABC):
    """One way to replace a layer by a chain of smaller convolutions."""

    name: ClassVar[str]
    widths: ClassVar[tuple[str, ...]]
    passes: ClassVar[tuple[FormPass, ...]]
    title: ClassVar[str]  # what the module is called when a model is printed
    pointwise: ClassVar[bool] = False  # whether all that it adds to a layer's own kind of kernel is 1×1

    def unfit(self, spec: ConvSpec) -> tuple[SkipReason, str] | None:
        """Why the form is not for a layer of this shape; None where it is."""
        if spec.is_pointwise:
            return SkipReason.POINTWISE, "a 1×1 convolution; factorize-pointwise is for these"
        if spec.is_depthwise:
            return SkipReason.DEPTHWISE, "a depthwise convolution mixes no channels"
        return None

    def splits(self, spec: ConvSpec) -> Sequence[Axes]:
        """The choices of axes for the first stage, the default first."""
        return (None,)

    def read_axes(self, spec: ConvSpec, axes: Axes, where: Where) -> Axes:
        """Axes from a plan; the default where they are None. Raises `PlanError` where they do not fit."""
        if axes is not None:
            raise PlanError(f"the form {self.name} has no axes", where=where("axes"), got=repr(axes))
        return None

    def read_widths(self, spec: ConvSpec, widths: Mapping[str, int], axes: Axes, where: Where) -> dict[str, int]:
        """Widths from a plan; raises `PlanError` where they are not from 1 to the form's limits."""
        limits = self.limits(spec, axes)
        if set(widths) != set(limits):
            wanted, at = f"an object with {' and '.join(limits)}", where("widths")
            raise PlanError(f"not the widths of {self.name}", where=at, expected=wanted, got=repr(widths))
        for name, limit in limits.items():
            if not 1 <= widths[name] <= limit:
                message, wanted = f"{name} of {self.name} does not fit the layer", f"an integer from 1 to {limit}"
                raise PlanError(message, where=where(name), expected=wanted, got=repr(widths[name]))
        return {name: widths[name] for name in limits}

    @abstractmethod
    def limits(self, spec: ConvSpec, axes: Axes = None) -> dict[str, int]:
        """The largest width of each kind that makes sense: at these the form is exact."""

    @abstractmethod
    def stages(self, spec: ConvSpec, widths: Mapping[str, int], axes: Axes = None) -> Chain:
        """The chain that the form puts in place of a layer; its last stage has the bias."""

    @abstractmethod
    def ladder(self, spec: ConvSpec, axes: Axes, multiple: int | None) -> list[dict[str, int]]:
        """Widths for the planner to look at, rounded to ``multiple``; None for 8 where the channels are 64 or more."""

    @abstractmethod
    def spectra(self, kernel: Tensor, spec: ConvSpec, axes: Axes) -> dict[str, Spectrum[Factors]]:
        """For every width the spectrum of a kernel in forward layout that it truncates, from which ranks are read."""

    @abstractmethod
    def truncate(self, kernel: Tensor, spec: ConvSpec, widths: Mapping[str, int], axes: Axes) -> Factors:
        """The factors nearest to a kernel in forward layout, in the order of `stages`."""

    def factorize(self, weight: Tensor, spec: ConvSpec, widths: Mapping[str, int], axes: Axes = None) -> Factors:
        """The factors nearest to a layer's weight in its own layout; their stages are those of `stages` in order."""
        kernel = decompose.to_forward_layout(weight.detach(), spec.groups, spec.transposed)
        return self.truncate(kernel, spec, widths, self.splits(spec)[0] if axes is None else axes)

    @abstractmethod
    def predict(self, layer: WeightedLayer, axes: Axes, ladder: Sequence[Mapping[str, int]]) -> list[float]:
        """The loss at each of some widths, in the norm of a layer's statistics."""

    @abstractmethod
    def solve(self, layer: WeightedLayer, widths: Mapping[str, int], axes: Axes) -> Factors:
        """The factors in the norm of a layer's statistics."""

    def choices(self, spec: ConvSpec, multiple: int | None, worth: Worth) -> list[tuple[dict[str, int], Axes]]:
        """A ladder of widths for each choice of axes, of those that are worth a look."""
        every = [(widths, axes) for axes in self.splits(spec) for widths in self.ladder(spec, axes, multiple)]
        return [each for each in every if worth(*each)]

    def losses(self, layer: WeightedLayer, choices: Sequence[tuple[Mapping[str, int], Axes]]) -> list[FormLoss]:
        """What the form loses at each of some `choices`."""
        losses = dict[int, FormLoss]()
        for axes in dict.fromkeys(axes for _, axes in choices):
            places = [i for i, (_, other) in enumerate(choices) if other == axes]
            predicted = self.predict(layer, axes, [choices[i][0] for i in places])
            losses |= {i: FormLoss(choices[i][0], axes, max(x, 0.0), layer.error(x)) for i, x in zip(places, predicted)}
        return [losses[i] for i in range(len(choices))]

    def fit(self, layer: WeightedLayer, widths: Mapping[str, int], axes: Sequence[int] | None = None) -> Factors:
        """The factors in the norm of a layer's statistics, in the compute dtype, with their errors."""
        factors = self.solve(layer, widths, None if axes is None else tuple(axes))
        delta = layer.kernel - factors.reconstruct().reshape(layer.kernel.shape)
        norm = float(layer.kernel.norm())
        return replace(
            factors,
            relative_error=float(delta.norm()) / norm if norm else 0.0,
            weighted_error=layer.error(layer.loss_of(delta)),
        )


class OneRank(Form):
    """A form of two factors with one width between them, the last of them dense over that width.

    `predict` and `solve` rest on the second, as does refitting the last factor; a form without it overrides both.
    """

    @abstractmethod
    def spectrum(self, kernel: Tensor, spec: ConvSpec, axes: Axes) -> Spectrum[PairFactors]:
        """The form at every rank, in the plain norm."""

    @abstractmethod
    def weighted_spectrum(self, layer: WeightedLayer, axes: Axes) -> tuple[Spectrum[PairFactors], bool]:
        """The form at every rank, weighted by a layer's statistics; and whether that is exact in their norm."""

    def cuts(self, layer: WeightedLayer, axes: Axes = None) -> Cuts:
        """The form at every rank in the norm of a layer, factorised once per layer."""
        return layer.once((self.name, axes), lambda: Cuts(layer, *self.weighted_spectrum(layer, axes)))

    def ladder(self, spec: ConvSpec, axes: Axes, multiple: int | None) -> list[dict[str, int]]:
        ((name, limit),) = self.limits(spec, axes).items()
        return [{name: rank} for rank in ranks_to_try(limit, multiple)]

    def spectra(self, kernel: Tensor, spec: ConvSpec, axes: Axes) -> dict[str, Spectrum[Factors]]:
        return {self.widths[0]: self.spectrum(kernel, spec, axes)}

    def truncate(self, kernel: Tensor, spec: ConvSpec, widths: Mapping[str, int], axes: Axes) -> Factors:
        return self.spectrum(kernel, spec, axes).truncate(widths[self.widths[0]])

    def predict(self, layer: WeightedLayer, axes: Axes, ladder: Sequence[Mapping[str, int]]) -> list[float]:
        return self.cuts(layer, axes).losses([widths[self.widths[0]] for widths in ladder])

    def solve(self, layer: WeightedLayer, widths: Mapping[str, int], axes: Axes) -> Factors:
        return self.cuts(layer, axes).factors(widths[self.widths[0]])


class SplitForm(OneRank):
    """A form that divides the spatial axes between its two stages (`pwrewrite.decompose.axis_split`)."""

    stage_names: ClassVar[tuple[str, str]]

    @abstractmethod
    def first_axes(self, spec: ConvSpec, axes: Axes) -> tuple[int, ...]:
        """The spatial axes of the first stage."""

    def spectrum(self, kernel: Tensor, spec: ConvSpec, axes: Axes) -> Spectrum[PairFactors]:
        return decompose.split_spectrum(kernel, spec.groups, self.first_axes(spec, axes))

    def weighted_spectrum(self, layer: WeightedLayer, axes: Axes) -> tuple[Spectrum[PairFactors], bool]:
        """Exact where the last stage owns no extent, a Kronecker product elsewhere."""
        first = self.first_axes(layer.spec, axes)
        near, outputs, exact = layer.sides(first)
        inputs = None if near is None else SideWeight(near, 1)
        return decompose.split_spectrum(layer.kernel, layer.spec.groups, first, inputs, outputs), exact

    def limits(self, spec: ConvSpec, axes: Axes = None) -> dict[str, int]:
        """No matricisation has more rank than its shorter side."""
        first = self._first(spec, axes)
        near, far = spec.in_channels // spec.groups, spec.out_channels // spec.groups
        for axis, size in enumerate(spec.kernel_size):
            near, far = (near * size, far) if axis in first else (near, far * size)
        return {self.widths[0]: min(near, far)}

    def stages(self, spec: ConvSpec, widths: Mapping[str, int], axes: Axes = None) -> Chain:
        first, middle = self._first(spec, axes), spec.groups * widths[self.widths[0]]
        second = [axis for axis in range(spec.dims) if axis not in first]
        before = stage_spec(spec, spec.in_channels, middle, first)
        behind = stage_spec(spec, middle, spec.out_channels, second, bias=spec.bias)
        return tuple(zip(self.stage_names, (before, behind)))

    def _first(self, spec: ConvSpec, axes: Axes) -> tuple[int, ...]:
        return self.first_axes(spec, self.splits(spec)[0] if axes is None else axes)


def ranks_to_try(limit: int, multiple: int | None = None, most: int = 24) -> list[int]:
    """About ``most`` ranks up to the full one: multiples (None for 8 from 64 on), denser below."""
    step = default_multiple(limit) if multiple is None else multiple
    ranks = [*range(step, limit, step), limit] if limit > step else [limit]
    if step > 1 and limit > step:
        ranks = sorted({*ranks, *(step >> i for i in range(1, step.bit_length() - 1) if step >> i)})
    if len(ranks) <= most:
        return ranks
    return [ranks[i] for i in sorted({round((len(ranks) - 1) * (i / (most - 1)) ** 1.5) for i in range(most)})]
