"""What the channels between layers could be narrowed to: a ladder of widths for every unit, from one elimination sweep.

The readers of a unit lose ``positions · ½ · tr(G Δ C Δᵀ)``, as layers that are factorized do, where ``Δ`` is what the
other columns cannot make up for (`pwrewrite.decompose.columns`); nothing else changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Self

from torch import Tensor, nn

from ..core.plan import Op, Skip
from ..decompose.columns import Elimination, Kept, Reader, eliminate
from ..decompose.layout import from_forward_layout
from ..forms.form import ranks_to_try
from ..passes.base import spec_of, weight_of
from ..passes.channel_units import Unit
from ..passes.narrow import Narrow, Sizes, made_shares, narrow_op, plain_readers
from .groups import Candidate, MeasuredGroup
from .latency import LatencyTable, Variant
from .norm import Norm
from .running import Say, holding

_LEAST = 8
"""At least one channel in so many stays."""
_WIDTHS = 16
"""About how many widths are looked at."""


@dataclass
class UnitCandidates(MeasuredGroup):
    """A unit and its widths."""

    unit: Unit
    action = Narrow.name

    @property
    def path(self) -> str:
        """That of the first layer that makes its channels."""
        return self.unit.producers[0].path

    @classmethod
    def all_of(cls, norm: Norm, say: Say) -> tuple[list[Self], list[Skip]]:
        """Without statistics losses are in the norm of what the units' norms say.

        There what factors lose is how far weights move, layer by layer; so what goes of the layers before counts, too.
        """
        replaceable, units = norm.replaceable, list[Self]()
        most = replaceable.budget.max_layer_error
        for i, unit in enumerate(replaceable.units):
            say(f"looking at the channels of {unit.producers[0].path}", i / len(replaceable.units))
            widths = [w for w in ranks_to_try(unit.channels, replaceable.budget.multiple, _WIDTHS) if w < unit.channels]
            widths = [w for w in widths if w * _LEAST >= unit.channels]
            swept = _swept(norm, unit, widths[0]) if widths else None
            if swept is None:
                continue
            found, scale = swept
            claims, params = frozenset(layer.path for layer in unit.layers), sum(layer.params for layer in unit.layers)
            before = {
                "params": float(params + unit.norm_params * unit.channels),
                "macs": float(sum(layer.macs for layer in unit.layers)),
                "bytes": _bytes(unit, Sizes(), unit.channels),
            }
            candidates = [Candidate(0.0, before)]
            shares = made_shares(replaceable.graph, unit) if norm.statistics is None else None
            for width in widths:
                loss = found.loss(width)
                error = (loss / scale) ** 0.5 if scale > 0 else 0.0
                if shares is not None:
                    loss += float(shares.sum() - shares[list(found.kept(width))].sum())
                if most is not None and error > most:
                    continue
                sizes = Sizes()
                op = narrow_op(unit, found.kept(width), Narrow.name, sizes)
                assert op.estimate is not None
                costs = {"params": float(op.estimate.params_after), "macs": float(op.estimate.macs_after)}
                costs["bytes"] = _bytes(unit, sizes, width)
                candidates.append(Candidate(loss, costs, claims, op, error))
            units.append(cls(candidates, unit))
        return units, []

    @classmethod
    def factors(cls, norm: Norm, op: Op, weight: Tensor) -> Kept | None:
        """What becomes of the kernel of the reader at the op's path."""
        return norm.kept(op, op.path, weight)

    def changed(self, op: Op) -> Collection[str]:
        """The readers, and what puts their means right."""
        paths = ((reader.layer.path, reader.norm) for reader in self.unit.readers)
        return [path for both in paths for path in both if path]

    @contextmanager
    def trial(self, model: nn.Module, norm: Norm, op: Op) -> Iterator[None]:
        """The readers' weights are such that they read some channels only."""
        with ExitStack() as stack:
            for reader in self.unit.readers:
                path, weight = reader.layer.path, weight_of(reader.layer, norm.replaceable.owners)
                assert weight is not None
                kept = norm.kept(op, path, weight.detach())
                if kept is None:
                    continue
                module, spec = model.get_submodule(path), norm.replaceable.specs[path]
                whole = from_forward_layout(kept.reconstruct(), 1, spec.transposed).reshape(weight.shape)
                stack.enter_context(holding(weight, whole))
                if isinstance(bias := getattr(module, "bias", None), Tensor):
                    stack.enter_context(holding(bias, bias.detach() + kept.shift.to(bias)))
                elif reader.norm:
                    mean = model.get_submodule(reader.norm).running_mean
                    assert isinstance(mean, Tensor)
                    stack.enter_context(holding(mean, mean - kept.shift.to(mean)))
            yield

    def _times(self, ops: Sequence[Op], table: LatencyTable) -> tuple[dict[str, float], list[float]]:
        before = _seconds(self.unit, self.unit.channels, table)
        return before, [sum(_seconds(self.unit, len(op.settings["keep"]), table).values()) for op in ops]


def _swept(norm: Norm, unit: Unit, least: int) -> tuple[Elimination, float] | None:
    """In which order a unit's channels go until so many stay, and the loss without any; None without weights."""
    if norm.statistics is None:
        readers = plain_readers(norm.replaceable.graph, unit)
        return None if readers is None else (eliminate(readers, unit.channels, least), _scale(readers))

    def work_out() -> list[Sequence[float]]:
        readers = _readers(norm, unit)
        found = eliminate(readers, unit.channels, least)
        return [(_scale(readers), *found.order), found.losses]

    what = [Narrow.name, [layer.path for layer in unit.layers], unit.channels, least]
    (scale, *order), losses = norm.once(what, (2, unit.channels - least + 1), work_out).tolist()
    if not {*order} <= {*range(unit.channels)} or len({*order}) < len(order):  # of a damaged file
        (scale, *order), losses = work_out()
    return Elimination(unit.channels, tuple(map(int, order)), tuple(losses)), scale


def _scale(readers: Sequence[Reader]) -> float:
    return sum(reader.scale for reader in readers)


def _readers(norm: Norm, unit: Unit) -> list[Reader]:
    """The readers of a unit in the norm of their statistics."""
    graph, statistics = norm.replaceable.graph, norm.statistics
    assert statistics is not None
    readers = []
    for each in unit.readers:
        path, weight = each.layer.path, weight_of(each.layer, graph.owners)
        assert weight is not None
        weighted = norm.weighted(path, weight)
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


def _seconds(unit: Unit, width: int, table: LatencyTable) -> dict[str, float]:
    """How long each layer of a unit takes with so many channels."""
    times = dict[str, float]()
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
        (times[layer.path],) = table.times(shape, [Variant(spec)])
    return times


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
