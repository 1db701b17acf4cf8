"""What calibration inputs say about each layer: second moments of its input and of the loss's gradient at its output.

``C = E[x xᵀ]`` of the patches ``x`` under the output positions, with their mean, and ``G = E[g gᵀ]`` of the gradients
``g`` there; `pwrewrite.planning.gathering` adds them up. Sums only are held: memory is bounded by the layers, not the
data.

The loss that is made of them, ``½ · positions · tr(G ΔW C ΔWᵀ)``, assumes that gradients do not depend on inputs, and
that errors at different positions and in different layers do not add coherently. `pwrewrite.planning.outputs` measures
what that misses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..core.convolution import ConvSpec
from ..decompose.eigen import symmetric_eigen
from ..decompose.gram import add_gram, mirror
from .patches import row_size
from .running import wide_dtype

LARGEST_ROW = 8192
"""Longer input rows than this get no second moment of their own, only that of their mean square."""

_NEARLY_CONSTANT = 0.03
"""Below this share of its second moment, the variance of what a layer reads is near the rounding of its sums."""


@dataclass(frozen=True)
class Between:
    """A module that is watched from its one input to its one output, with the pointwise map between their channels.

    ``joint``: whether rows are inputs and outputs side by side, at the same positions; else they are the outputs less
    the inputs, which have the same shape.
    """

    spec: ConvSpec
    joint: bool

    @property
    def size(self) -> int:
        """Size of a row."""
        return self.spec.out_channels + self.spec.in_channels * self.joint


Watched = Mapping[str, ConvSpec | Between]
"""Path to what is watched there: a layer, by its shape facts, or a module from end to end."""


@dataclass
class LayerStatistics:
    """Sums over what one layer read and what came back to it.

    Attributes:
        inputs: ``(groups, d, d)`` sum of ``x xᵀ``, float64; ``(groups, d)``, its diagonal, above `LARGEST_ROW`.
        means: ``(groups, d)`` sum of ``x``.
        weight: How many positions the rows stand for; ``gradient_weight`` likewise.
        rows: How many were seen.
        gradients: ``(groups, o, o)`` sum of ``g gᵀ``; None where none came.
    """

    inputs: Tensor
    means: Tensor
    weight: float = 0.0
    rows: int = 0
    gradients: Tensor | None = None
    gradient_weight: float = 0.0

    @classmethod
    def empty(cls, watched: ConvSpec | Between, device: torch.device) -> LayerStatistics:
        """No rows yet."""
        size, spec = (watched.size, watched.spec) if isinstance(watched, Between) else (row_size(watched), watched)
        square = (size, size) if size <= LARGEST_ROW else (size,)
        none = torch.zeros(0, dtype=wide_dtype(device), device=device)
        return cls(none.new_zeros(spec.groups, *square), none.new_zeros(spec.groups, size))

    def add_inputs(self, rows: Tensor, weight: float) -> None:
        """Adds input rows ``(groups, n, d)`` that each stand for ``weight`` positions."""
        if self.inputs.dim() == 3:
            _add_moments(self.inputs, rows, weight)
        else:
            self.inputs.add_(rows.square().sum(1).to(self.inputs.dtype), alpha=weight)
        self.means.add_(rows.sum(1).to(self.means.dtype), alpha=weight)
        self.weight += weight * rows.shape[1]
        self.rows += rows.shape[1]

    def add_gradients(self, rows: Tensor, weight: float) -> None:
        """Adds gradient rows ``(groups, n, o)``."""
        if self.gradients is None:
            self.gradients = self.inputs.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
        _add_moments(self.gradients, rows, weight)
        self.gradient_weight += weight * rows.shape[1]

    def finish(self) -> None:
        """Completes the moments: of large ones one half is summed up."""
        for moments in (self.inputs, self.gradients):
            if moments is not None and moments.dim() == 3 and len(moments) == 1:
                mirror(moments[0])

    def input_moment(self, *, centred: bool = False) -> Tensor | None:
        """``C (groups, d, d)``, without the mean of ``x`` where centred; None where ``d`` is above `LARGEST_ROW`."""
        if self.inputs.dim() == 2:
            return None
        weight = max(self.weight, 1e-300)
        moment, mean = self.inputs / weight, self.means / weight
        if not centred:
            return moment
        size = torch.linalg.matrix_norm(moment)
        noise = torch.finfo(torch.float32).eps * size
        moment.baddbmm_(mean[:, :, None], mean[:, None, :], alpha=-1)
        if bool((torch.linalg.matrix_norm(moment) < _NEARLY_CONSTANT * size).any()):
            # The mean is nearly all there is: of what is left, rounding of sums in float32 makes some negative.
            values, vectors = symmetric_eigen(moment)
            return (vectors * torch.maximum(values, noise[:, None]).unsqueeze(-2)) @ vectors.mT
        moment.diagonal(dim1=-2, dim2=-1).add_(noise[:, None])
        return moment

    def level(self, centred: bool = False) -> float:
        """The mean square of an element of ``x``; its variance where centred."""
        weight = max(self.weight, 1e-300)
        squares = self.inputs if self.inputs.dim() == 2 else self.inputs.diagonal(dim1=-2, dim2=-1)
        level = float((squares / weight - ((self.means / weight).square() if centred else 0)).mean())
        return max(level, 0.0)  # rounding

    def gradient_moment(self) -> Tensor | None:
        """``G (groups, o, o)``, the mean of ``g gᵀ``; None where no gradient reached the layer."""
        if self.gradients is None or not self.gradient_weight or not bool(self.gradients.any()):
            return None
        return self.gradients / self.gradient_weight


@dataclass
class Statistics:
    """Sums of every layer, by path, and how many samples and chunks were seen.

    Attributes:
        kind: ``loss`` with gradients, ``activations`` without.
        outcome: What the gradients are of: ``classes`` or ``values``; ``""`` without.
        outputs: What the model's outputs are, as `pwrewrite.planning.outputs` says.
    """

    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    samples: int = 0
    chunks: int = 0
    kind: str = "loss"
    outcome: str = ""
    outputs: str = ""

    def positions(self, path: str) -> float:
        """How many positions of a layer one sample has, over all its calls."""
        return self.layers[path].weight / max(self.samples, 1)

    def without_gradients(self) -> Statistics:
        """What the layers read alone."""
        layers = {path: replace(sums, gradients=None) for path, sums in self.layers.items()}
        return replace(self, layers=layers, kind="activations", outcome="")

    def round(self) -> None:
        """Rounds the moments of inputs as the cache does, so that a first plan equals those that come after it."""
        for sums in self.layers.values():
            sums.inputs.copy_(sums.inputs.float())


def _add_moments(sums: Tensor, rows: Tensor, weight: float) -> None:
    """Adds ``x xᵀ`` of all rows ``(groups, n, d)`` to ``(groups, d, d)``."""
    if len(rows) == 1:
        add_gram(sums[0], rows[0].mT, weight)
    else:
        sums.add_((rows.mT @ rows).to(sums.dtype), alpha=weight)


def level_of(moment: Tensor) -> Tensor:
    """The identity, times the mean of a moment's diagonal, ``(groups, d, d)``."""
    level = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[:, None, None]
    return level * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
