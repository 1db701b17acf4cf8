"""What a model costs, layer by layer, and how two models differ: the record behind gates and pull requests.

`Costs` is the part of an analysis that can be compared: it is made from an `Analysis` or read from the JSON that
``pwrewrite analyze --format json`` writes (schema ``pwrewrite.analysis/1``), so that a baseline is a small file.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..core.errors import InputError, shortened
from ..core.json_text import loads
from ..core.records import Record, Shown
from .records import SCHEMA, Analysis

KINDS = ("params", "macs", "weight_bytes", "peak_bytes")
"""What a model costs: parameters, MACs, bytes of its weights, bytes of activations that are alive at most."""

NAMES = {"params": "parameters", "macs": "MACs", "weight_bytes": "weights", "peak_bytes": "peak memory"}

BYTES = ("weight_bytes", "peak_bytes")


_LAYER_COSTS = ("params", "macs", "weight_bytes", "activation_bytes")


@dataclass(frozen=True, slots=True)
class LayerCosts(Record):
    """What one layer costs: what it is in words, parameters, MACs of all its calls, bytes of its weight and outputs."""

    what: str
    params: int = 0
    macs: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0

    def of(self, kind: str) -> int:
        """Its part of one of `KINDS`; what it writes, of the peak."""
        return self.activation_bytes if kind == "peak_bytes" else int(getattr(self, kind))


@dataclass(frozen=True, slots=True)
class Costs(Record):
    """What a model costs in all, and layer by layer: by path, a layer under several paths at its first."""

    target: str
    inputs: tuple[str, ...]
    params: int
    macs: int
    weight_bytes: int
    peak_bytes: int
    layers: Mapping[str, LayerCosts] = field(default_factory=dict)

    @classmethod
    def of(cls, analysis: Analysis) -> Costs:
        """Those of an analysis."""
        return cls.from_data(analysis.to_dict(), analysis.target)

    @classmethod
    def from_json(cls, text: str, name: str) -> Costs:
        """Those of an analysis that was written as JSON, of which nothing is run or imported; errors call it ``name``.

        Raises `PlanError` if it is not JSON, `InputError` if it is not an analysis.
        """
        data = loads(text, name)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            got = data.get("schema", "no schema") if isinstance(data, dict) else type(data).__name__
            raise InputError(
                f"{name} is not an analysis",
                expected=f"JSON of schema {SCHEMA}",
                got=shortened(str(got), 80),
                hint="pwrewrite analyze TARGET --format json --output FILE writes one",
            )
        try:
            return cls.from_data(data, name)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
            raise InputError(
                f"{name} is not a whole analysis: {kind}{shortened(str(error), 120)}",
                expected=f"every key of schema {SCHEMA}",
            ) from None

    @classmethod
    def from_data(cls, data: Mapping[str, object], target: str) -> Costs:
        """Those of the data of `Analysis.to_dict`."""
        totals, model, layers, modules = (data[key] for key in ("totals", "model", "layers", "modules"))
        if not (isinstance(totals, Mapping) and isinstance(model, Mapping)):
            raise TypeError("totals or model")
        if not (isinstance(layers, list) and isinstance(modules, list)):
            raise TypeError("layers or modules")
        order = {module["path"]: i for i, module in enumerate(modules)}
        layers = sorted(layers, key=lambda x: order.get(x["path"], len(order)))
        return cls(
            target,
            tuple(f"{'×'.join(map(str, i['shape']))} {i['dtype']}" for i in model["inputs"]),
            _cost(totals, "params"),
            _cost(totals, "macs"),
            _cost(totals, "weight_bytes"),
            _cost(totals, "peak_activation_bytes"),
            {str(x["path"]): LayerCosts(_in_words(x), *(_cost(x, key) for key in _LAYER_COSTS)) for x in layers},
        )


def _cost(of: Mapping[str, object], key: str) -> int:
    """A whole number that is not negative, of the totals or of a layer."""
    value = of[key]
    if type(value) is not int or value < 0:
        where = f"layer {of['path'] or '(root)'}" if "path" in of else "totals"
        raise ValueError(f"{key} of {where} is {shortened(repr(value), 40)}, not a whole number from 0 on")
    return value


def _in_words(layer: Mapping[str, object]) -> str:
    """``3×3 conv2d 64→128 /2``."""
    parts = [str(layer["op"]), f"{_cost(layer, 'in_channels')}→{_cost(layer, 'out_channels')}"]
    kernel, stride = layer["kernel"], layer["stride"]
    if isinstance(kernel, list):
        parts.insert(0, "×".join(map(str, kernel)))
    if isinstance(stride, list) and any(n != 1 for n in stride):
        parts.append("/" + "×".join(dict.fromkeys(map(str, stride))))
    if isinstance(groups := layer["groups"], int) and groups > 1:
        parts.append(f"g{groups}")
    return " ".join(parts)


Change = Literal["added", "removed", "changed"]


@dataclass(frozen=True, slots=True)
class LayerDifference(Record):
    """A layer that is not the same in two models; what is not there costs nothing."""

    path: str
    change: Change
    before: LayerCosts
    after: LayerCosts

    def growth(self, kind: str) -> int:
        """By how much one of `KINDS` grew."""
        return self.after.of(kind) - self.before.of(kind)


@dataclass(frozen=True, repr=False)
class Difference(Shown, Record):
    """How the costs of two models differ: layers that are in one only or not the same in both, largest change of MACs
    first, and how many are the same.
    """

    before: Costs
    after: Costs
    layers: tuple[LayerDifference, ...]
    same: int

    def most_grown(self, kind: str) -> list[LayerDifference]:
        """The layers that grew in one of `KINDS`, those that grew most first."""
        grown = [layer for layer in self.layers if layer.growth(kind) > 0]
        return sorted(grown, key=lambda layer: -layer.growth(kind))

    def to_dict(self) -> dict[str, object]:
        """Totals and the layers that differ, as plain JSON data."""
        totals = {kind: [getattr(self.before, kind), getattr(self.after, kind)] for kind in KINDS}
        head = {"schema": "pwrewrite.difference/1", "before": self.before.target, "after": self.after.target}
        layers = [layer.to_dict() for layer in self.layers]
        return {**head, "totals": totals, "same_layers": self.same, "layers": layers}


def compare(before: Costs, after: Costs) -> Difference:
    """What differs between two models, by the paths of their layers; a layer's factors are one with it."""
    nothing = LayerCosts("")
    removed = {path: layer for path, layer in before.layers.items() if path not in after.layers}
    added = {path: layer for path, layer in after.layers.items() if path not in before.layers}
    both = [(path, old, after.layers[path]) for path, old in before.layers.items() if path not in removed]
    same = sum(old == new for _, old, new in both)
    layers = [LayerDifference(path, "changed", old, new) for path, old, new in both if old != new]
    for path, factors in _popped_inside(removed, added).items():
        layers.append(LayerDifference(path, "changed", removed.pop(path), _together(factors)))
    for path, factors in _popped_inside(added, removed).items():
        layers.append(LayerDifference(path, "changed", _together(factors), added.pop(path)))
    layers += [LayerDifference(path, "removed", old, nothing) for path, old in removed.items()]
    layers += [LayerDifference(path, "added", nothing, new) for path, new in added.items()]
    layers.sort(key=lambda layer: (-abs(layer.growth("macs")), -abs(layer.growth("params"))))
    return Difference(before, after, tuple(layers), same)


def _popped_inside(paths: Container[str], layers: dict[str, LayerCosts]) -> dict[str, list[LayerCosts]]:
    """The layers inside of paths, by these; they are taken out."""
    inside: dict[str, list[LayerCosts]] = {}
    for part in list(layers):
        above = ("", *(part[:i] for i, character in enumerate(part) if character == "."))
        if (path := next((path for path in above if path in paths), None)) is not None:
            inside.setdefault(path, []).append(layers.pop(part))
    return inside


def _together(layers: list[LayerCosts]) -> LayerCosts:
    sums = (sum(getattr(layer, key) for layer in layers) for key in _LAYER_COSTS)
    return LayerCosts(" + ".join(layer.what for layer in layers), *sums)
