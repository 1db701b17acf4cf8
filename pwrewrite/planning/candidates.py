"""What each layer could become: every form at a ladder of widths, with what it costs and what it loses.

A layer's calls count together. A candidate that saves neither parameters nor MACs is not one. The first candidate of
every layer is to keep it, at no loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod

import torch
from torch import Tensor

from ..capturing.code_trace import NotTraceable
from ..capturing.records import Capture, Layer
from ..core.convolution import ConvSpec
from ..core.errors import UsageError
from ..core.options import Budget
from ..core.plan import Op, Skip, SkipReason
from ..decompose import to_forward_layout
from ..decompose.columns import Kept, columns_of, keep
from ..edit.actions.evaluation import code_graph
from ..edit.graph_edit import FunctionalCall
from ..forms import FORMS
from ..forms.form import Axes, Form
from ..forms.specs import Chain, stage_output
from ..forms.weighted import WeightedLayer
from ..passes import FORM_PASSES, LayerPass, Narrow
from ..passes.base import chosen, estimate_chain, scope_of, spec_of, weight_of
from ..passes.channel_units import find_units
from ..passes.patterns import Graph
from ..passes.regions import NAME as SUBSTITUTE, Region, find_regions
from .allocate import Option
from .fitting import off_mean
from .latency import LatencyTable, Variant
from .running import Say
from .statistics import Between, Statistics, Watched, level_of

TIMED = 7
"""How many candidates of a form are measured."""

_TINY, _LEAST, _MOST = 1e-30, 0.1, 1e3
"""A loss that counts as none, and between what one that was measured may say of others, as a share of theirs."""

_ROOM, _NUMBER = 1 << 30, 8
"""Bytes for the moments of regions, and of a number in them."""

FASTER = 0.97
"""A candidate is faster than the layer below this share of its time."""


@dataclass(frozen=True, slots=True)
class Candidate(Option):
    """One thing that a layer could become, by which op (None to keep it), and the relative error of its weight."""

    op: Op | None = None
    error: float = 0.0


class Prices:
    """What was measured of the losses of a group's candidates, by their ops, and what it says of the others."""

    def __init__(self) -> None:
        self._predicted: dict[int, float] = {}
        self._measured: dict[int, float] = {}

    def knows(self, candidate: Candidate) -> bool:
        """Whether a candidate's loss was measured."""
        return id(candidate.op) in self._measured

    def learn(self, candidate: Candidate, loss: float) -> None:
        """Takes note of a loss that was measured."""
        self._predicted.setdefault(id(candidate.op), candidate.loss)
        self._measured[id(candidate.op)] = loss

    def priced(self, candidate: Candidate) -> Candidate:
        """A candidate with the loss that was measured, else with as many times what was predicted as the nearest."""
        if candidate.op is None or not self._measured:
            return candidate
        key = id(candidate.op)
        predicted = self._predicted.setdefault(key, candidate.loss)
        if key not in self._measured:
            near = min(self._measured, key=lambda other: abs(_log(self._predicted[other]) - _log(predicted)))
            ratio = self._measured[near] / max(self._predicted[near], _TINY)
            return replace(candidate, loss=predicted * min(max(ratio, _LEAST), _MOST))
        return replace(candidate, loss=self._measured[key])


@dataclass
class LayerCandidates:
    """A layer and its candidates, of which the first keeps it."""

    layer: Layer
    spec: ConvSpec
    candidates: list[Candidate]

    @property
    def path(self) -> str:
        """The layer's."""
        return self.layer.path


def _forms_named(names: Sequence[str]) -> tuple[str, ...]:
    """Forms from their names, or from a name for several."""
    one_by_one = tuple(name for name, form in FORMS.items() if form.pointwise)
    every = (*FORMS, Narrow.name, SUBSTITUTE)
    known = {"all": every, "1x1": one_by_one} | {name: (name,) for name in every}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no form {name!r}", expected=f"some of {', '.join(known)}", got=name)
    return tuple(dict.fromkeys(form for name in names for form in known[name]))


