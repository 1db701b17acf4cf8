"""The norm in which errors of layers count: `Norm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..core.plan import Op
from ..decompose import to_forward_layout
from ..decompose.columns import Kept, columns_of, keep
from ..forms.weighted import WeightedLayer
from .memory import Memory, Numbers
from .replaceable import ReplaceableLayers
from .statistics import LayerStatistics, Statistics


@dataclass(frozen=True)
class Norm:
    """Layers that may change with what calibration inputs say of them; by their weights alone where that is None."""

    replaceable: ReplaceableLayers
    statistics: Statistics | None
    memory: Memory

    def once(self, what: object, shape: Sequence[int], make: Callable[[], Numbers]) -> Tensor:
        """Numbers ``(*shape)`` that follow from layers, statistics and settings, worked out where they are not known.

        ``what``: what they are of, as JSON can hold it.
        """
        budget, facts = self.replaceable.budget, list[object]()
        if self.statistics is not None:
            sums = next(iter(self.statistics.layers.values()))
            facts = [self.statistics.kind, self.statistics.outcome, str(sums.inputs.dtype)]
        return self.memory.once([what, facts, budget.multiple, budget.refit], shape, make)

    def sums(self, path: str) -> LayerStatistics:
        """The statistics of a layer or region."""
        assert self.statistics is not None
        return self.statistics.layers[path]

    def centres(self, path: str) -> bool:
        """Whether a fit will make up for the mean of what a layer reads, which its moment is then taken about."""
        layers = self.replaceable
        made_up = layers.specs[path].bias or (path not in layers.repeated and path in layers.off_mean)
        return layers.budget.refit != "none" and path not in layers.functions and made_up

    def moment(self, path: str, centred: bool) -> Tensor | None:
        """The second moment of what a layer reads, about its mean where ``centred``; None where it was too large."""
        sums = self.sums(path)
        inputs = sums.input_moment(centred=centred)
        return None if inputs is None else _shrunk(inputs, sums.rows)

    def mean(self, path: str) -> Tensor | None:
        """The mean of what a layer reads, ``(patch,)``, where it is taken off, since a shift makes up for it."""
        if self.statistics is None or not self.centres(path):
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
            centred = fitted and self.centres(path)
            inputs = self.moment(path, centred)
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
        centred = self.centres(path) and not spec.transposed
        moment, sums = self.moment(path, centred), self.sums(path)
        mean = sums.means[0] / max(sums.weight, 1e-300)
        if spec.transposed and moment is not None:  # what holds for rows of inputs holds for each tap
            eye = torch.eye(prod(spec.kernel_size), dtype=mean.dtype, device=mean.device)
            moment = torch.kron(sums.inputs[0] / max(sums.weight, 1e-300), eye)[None]
        kernel = to_forward_layout(weight, 1, spec.transposed)
        return keep(kernel, columns, None if moment is None else moment[0], mean if centred else None)


def _shrunk(moment: Tensor, rows: float) -> Tensor:
    """A moment drawn, in place, to a multiple of the identity as far as the rows that it is of were few."""
    share = min(0.5, 0.02 * moment.shape[-1] / max(rows, 1)) + 1e-6
    level = moment.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp(min=1e-30)
    moment.mul_(1 - share).diagonal(dim1=-2, dim2=-1).add_(share * level)
    return moment
