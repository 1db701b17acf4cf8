"""What the channels between layers could be narrowed to: a ladder of widths for every unit, from one elimination sweep.

The readers of a unit lose ``positions · ½ · tr(G Δ C Δᵀ)``, as layers that are factorized do, where ``Δ`` is what the
other columns cannot make up for (`pwrewrite.decompose.columns`); nothing else changes. A unit is a group of its own
beside its layers, and each of its widths claims all of these.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

from ..decompose.columns import Reader, eliminate
from ..forms.form import ranks_to_try
from ..passes.base import spec_of, weight_of
from ..passes.channel_units import Unit
from ..passes.narrow import Narrow, Sizes, narrow_op, plain_readers
from ..passes.patterns import Graph
from .candidates import FASTER, Candidate, Prices, ReplaceableLayers, evenly
from .latency import LatencyTable, Variant
from .running import Say
from .statistics import Statistics

_LEAST = 8
"""At least one channel in so many stays."""
_WIDTHS = 16
"""About how many widths are looked at."""


@dataclass
class UnitCandidates:
    """A unit and its candidates, of which the first keeps it; costs are those of all its layers."""

    unit: Unit
    candidates: list[Candidate]
    prices: Prices = field(default_factory=Prices)

    @property
    def path(self) -> str:
        """That of the first layer that makes its channels."""
        return self.unit.producers[0].path


def unit_candidates(replaceable: ReplaceableLayers, statistics: Statistics | None, say: Say) -> list[UnitCandidates]:
    """The candidates of every unit; without statistics in the norm of what its norms say."""
    graph, units, most = replaceable.graph, list[UnitCandidates](), replaceable.budget.max_layer_error
    for i, unit in enumerate(replaceable.units):
        say(f"looking at the channels of {unit.producers[0].path}", i / len(replaceable.units))
        widths = [w for w in ranks_to_try(unit.channels, replaceable.budget.multiple, _WIDTHS) if w < unit.channels]
        widths = [w for w in widths if w * _LEAST >= unit.channels]
        readers = _readers(replaceable, graph, unit, statistics)
        if not widths or readers is None:
            continue
        found, scale = eliminate(readers, unit.channels, widths[0]), sum(reader.scale for reader in readers)
        claims, params = frozenset(layer.path for layer in unit.layers), sum(layer.params for layer in unit.layers)
        before = {
            "params": float(params + unit.norm_params * unit.channels),
            "macs": float(sum(layer.macs for layer in unit.layers)),
            "bytes": _bytes(unit, Sizes(), unit.channels),
        }
        candidates = [Candidate(0.0, before)]
        for width in widths:
            loss = found.loss(width)
            error = (loss / scale) ** 0.5 if scale > 0 else 0.0
            if most is not None and error > most:
                continue
            sizes = Sizes()
            op = narrow_op(unit, found.kept(width), Narrow.name, sizes)
            assert op.estimate is not None
            costs = {"params": float(op.estimate.params_after), "macs": float(op.estimate.macs_after)}
            costs["bytes"] = _bytes(unit, sizes, width)
            candidates.append(Candidate(loss, costs, claims, op, error))
        units.append(UnitCandidates(unit, candidates))
    return units


def _readers(
    replaceable: ReplaceableLayers, graph: Graph, unit: Unit, statistics: Statistics | None
) -> list[Reader] | None:
    """The readers of a unit in the norm of their statistics."""
    if statistics is None:
        return plain_readers(graph, unit)
    readers = []
    for each in unit.readers:
        path, weight = each.layer.path, weight_of(each.layer, graph.owners)
        assert weight is not None
        weighted = replaceable.weighted(path, weight, statistics)
        moment = None if weighted.inputs is None else weighted.inputs[0]
        factor = weighted.factor
        if moment is None:  # too large to be kept: its diagonal
            sums = statistics.layers[path]
            moment = sums.inputs[0] / max(sums.weight, 1e-300)
            factor = statistics.positions(path) / 2
        gradients = None if weighted.gradients is None else weighted.gradients[0]
        reader = Reader(weighted.rows[0], moment.to(weighted.rows), gradients, factor)
        if statistics.kind != "loss" and reader.scale > 0:
            reader = Reader(reader.rows, reader.moment, gradients, factor / reader.scale)
        readers.append(reader)
    return readers


def timed_unit(unit: UnitCandidates, table: LatencyTable) -> list[Candidate]:
    """A unit's candidates with the measured latency of its layers; without those that are not faster.

    A few are measured, evenly apart.
    """
    keep, *others = unit.candidates
    some = evenly(others)
    before = _seconds(unit.unit, unit.unit.channels, table)
    times = [_seconds(unit.unit, len(c.op.settings["keep"]), table) for c in some if c.op is not None]
    faster = [
        replace(c, costs={**c.costs, "latency": seconds})
        for c, seconds in zip(some, times)
        if seconds < FASTER * before
    ]
    return [replace(keep, costs={**keep.costs, "latency": before}), *faster]


def _seconds(unit: Unit, width: int, table: LatencyTable) -> float:
    """How long the layers of a unit take with so many channels."""
    total = 0.0
    makes = {layer.path for layer in (*unit.producers, *unit.depthwise)}
    repeats = {reader.layer.path: reader.repeat for reader in unit.readers} | {d.path: 1 for d in unit.depthwise}
    for layer in unit.layers:
        spec, (call,) = spec_of(layer), layer.calls
        shape, axis = list(call.input_shape), len(call.input_shape) - spec.dims - 1
        if layer.path in repeats:
            shape[axis] = width * repeats[layer.path]
            spec = replace(spec, in_channels=shape[axis])
        if layer.path in makes:
            spec = replace(spec, out_channels=width)
        if spec_of(layer).is_depthwise:
            spec = replace(spec, groups=width)
        (seconds,) = table.times(shape, [Variant(spec)])
        total += seconds
    return total


def _bytes(unit: Unit, sizes: Sizes, width: int) -> float:
    """Bytes that a unit's layers read and write with so many channels: activations and weights."""
    total, share = 0.0, width / unit.channels
    makes = {layer.path for layer in (*unit.producers, *unit.depthwise)}
    reads = {layer.path for layer in (*unit.depthwise, *(reader.layer for reader in unit.readers))}
    for layer in unit.layers:
        (call,) = layer.calls
        inputs = prod(call.input_shape) * (share if layer.path in reads else 1.0)
        outputs = prod(call.output_shape) * (share if layer.path in makes else 1.0)
        total += (inputs + outputs + sizes.of(layer)[0]) * layer.weight_bytes / max(layer.params, 1)
    return total