class ReplaceableLayers:
    """The ``layers`` that a budget lets be replaced, with the pass for each form, and the ``skips`` of all others.

    ``units`` are those that it lets be narrowed, and ``regions`` those that something else may stand for as a whole, of
    which it includes all layers; ``graph`` is the captured graph.
    """

    def __init__(self, capture: Capture, budget: Budget) -> None:
        self.capture, self.budget, self.graph = capture, budget, Graph(capture)
        self.owners = self.graph.owners
        self.layers: list[tuple[Layer, dict[str, LayerPass]]] = []
        self.skips: list[Skip] = []
        forms = _forms_named(budget.forms)
        kinds = [kind for form in forms if form in FORMS for kind in FORM_PASSES[form]]
        passes = [kind(replan=budget.replan, min_gain=0.0) for kind in kinds]
        chosen_layers = chosen(capture, budget.include, budget.exclude)
        units, refused = find_units(capture, self.graph) if Narrow.name in forms else ([], [])
        self.units = [unit for unit in units if all(id(layer) in chosen_layers for layer in unit.layers)]
        seen = SUBSTITUTE in forms and budget.sensitivity != "weights"  # by the weights alone nothing is known of them
        own = {layer.path for layer in capture.layers}
        self.regions = _that_fit(
            [
                region
                for region in (find_regions(capture, self.graph) if seen else ())
                if region.path not in own and all(id(layer) in chosen_layers for layer in region.layers)
            ]
        )
        narrowed = {layer.path for unit in self.units for layer in unit.layers}
        substituted = {layer.path for region in self.regions for layer in region.layers}
        why = {skip.path: skip for skip in refused}
        for layer in capture.layers:
            if id(layer) not in chosen_layers:
                self.skips.append(Skip(layer.path, SkipReason.EXCLUDED, "left out by include or exclude"))
                continue
            answers = {each: each.refusal(capture, layer, self.owners) for each in passes if each.concerns(layer)}
            applying = {each.form.name: each for each, refusal in answers.items() if refusal is None}
            refusals = [refusal for refusal in answers.values() if refusal is not None]
            if layer.functional and applying and (in_code := _refused_in_code(capture, layer)) is not None:
                refusals, applying = [in_code], {}
            if applying:
                self.layers.append((layer, applying))
            elif layer.path in narrowed or layer.path in substituted:
                continue
            elif refusals:
                mild = (SkipReason.WRONG_FORM, SkipReason.POINTWISE)
                self.skips.append(next((r for r in refusals if r.reason not in mild), refusals[0]))
            else:
                plain = Skip(layer.path, SkipReason.WRONG_FORM, "none of the forms is for a linear map")
                self.skips.append(why.get(layer.path, plain))

    @cached_property
    def specs(self) -> dict[str, ConvSpec]:
        """Path to shape facts, of the layers that may be replaced and of those whose inputs may be narrowed."""
        readers = {reader.layer.path: spec_of(reader.layer) for unit in self.units for reader in unit.readers}
        return {layer.path: spec_of(layer) for layer, _ in self.layers} | readers

    @cached_property
    def watched(self) -> Watched:
        """Path to what is watched on calibration inputs: of the same, and of the regions from end to end."""
        regions = {region.path: Between(region.spec, region.mappable) for region in self.regions}
        return {**self.specs, **regions}

    @cached_property
    def functions(self) -> dict[str, str]:
        """Path to the name of the weight, of layers that are called as functions."""
        return {layer.path: layer.weight for layer, _ in self.layers if layer.functional}

    @cached_property
    def repeated(self) -> set[str]:
        """Paths of modules that are called several times."""
        return {layer.path for layer, _ in self.layers if len(layer.calls) > 1 and not layer.functional}

    @cached_property
    def _off_mean(self) -> set[str]:
        return off_mean(self.capture)

    def moment(self, path: str, statistics: Statistics, fitted: bool = True) -> tuple[Tensor | None, bool]:
        """The second moment of what a layer reads, ``None`` where it was too large, and whether the mean is taken off.

        It is where a fit will make up for it.
        """
        spec, layer = self.specs[path], statistics.layers[path]
        made_up = spec.bias or (path not in self.repeated and path in self._off_mean)
        centred = fitted and self.budget.refit != "none" and path not in self.functions and made_up
        inputs = layer.input_moment(centred=centred)
        return None if inputs is None else _shrunk(inputs, layer.rows), centred

    def weighted(self, path: str, weight: Tensor, statistics: Statistics | None, fitted: bool = True) -> WeightedLayer:
        """A layer's kernel in the norm of its statistics, off the mean where a fit will make up for it."""
        spec, multiple = self.specs[path], self.budget.multiple
        if statistics is None:
            weighted = WeightedLayer(weight, spec, None, None, multiple=multiple)
        else:
            layer, positions = statistics.layers[path], statistics.positions(path)
            inputs, centred = self.moment(path, statistics, fitted)
            if inputs is None:  # too large to be kept: its mean square stands for it
                positions *= layer.level(centred)
            weighted = WeightedLayer(weight, spec, inputs, layer.gradient_moment(), positions, multiple)
        if statistics is None or statistics.kind != "loss":
            weighted.normalise(1.0)  # the relative squared error of each layer
        return weighted

    def kept(self, op: Op, path: str, weight: Tensor, statistics: Statistics) -> Kept | None:
        """What becomes of the kernel of a layer whose inputs a ``narrow`` op takes; None where that is not known.

        Its outputs may have been narrowed by then.
        """
        spec = self.specs.get(path)
        if spec is None or path not in statistics.layers:
            return None
        repeat = next(each.get("repeat", 1) for each in op.settings["readers"] if each["path"] == path)
        columns = columns_of(op.settings["keep"], repeat)
        moment, centred = self.moment(path, statistics)
        sums, taps = statistics.layers[path], prod(spec.kernel_size)
        mean = sums.means[0] / max(sums.weight, 1e-300)
        if spec.transposed:  # what holds for rows of inputs holds for each tap
            centred = False
            eye = torch.eye(taps, dtype=mean.dtype, device=mean.device)
            moment = None if moment is None else torch.kron(sums.inputs[0] / max(sums.weight, 1e-300), eye)[None]
        kernel = to_forward_layout(weight, 1, spec.transposed)
        return keep(kernel, columns, None if moment is None else moment[0], mean if centred else None)


