"""Which layers a budget lets be replaced, alone or together."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import cached_property

from ..capturing.code_trace import NotTraceable
from ..capturing.records import Capture, Layer
from ..core.convolution import ConvSpec
from ..core.errors import UsageError
from ..core.names import JOINT_FORM_NAMES
from ..core.options import Budget
from ..core.plan import Skip, SkipReason
from ..edit.actions.evaluation import code_graph
from ..edit.graph_edit import FunctionalCall
from ..forms import FORMS
from ..passes import FORM_PASSES, LayerPass, Narrow
from ..passes.base import chosen, scope_of, spec_of
from ..passes.channel_units import Unit, find_units
from ..passes.patterns import Graph
from ..passes.reaching import own_methods
from ..passes.regions import NAME as SUBSTITUTE, Region, find_regions
from ..passes.shared_maps import NAME as SHARE, SharedMap, find_shared
from .fit_steps import off_mean
from .statistics import Between, Watched

_ROOM, _NUMBER = 1 << 30, 8
"""Bytes for the moments of regions, and of a number in them."""

_LISTED = 3
"""Methods that a reason names at most."""


def _forms_named(names: Sequence[str]) -> tuple[str, ...]:
    """Forms from their names, or from a name for several."""
    one_by_one = tuple(name for name, form in FORMS.items() if form.pointwise)
    every = (*FORMS, *JOINT_FORM_NAMES)
    known = {"all": every, "1x1": one_by_one} | {name: (name,) for name in every}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no form {name!r}", expected=f"some of {', '.join(known)}", got=name)
    return tuple(dict.fromkeys(form for name in names for form in known[name]))


class ReplaceableLayers:
    """The ``layers`` that a budget lets be replaced, with the pass for each form, and the ``skips`` of all others.

    ``units`` are those that it lets be narrowed, ``regions`` those that something else may stand for as a whole, and
    ``maps`` those that several layers may read through one reduction, of which it includes all layers. ``alone`` says
    why layers of these may not change by themselves; ``graph`` is the captured graph.
    """

    def __init__(self, capture: Capture, budget: Budget) -> None:
        self.capture, self.budget, self.graph = capture, budget, Graph(capture)
        self.owners = self.graph.owners
        self.layers: list[tuple[Layer, dict[str, LayerPass]]] = []
        self.skips: list[Skip] = []
        self.alone: dict[str, Skip] = {}
        forms = _forms_named(budget.forms)
        kinds = [kind for form in forms if form in FORMS for kind in FORM_PASSES[form]]
        passes = [kind(replan=budget.replan, min_gain=0.0) for kind in kinds]
        chosen_layers = chosen(capture, budget.include, budget.exclude)
        units, refused = find_units(capture, self.graph) if Narrow.name in forms else ([], [])
        self.units = [unit for unit in units if all(id(layer) in chosen_layers for layer in unit.layers)]
        self.regions, others = self._substitutable(chosen_layers) if SUBSTITUTE in forms else ([], {})
        joint = {layer.path for unit in self.units for layer in unit.layers}
        joint |= {layer.path for region in self.regions for layer in region.layers}
        maps, unshared = self._shared() if SHARE in forms else ([], [])
        self.maps = [each for each in maps if all(id(layer) in chosen_layers for layer in each.layers)]
        joint |= {layer.path for each in self.maps for layer in each.layers}
        why = {skip.path: skip for skip in unshared} | others | {skip.path: skip for skip in refused}
        for layer in capture.layers:
            if id(layer) not in chosen_layers:
                self.skips.append(Skip(layer.path, SkipReason.EXCLUDED, "left out by include or exclude"))
                continue
            answers = {each: each.refusal(self.graph, layer) for each in passes if each.concerns(layer)}
            applying = {each.form.name: each for each, refusal in answers.items() if refusal is None}
            refusals = [refusal for refusal in answers.values() if refusal is not None]
            if layer.functional and applying and (in_code := _refused_in_code(capture, layer)) is not None:
                refusals, applying = [in_code], {}
            if applying:
                self.layers.append((layer, applying))
                continue
            mild = (SkipReason.WRONG_FORM, SkipReason.POINTWISE)
            refusal = next((r for r in refusals if r.reason not in mild), refusals[0] if refusals else None)
            if refusal and layer.path in joint:
                self.alone[layer.path] = refusal
            elif refusal:
                self.skips.append(refusal)
            elif layer.path not in joint:
                plain = Skip(layer.path, SkipReason.WRONG_FORM, "none of the forms is for a linear map")
                self.skips.append(why.get(layer.path, plain))

    def _shared(self) -> tuple[list[SharedMap], list[Skip]]:
        """See `find_shared`; the model itself becomes a graph, without its methods, only where the form was named."""
        maps, skips = find_shared(self.capture, self.graph)
        methods = own_methods(self.graph.modules[""])
        if SHARE in self.budget.forms or not methods:
            return maps, skips
        lost = ", ".join(methods[:_LISTED]) + ", …" * (len(methods) > _LISTED)
        why = f"the model would become a graph, without its methods ({lost}); {SHARE} is used there where it is named"
        at_root = [layer.path for each in maps if not each.scope for layer in each.layers]
        return [each for each in maps if each.scope], skips + [Skip(p, SkipReason.NOT_TRACED, why) for p in at_root]

    def _substitutable(self, chosen_layers: Container[int]) -> tuple[list[Region], dict[str, Skip]]:
        """The regions of which all layers are chosen, and path to why each layer is in none."""
        if self.budget.sensitivity == "weights":
            why = "no calibration inputs say what a module does as a whole"
            return [], {layer.path: Skip(layer.path, SkipReason.NO_STATISTICS, why) for layer in self.capture.layers}
        regions, refused = find_regions(self.capture, self.graph)
        fitting = _that_fit([r for r in regions if all(id(layer) in chosen_layers for layer in r.layers)])
        small = {r.path for r in fitting}
        refused += [
            Skip(r.path, SkipReason.NO_STATISTICS, f"its moments do not fit into {_ROOM >> 20} MiB beside larger ones")
            for r in regions
            if r.path not in small and all(id(layer) in chosen_layers for layer in r.layers)
        ]
        why_not = dict[str, Skip]()
        for layer in self.capture.layers:
            around = [skip for skip in refused if layer.path.startswith(f"{skip.path}.")]
            inner = max(around, key=lambda skip: len(skip.path), default=None)
            reason, detail = SkipReason.WRONG_FORM, "no module around it, below the model, holds several layers"
            if inner is not None:
                reason, detail = inner.reason, f"{inner.path} stays whole: {inner.detail}"
            why_not[layer.path] = Skip(layer.path, reason, detail)
        return fitting, why_not

    @cached_property
    def specs(self) -> dict[str, ConvSpec]:
        """Path to shape facts, of the layers that may be replaced and of those that may read less."""
        places: tuple[Unit | SharedMap, ...] = (*self.units, *self.maps)
        readers = {reader.layer.path: spec_of(reader.layer) for place in places for reader in place.readers}
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
    def off_mean(self) -> set[str]:
        """Paths of modules of whose output nothing sees a shift of the mean."""
        return off_mean(self.capture)

    @cached_property
    def repeated(self) -> set[str]:
        """Paths of modules that are called several times."""
        return {layer.path for layer, _ in self.layers if len(layer.calls) > 1 and not layer.functional}


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
