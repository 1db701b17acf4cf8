"""What each layer could become: every form at a ladder of widths, with what it costs and what it loses.

A layer's calls count together. A candidate that saves neither parameters nor MACs is not one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..capturing.records import Layer
from ..core.convolution import ConvSpec
from ..core.errors import RefusedError
from ..core.plan import Op
from ..forms.form import Axes, Form, FormLoss
from ..forms.specs import Chain, moved
from ..passes.base import LayerPass, estimate_chain, scope_of, spec_of, weight_of
from .groups import Candidate, Group, evenly, front
from .latency import LatencyTable, Variant
from .norm import Norm
from .running import Say


@dataclass
class LayerCandidates(Group):
    """A layer and what it could become."""

    layer: Layer
    spec: ConvSpec

    @property
    def path(self) -> str:
        """The layer's."""
        return self.layer.path

    def _few(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Of each form those that no other one of it beats in MACs and loss, thinned evenly."""
        by_form: dict[tuple[str, str], list[Candidate]] = {}
        for candidate in candidates:
            assert candidate.op is not None
            settings = candidate.op.settings
            by_form.setdefault((settings["form"], str(settings.get("axes"))), []).append(candidate)
        selected: list[Candidate] = []
        for group in by_form.values():
            selected += evenly(front(group))
        return selected

    def _times(self, ops: Sequence[Op], table: LatencyTable) -> tuple[dict[str, float], list[float]]:
        variants = [Variant(self.spec), *(_variant(self.spec, op) for op in ops)]
        total = [0.0] * len(variants)
        for call in self.layer.calls:
            total = [a + b for a, b in zip(total, table.times(call.input_shape, variants))]
        return {self.path: total[0]}, total[1:]


def make_candidates(norm: Norm, say: Say) -> list[LayerCandidates]:
    """The candidates of every layer that may be replaced; without statistics in the weights' own norm."""
    replaceable, layers = norm.replaceable, list[LayerCandidates]()
    most = replaceable.budget.max_layer_error
    for i, (layer, passes) in enumerate(replaceable.layers):
        say(f"looking at {layer.path}", i / len(replaceable.layers))
        weight = weight_of(layer, replaceable.owners)
        assert weight is not None
        spec, scope = spec_of(layer), scope_of(replaceable.capture, layer)
        costs = {"params": float(layer.params), "macs": float(layer.macs), "bytes": _bytes(layer, [("", spec)])}
        candidates, claims = [Candidate(0.0, costs)], frozenset((layer.path,))
        for proposer, predicted in _losses(norm, layer, spec, weight, passes.values()):
            if most is not None and predicted.error > most:
                continue
            op = proposer.op(layer, spec, predicted.widths, axes=predicted.axes, scope=scope)
            if isinstance(op, Op) and (cost := op.estimate) is not None:
                nbytes = _bytes(layer, proposer.form.stages(spec, predicted.widths, predicted.axes))
                after = {"params": float(cost.params_after), "macs": float(cost.macs_after), "bytes": nbytes}
                candidates.append(Candidate(predicted.loss, after, claims, op, predicted.error))
        layers.append(LayerCandidates(candidates, layer, spec))
    return layers


def _losses(
    norm: Norm, layer: Layer, spec: ConvSpec, weight: Tensor, passes: Iterable[LayerPass]
) -> list[tuple[LayerPass, FormLoss]]:
    """What each pass's form loses at its choices of widths."""
    multiple = norm.replaceable.budget.multiple
    choices = [(p, p.form.choices(spec, multiple, partial(_saves, layer, spec, p.form))) for p in passes]

    def work_out() -> list[tuple[float, float]]:
        weighted, found = norm.weighted(layer.path, weight), dict[str, list[FormLoss]]()
        # Forms of several widths cut what those of one have worked out.
        try:
            for proposer, those in sorted(choices, key=lambda each: len(each[0].form.widths)):
                found[proposer.name] = proposer.form.losses(weighted, those)
        except RefusedError as error:
            error.where = error.where or layer.path
            raise
        return [(x.loss, x.error) for proposer, _ in choices for x in found[proposer.name]]

    every = [(proposer, *choice) for proposer, those in choices for choice in those]
    what = [layer.path, [(proposer.form.name, widths, axes) for proposer, widths, axes in every]]
    numbers = norm.once(what, (len(every), 2), work_out).tolist()
    return [(p, FormLoss(widths, axes, *pair)) for (p, widths, axes), pair in zip(every, numbers, strict=True)]


def _variant(spec: ConvSpec, op: Op) -> Variant:
    axes = op.settings.get("axes")
    widths = tuple(sorted(op.settings["widths"].items()))
    return Variant(spec, op.settings["form"], widths, None if axes is None else tuple(axes))


def _bytes(layer: Layer, chain: Chain) -> float:
    """Bytes that a chain reads and writes in all calls: activations and weights of every stage."""
    numbers = sum(moved(chain, call.input_shape, call.output_shape) for call in layer.calls)
    return numbers * layer.weight_bytes / max(layer.params, 1)


def _saves(layer: Layer, spec: ConvSpec, form: Form, widths: Mapping[str, int], axes: Axes) -> bool:
    estimate = estimate_chain(layer, spec, form, widths, axes)
    return estimate.macs_after < estimate.macs_before and estimate.params_after < estimate.params_before