def _that_fit(regions: Sequence[Region]) -> list[Region]:
    """Those regions with the most MACs whose statistics fit into `_ROOM`, in their order."""
    left, fitting = _ROOM, set[str]()
    for region in sorted(regions, key=lambda region: -region.macs):
        size = _NUMBER * Between(region.spec, region.mappable).size ** 2
        if size <= left:
            left -= size
            fitting.add(region.path)
    return [region for region in regions if region.path in fitting]


def _refused_in_code(capture: Capture, layer: Layer) -> Skip | None:
    """Why a layer that is called as a function must stay; None where its call can be replaced in the code."""
    scope = scope_of(capture, layer)
    prefix = f"{scope}." if scope else ""
    if not layer.weight.startswith(prefix):
        return Skip(layer.path, SkipReason.NOT_TRACED, f"{layer.weight} lies outside {scope}, whose code reads it")
    try:
        FunctionalCall(code_graph(capture.model.get_submodule(scope)), layer.weight.removeprefix(prefix))
    except NotTraceable as failure:
        return Skip(layer.path, SkipReason.NOT_TRACED, str(failure))
    return None


def make_candidates(replaceable: ReplaceableLayers, statistics: Statistics | None, say: Say) -> list[LayerCandidates]:
    """The candidates of every layer that may be replaced; without statistics in the weights' own norm."""
    layers, most = [], replaceable.budget.max_layer_error
    for i, (layer, passes) in enumerate(replaceable.layers):
        say(f"looking at {layer.path}", i / len(replaceable.layers))
        weight = weight_of(layer, replaceable.owners)
        assert weight is not None
        spec, scope = spec_of(layer), scope_of(replaceable.capture, layer)
        weighted = replaceable.weighted(layer.path, weight, statistics)
        costs = {"params": float(layer.params), "macs": float(layer.macs), "bytes": _bytes(layer, [("", spec)])}
        candidates, claims = [Candidate(0.0, costs)], frozenset((layer.path,))
        for proposer in passes.values():
            form = proposer.form
            for predicted in form.losses(weighted, partial(_saves, layer, spec, form)):
                if most is not None and predicted.error > most:
                    continue
                op = proposer.op(layer, spec, predicted.widths, axes=predicted.axes, scope=scope)
                if isinstance(op, Op) and (cost := op.estimate) is not None:
                    nbytes = _bytes(layer, form.stages(spec, predicted.widths, predicted.axes))
                    after = {"params": float(cost.params_after), "macs": float(cost.macs_after), "bytes": nbytes}
                    candidates.append(Candidate(predicted.loss, after, claims, op, predicted.error))
        layers.append(LayerCandidates(layer, spec, candidates))
    return layers


