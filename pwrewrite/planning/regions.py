"""What modules could be replaced by as a whole: a 1×1 map, or nothing, with what that costs and loses.

A region loses ``positions · ½ · tr(G R)``, as layers that are factorized do, where ``R`` is the second moment of what
the map misses (`pwrewrite.decompose.nearest_map`), of the output less the input where it is dropped, and ``G`` that of
the gradients at its output. That is much too little where a whole module did much, so what is chosen is measured
(`pwrewrite.planning.measuring`).

A region is a group of its own beside its layers, and claims all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod

from torch import Tensor

from ..decompose.nearest_map import NearestMap, nearest_map
from ..passes.base import spec_of
from ..passes.regions import Region
from .candidates import FASTER, Candidate, Prices, ReplaceableLayers
from .latency import LatencyTable, Variant
from .running import Say
from .statistics import LayerStatistics, Statistics


@dataclass
class RegionCandidates:
    """A region and its candidates, of which the first keeps it; costs are those of all that is in it."""

    region: Region
    candidates: list[Candidate]
    prices: Prices = field(default_factory=Prices)

    @property
    def path(self) -> str:
        """The module's."""
        return self.region.path


def region_candidates(
    replaceable: ReplaceableLayers, statistics: Statistics | None, say: Say
) -> list[RegionCandidates]:
    """The candidates of every region; without calibration inputs there are none."""
    found = list[RegionCandidates]()
    if statistics is None:
        return found
    for i, region in enumerate(replaceable.regions):
        say(f"looking at {region.path} as a whole", i / len(replaceable.regions))
        sums, claims = statistics.layers[region.path], frozenset(layer.path for layer in region.layers)
        before = {"params": float(region.params), "macs": float(region.macs), "bytes": float(region.moved)}
        candidates = [Candidate(0.0, before)]
        for drop, loss, error in _losses(region, sums, statistics):
            most = replaceable.budget.max_layer_error
            if most is not None and (error is None or error > most):
                continue
            op = region.op(drop=drop)
            assert op.estimate is not None
            costs = {"params": float(op.estimate.params_after), "macs": float(op.estimate.macs_after)}
            costs["bytes"] = 0.0 if drop else float(_moved(region))
            candidates.append(Candidate(loss, costs, claims, op, error or 0.0))
        if len(candidates) > 1:
            found.append(RegionCandidates(region, candidates))
    return found


def _losses(
    region: Region, sums: LayerStatistics, statistics: Statistics
) -> Iterator[tuple[bool, float, float | None]]:
    """For each thing that could stand for a region whether it drops it, its loss, its relative error where known."""
    if sums.rows < 2 * sums.means.shape[1]:  # any map would do
        return
    loss, outputs = statistics.kind == "loss", region.spec.out_channels
    gradients = sums.gradient_moment()
    if loss and gradients is None:
        return
    positions = sums.weight / max(statistics.samples, 1) / 2
    moment, centred = sums.input_moment(), sums.input_moment(centred=True)
    assert moment is not None
    assert centred is not None

    def weighed(square: Tensor) -> float:
        if not loss or gradients is None:
            return max(float(square.diagonal().sum()), 0.0)
        return max(float((gradients[0] * square.mT).sum()), 0.0) * positions

    whole = weighed(centred[0][-outputs:, -outputs:]) if region.mappable else None  # else only differences were seen
    if region.mappable:
        yield False, *_scaled(weighed(map_of(region, sums).missed) * _optimism(sums), whole, loss)
    if region.droppable and (loss or whole is not None):
        missed = _of_difference(moment[0], outputs) if region.mappable else moment[0]
        yield True, *_scaled(weighed(missed), whole, loss)


def _of_difference(joint: Tensor, outputs: int) -> Tensor:
    """The moment of outputs less as many inputs, from that of both side by side, inputs first."""
    rows = joint[outputs:] - joint[:outputs]
    return rows[:, outputs:] - rows[:, :outputs]


def _scaled(missed: float, whole: float | None, loss: bool) -> tuple[float, float | None]:
    """What is lost, as a loss or else as a share of all, and as a relative error where that is known."""
    share = missed / whole if whole else 0.0
    return missed if loss else share, None if whole is None else share**0.5


def _optimism(sums: LayerStatistics) -> float:
    """By how much more a fitted map misses on inputs that it was not fitted on."""
    return 1 + 2 * sums.means.shape[1] / max(sums.rows, 1)


def map_of(region: Region, sums: LayerStatistics) -> NearestMap:
    """The map that is nearest to a region."""
    covariance = sums.input_moment(centred=True)
    assert covariance is not None
    ridge = 1e-6 + min(0.5, 0.02 * region.spec.in_channels / max(sums.rows, 1))
    mean = sums.means[0] / max(sums.weight, 1e-300)
    return nearest_map(covariance[0], mean, region.spec.in_channels, region.spec.dims, ridge)


def fitted_map(replaceable: ReplaceableLayers, path: str, statistics: Statistics) -> NearestMap | None:
    """The map for a region; None where it was not looked at."""
    region = next((region for region in replaceable.regions if region.path == path), None)
    if region is None or not region.mappable or not statistics.layers[path].rows:
        return None
    return map_of(region, statistics.layers[path])


def timed_region(found: RegionCandidates, table: LatencyTable) -> list[Candidate]:
    """A region's candidates with the measured latency of its layers, and of the map; without those not faster."""
    region, (keep, *others) = found.region, found.candidates
    before = sum(
        table.times(call.input_shape, [Variant(spec_of(layer))])[0] for layer in region.layers for call in layer.calls
    )
    timed = [replace(keep, costs={**keep.costs, "latency": before})]
    for candidate in others:
        assert candidate.op is not None
        seconds = 0.0
        if not candidate.op.settings["drop"]:
            (seconds,) = table.times(region.input_shape, [Variant(region.spec)])
        if seconds < FASTER * before:
            timed.append(replace(candidate, costs={**candidate.costs, "latency": seconds}))
    return timed


def _moved(region: Region) -> int:
    """Bytes that the map reads and writes: activations and weights."""
    outputs = region.positions * region.spec.out_channels
    return (prod(region.input_shape) + outputs + region.spec.params) * region.itemsize
