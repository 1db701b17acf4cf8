"""The norm in which errors of layers count: `Norm`."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..core.plan import Op
from ..decompose import to_forward_layout
from ..decompose.columns import Kept, columns_of, keep
from ..forms.weighted import WeightedLayer
from .replaceable import ReplaceableLayers
from .statistics import LayerStatistics, Statistics, level_of


@dataclass(frozen=True)
class Norm:
    """Layers that may change with what calibration inputs say of them; by their weights alone where that is None."""

    replaceable: ReplaceableLayers
    statistics: Statistics | None

    def sums(self, path: str) -> LayerStatistics:
        """The statistics of a layer or region."""
        assert self.statistics is not None
        return self.statistics.layers[path]

    def moment(self, path: str, fitted: bool = True) -> tuple[Tensor | None, bool]:
        """The second moment of what a layer reads, ``None`` where it was too large, and whether the mean is taken off.

        It is where a fit will make up for it.
        """
        layers, sums = self.replaceable, self.sums(path)
        made_up = layers.specs[path].bias or (path not in layers.repeated and path in layers.off_mean)
        centred = fitted and layers.budget.refit != "none" and path not in layers.functions and made_up
        inputs = sums.input_moment(centred=centred)
        return None if inputs is None else _shrunk(inputs, sums.rows), centred

    def mean(self, path: str) -> Tensor | None:
        """The mean of what a layer reads, ``(patch,)``, where it is taken off, since a shift makes up for it."""
        if self.statistics is None or not self.moment(path)[1]:
            return None
        sums = self.sums(path)
        return sums.means[0] / max(sums.weight, 1e-300)

    def weighted(self, path: str, weight: Tensor, fitted: bool = True) -> WeightedLayer:
        """A layer's kernel in the norm of its statistics, off the mean where a fit will make up for it."""
        statistics = self.statistics
        spec, multiple = self.replaceable.specs[path], self.replaceable.budget.multiple
        if statistics is None:
            weighted = WeightedLayer(weight, spec, None, None, multiple=multiple)
        else:
            layer, positions = statistics.layers[path], statistics.positions(path)
            inputs, centred = self.moment(path, fitted)
            if inputs is None:  # too large to be kept: its mean square stands for it
                positions *= layer.level(centred)
            weighted = WeightedLayer(weight, spec, inputs, layer.gradient_moment(), positions, multiple)
        if statistics is None or statistics.kind != "loss":
            weighted.normalise(1.0)  # the relative squared error of each layer
        return weighted

    def kept(self, op: Op, path: str, weight: Tensor) -> Kept | None:
        """What becomes of the kernel of a layer whose inputs a ``narrow`` op takes; None where that is not known.

        Its outputs may have been narrowed by then.
        """
        spec = self.replaceable.specs.get(path)
        if spec is None or self.statistics is None or path not in self.statistics.layers:
            return None
        repeat = next(each.get("repeat", 1) for each in op.settings["readers"] if each["path"] == path)
        columns = columns_of(op.settings["keep"], repeat)
        moment, centred = self.moment(path)
        sums, taps = self.sums(path), prod(spec.kernel_size)
        mean = sums.means[0] / max(sums.weight, 1e-300)
        if spec.transposed:  # what holds for rows of inputs holds for each tap
            centred = False
            eye = torch.eye(taps, dtype=mean.dtype, device=mean.device)
            moment = None if moment is None else torch.kron(sums.inputs[0] / max(sums.weight, 1e-300), eye)[None]
        kernel = to_forward_layout(weight, 1, spec.transposed)
        return keep(kernel, columns, None if moment is None else moment[0], mean if centred else None)


def _shrunk(moment: Tensor, rows: float) -> Tensor:
    """A moment drawn to a multiple of the identity as far as the rows that it is of were few."""
    share = min(0.5, 0.02 * moment.shape[-1] / max(rows, 1)) + 1e-6
    return moment * (1 - share) + share * level_of(moment)