def _log(loss: float) -> float:
    return math.log(max(loss, _TINY))


def _shrunk(moment: Tensor, rows: float) -> Tensor:
    """A moment drawn to a multiple of the identity as far as the rows that it is of were few."""
    share = min(0.5, 0.02 * moment.shape[-1] / max(rows, 1)) + 1e-6
    return moment * (1 - share) + share * level_of(moment)


def timed(layer: LayerCandidates, table: LatencyTable) -> list[Candidate]:
    """A layer's candidates with their measured latency, over all its calls; without those that are not faster.

    Of each form a few are measured: the best ones at falling MACs.

    Args:
        layer: The layer.
        table: Measures.
    """
    some = _few(layer.candidates[1:])
    variants = [Variant(layer.spec), *(_variant(layer.spec, c.op) for c in some if c.op is not None)]
    total = [0.0] * len(variants)
    for call in layer.layer.calls:
        total = [a + b for a, b in zip(total, table.times(call.input_shape, variants))]
    keep = replace(layer.candidates[0], costs={**layer.candidates[0].costs, "latency": total[0]})
    faster = [
        replace(c, costs={**c.costs, "latency": seconds})
        for c, seconds in zip(some, total[1:])
        if seconds < FASTER * total[0]
    ]
    return [keep, *faster]


def _few(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of each form the candidates that no other one of it beats in MACs and loss, thinned evenly."""
    by_form: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in candidates:
        assert candidate.op is not None
        settings = candidate.op.settings
        by_form.setdefault((settings["form"], str(settings.get("axes"))), []).append(candidate)
    selected: list[Candidate] = []
    for group in by_form.values():
        front: list[Candidate] = []
        for candidate in sorted(group, key=lambda c: (c.costs["macs"], c.loss)):
            if not front or candidate.loss < front[-1].loss:
                front.append(candidate)
        selected += evenly(front)
    return selected


def evenly(candidates: Sequence[Candidate]) -> list[Candidate]:
    """`TIMED` of them at most, evenly apart, the first and the last among them."""
    last = len(candidates) - 1
    return [candidates[i] for i in sorted({round(last * n / (TIMED - 1)) for n in range(TIMED)})] if candidates else []


def _variant(spec: ConvSpec, op: Op) -> Variant:
    axes = op.settings.get("axes")
    widths = tuple(sorted(op.settings["widths"].items()))
    return Variant(spec, op.settings["form"], widths, None if axes is None else tuple(axes))


def _bytes(layer: Layer, chain: Chain) -> float:
    """Bytes that a chain reads and writes in all calls: activations and weights of every stage."""
    total, size = 0, layer.weight_bytes / max(layer.params, 1)
    for call in layer.calls:
        shape = call.input_shape
        for _, spec in chain:
            after = stage_output(spec, shape, call.output_shape)
            total += prod(shape) + prod(after) + spec.params
            shape = after
    return total * size


def _saves(layer: Layer, spec: ConvSpec, form: Form, widths: Mapping[str, int], axes: Axes) -> bool:
    estimate = estimate_chain(layer, spec, form, widths, axes)
    return estimate.macs_after < estimate.macs_before and estimate.params_after < estimate.params_before
