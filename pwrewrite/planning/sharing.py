"""What layers that read the same map could share: a ladder of widths of one reduction, for every map that several read.

The readers lose ``positions · ½ · tr(G Δ C Δᵀ)`` each, as layers that are factorized do, with the reduction that is
best for all of them together and the core of each that is best behind it (`pwrewrite.forms.shared`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.plan import Op, Skip
from ..forms.expand import FORM as EXPAND
from ..forms.form import ranks_to_try
from ..forms.shared import SharedCuts, SharedFactors
from ..forms.specs import moved
from ..forms.weighted import WeightedLayer
from ..passes.base import grows, spec_of, weight_of
from ..passes.shared_maps import NAME, SharedMap
from .groups import Candidate, JointGroup, evenly, front
from .latency import LatencyTable, Variant
from .norm import Norm
from .running import Say

_WIDTHS = 16
"""About how many widths are looked at."""
_CHOICES = 8
"""How many choices of widths behind the cores are looked at, for every width of the reduction."""


@dataclass
class SharedCandidates(JointGroup):
    """A map that several layers read, and the widths of a reduction of it."""

    shared: SharedMap
    action = NAME

    @property
    def path(self) -> str:
        """That of the first reader."""
        return self.shared.path

    @classmethod
    def all_of(cls, norm: Norm, say: Say) -> tuple[list[Self], list[Skip]]:
        """Without statistics losses are in the norm of the weights."""
        groups, maps = list[Self](), norm.replaceable.maps
        most = norm.replaceable.budget.max_layer_error
        for i, shared in enumerate(maps):
            say(f"looking at what {shared.path} and others read", i / len(maps))
            multiple = norm.replaceable.budget.multiple
            ladder = ranks_to_try(shared.full, multiple, _WIDTHS)
            claims, candidates = frozenset(layer.path for layer in shared.layers), [Candidate(0.0, _costs(shared))]
            every, scale = _curves(norm, shared, ladder)
            for rank, curves in zip(ladder, every):
                for widths in _width_choices(shared, rank, curves, multiple):
                    if grows(shared.estimate(rank, widths)):
                        continue
                    losses = [float(curve[-1 if w is None else w]) for curve, w in zip(curves, widths)]
                    error = (sum(losses) / scale) ** 0.5 if scale > 0 else 0.0
                    if most is None or error <= most:
                        op, costs = shared.op(rank, widths), _costs(shared, rank, widths)
                        candidates.append(Candidate(sum(losses), costs, claims, op, error))
            if len(candidates) > 1:
                groups.append(cls(candidates, shared))
        return groups, []

    @classmethod
    def factors(cls, norm: Norm, op: Op, weight: Tensor) -> SharedFactors | None:
        """The reduction and its readers' cores."""
        readers = [each["path"] for each in op.settings["readers"]]
        if not norm.replaceable.specs.keys() >= set(readers):
            return None
        layers = _weighted(norm, readers)
        widths, shifts = [each.get("width") for each in op.settings["readers"]], list[Tensor | None]()
        factors = SharedCuts(layers).factors(op.settings["rank"], widths)
        for path, layer, kernel in zip(readers, layers, factors.kernels()):
            delta = (layer.kernel - kernel).reshape(layer.rows.shape)[0]
            mean = norm.mean(path)
            shifts.append(None if mean is None else delta @ mean.to(delta))
        return replace(factors, shifts=tuple(shifts))

    def _few(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return evenly(front(candidates))

    def _times(self, ops: Sequence[Op], table: LatencyTable) -> tuple[dict[str, float], list[float]]:
        before = {}
        for layer in self.shared.layers:
            (before[layer.path],) = table.times(layer.calls[0].input_shape, [Variant(spec_of(layer))])
        return before, [self._seconds(op, table) for op in ops]

    def _seconds(self, op: Op, table: LatencyTable) -> float:
        shared, rank = self.shared, op.settings["rank"]
        (total,) = table.times(shared.shape, [Variant(shared.reduce_spec(rank))])
        for layer, reader in zip(shared.layers, op.settings["readers"]):
            variant = Variant(replace(spec_of(layer), in_channels=rank))
            if "width" in reader:
                variant = replace(variant, form=EXPAND.name, widths=((EXPAND.widths[0], reader["width"]),))
            total += table.times(shared.reduced(rank), [variant])[0]
        return total


def _width_choices(
    shared: SharedMap, rank: int, curves: Sequence[Tensor], multiple: int | None
) -> list[tuple[int | None, ...]]:
    """Widths behind the cores of all readers that lose least for what they cost together, the dearest first.

    Each reader's lie on the convex hull of losses over MACs, from a core alone; all go down by the cheapest step.
    """
    widths = list[int | None]([None] * len(curves))
    steps = list[tuple[float, int, int]]()
    for i, curve in enumerate(curves):
        spec = shared.core(i, rank)[0][1]
        limit = EXPAND.limits(spec)[EXPAND.widths[0]]
        (_, most), place = shared.cost(i, rank), (0.0, float(curve[-1]))
        points = [
            (most - shared.cost(i, rank, w)[1], float(curve[w]), w) for w in ranks_to_try(limit, multiple, _WIDTHS)
        ]
        points = [point for point in points if point[0] > 0]
        while points:
            slope, saved, loss, width = min(((y - place[1]) / (x - place[0]), -x, y, w) for x, y, w in points)
            steps.append((slope, i, width))
            place = -saved, loss
            points = [point for point in points if point[0] > place[0]]
    choices = [tuple(widths)]
    for _, i, width in sorted(steps, key=lambda step: step[0]):
        widths[i] = width
        choices.append(tuple(widths))
    places = {round((len(choices) - 1) * n / (_CHOICES - 1)) for n in range(_CHOICES)}
    return [choices[place] for place in sorted(places)]


def _curves(norm: Norm, shared: SharedMap, ladder: Sequence[int]) -> tuple[list[list[Tensor]], float]:
    """What each reader of a map loses at ranks and widths (`SharedCuts.losses`), and all of them without a kernel."""
    paths, sizes = [layer.path for layer in shared.layers], [spec_of(y).out_channels + 1 for y in shared.layers]

    def work_out() -> Tensor:
        layers = _weighted(norm, paths)
        scale, curves = sum(layer.scale for layer in layers), SharedCuts(layers).losses(ladder)
        return torch.stack([F.pad(torch.cat(each), (1, 0), value=scale) for each in curves])

    rows = norm.once([NAME, paths, ladder], (len(ladder), 1 + sum(sizes)), work_out)
    return [list(row[1:].split(sizes)) for row in rows], float(rows[0, 0])


def _weighted(norm: Norm, readers: Sequence[str]) -> list[WeightedLayer]:
    """The readers in the norm of their statistics."""
    layers = {layer.path: layer for layer in norm.replaceable.capture.layers}
    weighted = []
    for path in readers:
        weight = weight_of(layers[path], norm.replaceable.owners)
        assert weight is not None
        weighted.append(norm.weighted(path, weight))
    return weighted


def _costs(shared: SharedMap, rank: int | None = None, widths: Sequence[int | None] = ()) -> dict[str, float]:
    """What the readers of a map cost with a reduction of some width, and as they are."""
    layers = shared.layers
    size = layers[0].weight_bytes / max(layers[0].params, 1)
    if rank is None:
        params, macs = (sum(getattr(layer, name) for layer in layers) for name in ("params", "macs"))
        numbers = sum(moved([("", spec_of(y))], shared.shape, y.calls[0].output_shape) for y in layers)
        return {"params": float(params), "macs": float(macs), "bytes": numbers * size}
    estimate = shared.estimate(rank, widths)
    numbers = moved([("", shared.reduce_spec(rank))], shared.shape, shared.shape)
    for i, (layer, width) in enumerate(zip(layers, widths)):
        numbers += moved(shared.core(i, rank, width), shared.reduced(rank), layer.calls[0].output_shape)
    return {"params": float(estimate.params_after), "macs": float(estimate.macs_after), "bytes": numbers * size}
