"""What modules could be replaced by as a whole: a 1×1 map, or nothing, with what that costs and loses.

A region loses ``positions · ½ · tr(G R)``, as layers that are factorized do, where ``R`` is the second moment of what
the map misses (`pwrewrite.decompose.nearest_map`), of the output less the input where it is dropped, and ``G`` that of
the gradients at its output. That is much too little where a whole module did much, so what is chosen is measured
(`pwrewrite.planning.measuring`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Self

from torch import Tensor, nn
from torch.nn import functional

from ..core.convolution import ConvSpec
from ..core.nested import Args
from ..core.plan import Op, Skip, SkipReason
from ..decompose.nearest_map import NearestMap, nearest_map
from ..edit.actions.substitute import RANGES
from ..passes.base import spec_of
from ..passes.regions import NAME, Region
from .groups import Candidate, MeasuredGroup
from .latency import LatencyTable, Variant
from .norm import Norm
from .running import Say
from .statistics import LayerStatistics, Statistics

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass
class RegionCandidates(MeasuredGroup):
    """A region and what could stand for it."""

    region: Region
    action = NAME

    @property
    def path(self) -> str:
        """The module's."""
        return self.region.path

    @property
    def kept(self) -> None:
        """Its layers may change all the same, so nothing is said."""

    @classmethod
    def all_of(cls, norm: Norm, say: Say) -> tuple[list[Self], list[Skip]]:
        """Without calibration inputs there are none."""
        groups, skips, statistics = list[Self](), list[Skip](), norm.statistics
        for i, region in enumerate(regions := norm.replaceable.regions if statistics is not None else []):
            say(f"looking at {region.path} as a whole", i / len(regions))
            assert statistics is not None
            sums, claims = norm.sums(region.path), frozenset(layer.path for layer in region.layers)
            before = {"params": float(region.params), "macs": float(region.macs), "bytes": float(region.moved)}
            candidates, most = [Candidate(0.0, before)], norm.replaceable.budget.max_layer_error
            if why := _unknown(sums, statistics):
                detail = f"{region.path} stays whole: {why}"
                skips += [Skip(layer.path, SkipReason.NO_STATISTICS, detail) for layer in region.layers]
                continue
            for drop, loss, error in _losses(region, sums, statistics):
                if most is not None and (error is None or error > most):
                    continue
                op = region.op(drop=drop)
                assert op.estimate is not None
                costs = {"params": float(op.estimate.params_after), "macs": float(op.estimate.macs_after)}
                costs["bytes"] = 0.0 if drop else float(_moved(region))
                candidates.append(Candidate(loss, costs, claims, op, error or 0.0))
            if len(candidates) > 1:
                groups.append(cls(candidates, region))
        return groups, skips

    @classmethod
    def factors(cls, norm: Norm, op: Op, weight: Tensor) -> NearestMap | None:
        """The map for a region; None where it was not looked at."""
        region = next((region for region in norm.replaceable.regions if region.path == op.path), None)
        if region is None or not region.mappable or not norm.sums(op.path).rows:
            return None
        return _map_of(region, norm.sums(op.path))

    def changed(self, op: Op) -> Collection[str]:
        """The module."""
        return (op.path,)

    @contextmanager
    def trial(self, model: nn.Module, norm: Norm, op: Op) -> Iterator[None]:
        """The module gives what the map, or nothing, makes of its input."""
        region, reads = self.region, list[Tensor]()
        near = None if op.settings["drop"] else _map_of(region, norm.sums(op.path))
        module = model.get_submodule(op.path)

        def before(module: nn.Module, args: Args) -> None:
            reads.append(args[0].clone())

        def after(module: nn.Module, args: Args, output: Tensor) -> Tensor:
            mapped = _mapped(reads.pop(), region.spec, near)
            return mapped if near is None or region.activation is None else RANGES[region.activation]()(mapped)

        handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _few(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return candidates

    def _times(self, ops: Sequence[Op], table: LatencyTable) -> tuple[dict[str, float], list[float]]:
        before = dict.fromkeys((layer.path for layer in self.region.layers), 0.0)
        for layer in self.region.layers:
            for call in layer.calls:
                before[layer.path] += table.times(call.input_shape, [Variant(spec_of(layer))])[0]
        shape, variant = self.region.input_shape, [Variant(self.region.spec)]
        return before, [0.0 if op.settings["drop"] else table.times(shape, variant)[0] for op in ops]


def _unknown(sums: LayerStatistics, statistics: Statistics) -> str:
    """Why the calibration inputs do not say what a region loses; empty where they do."""
    least = 2 * sums.means.shape[1]
    if sums.rows < least:  # any map would do
        return f"the calibration inputs have {sums.rows} positions there, and {least} are needed; give more inputs"
    if statistics.kind == "loss" and sums.gradient_moment() is None:
        return "no gradient reaches its output"
    return ""


def _losses(
    region: Region, sums: LayerStatistics, statistics: Statistics
) -> Iterator[tuple[bool, float, float | None]]:
    """For each thing that could stand for a region whether it drops it, its loss, its relative error where known."""
    loss, outputs = statistics.kind == "loss", region.spec.out_channels
    gradients = sums.gradient_moment()
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
        yield False, *_scaled(weighed(_map_of(region, sums).missed) * _optimism(sums), whole, loss)
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


def _map_of(region: Region, sums: LayerStatistics) -> NearestMap:
    """The map that is nearest to a region."""
    covariance = sums.input_moment(centred=True)
    assert covariance is not None
    ridge = 1e-6 + min(0.5, 0.02 * region.spec.in_channels / max(sums.rows, 1))
    mean = sums.means[0] / max(sums.weight, 1e-300)
    return nearest_map(covariance[0], mean, region.spec.in_channels, region.spec.dims, ridge)


def _mapped(x: Tensor, spec: ConvSpec, near: NearestMap | None) -> Tensor:
    """What a map makes of a tensor; the tensor where there is none."""
    if near is None:
        return x
    weight, bias = (tensor.to(x) for tensor in (near.reconstruct(), near.bias))
    if not spec.dims:
        return functional.linear(x, weight, bias)
    convolution: Callable[..., Tensor] = _CONVOLUTIONS[spec.dims]
    return convolution(x, weight, bias, spec.stride)


def _moved(region: Region) -> int:
    """Bytes that the map reads and writes: activations and weights."""
    outputs = region.positions * region.spec.out_channels
    return (prod(region.input_shape) + outputs + region.spec.params) * region.itemsize
