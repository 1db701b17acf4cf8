"""Which modules a single 1×1 map, or nothing at all, could stand for: `find_regions`.

A *region* is a module that holds several operations, reads one tensor and gives one back, on whose way no other tensor
comes in or goes out: a residual block, a stage, an inverted residual, an attention block. Where both tensors have as
many positions, or the second has every ``s``-th of them, a 1×1 convolution of stride ``s`` can take its place, and
where they have the same shape, the input itself can. What these lose is for calibration inputs to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx, nn

from ..capturing import capture as capture_of
from ..capturing.records import Capture, Layer, TensorSpec, info
from ..core.convolution import ConvSpec
from ..core.errors import PwrewriteError
from ..core.numbers import dims
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..core.records import Json
from ..forms.specs import linear_spec, pointwise_spec, spec_to_dict
from ..layers.factorized import Factorized, Projected
from ..layers.known import Found, hooked
from .patterns import Graph

NAME = "substitute"
"""Of the form, and of the action."""

_WIDEST = 2048
"""More channels than this, of both sides together for a map, are not looked at."""
_SAVES = 0.7
"""A map is looked at below this share of the MACs."""
_LARGEST_STRIDE = 8
_RANGES: Mapping[Found, str] = {("relu", ()): "relu", ("relu6", ()): "relu6"}
"""Activations that leave what is in their range as it is."""


@dataclass(frozen=True)
class Region:
    """A module that something small could stand for.

    Attributes:
        spec: The 1×1 convolution, or linear map, with a bias, that has its channels and its stride.
        layers: Its convolutions and linear maps.
        params: All its parameters; ``macs`` and ``moved``, bytes read and written, likewise.
        input_shape: What it reads; ``positions`` are those of its output, batch included.
        itemsize: Bytes of a number.
        mappable: Whether the map could.
        activation: ``relu`` or ``relu6`` where all outputs are in its range, which the map's are then brought into.
        droppable: Whether its input could stand for its output.
    """

    path: str
    spec: ConvSpec
    layers: tuple[Layer, ...]
    params: int
    macs: int
    moved: int
    input_shape: tuple[int, ...]
    positions: int
    itemsize: int
    mappable: bool
    droppable: bool
    activation: str | None = None

    def op(self, *, drop: bool) -> Op:
        """The op that puts the map in its place, or nothing."""
        params, macs = (0, 0) if drop else (self.spec.params, self.positions * prod(self.spec.weight_shape))
        settings: dict[str, Json] = {"layer": spec_to_dict(self.spec), "drop": drop}
        if self.activation and not drop:
            settings["activation"] = self.activation
        return Op("substitute", self.path, NAME, settings, Estimate(self.params, params, self.macs, macs))


def find_regions(capture: Capture, graph: Graph | None = None) -> tuple[list[Region], list[Skip]]:
    """The regions of a model, outer ones first, and of every other module of several layers why it is none."""
    graph = graph or Graph(capture)
    inside: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        for path in _around(node):
            inside.setdefault(path, []).append(node)
    opened, tried = _open(graph), _Tried()
    regions, skips = list[Region](), list[Skip]()
    for path, nodes in inside.items():
        layers = {id(graph.layers[n.name]): graph.layers[n.name] for n in nodes if n.name in graph.layers}
        if path not in graph.modules or len(layers) < 2 or any(layer.path == path for layer in layers.values()):
            continue
        try:
            if path in opened:
                detail = "other code calls a part of it, or holds its parameters"
                raise _NoRegion(SkipReason.HELD_ELSEWHERE, detail)
            regions.append(_region(graph, path, nodes, tuple(layers.values()), tried))
        except _NoRegion as why:
            skips.append(Skip(path, why.reason, why.detail))
    return regions, skips


class _NoRegion(Exception):
    """Why a module is no region."""

    def __init__(self, reason: SkipReason, detail: str) -> None:
        self.reason, self.detail = reason, detail


def _around(node: fx.Node) -> Sequence[str]:
    """Paths of the modules that a node is in, but for the model and for a leaf's own."""
    if node.op == "get_attr":
        return list(_ancestors(str(node.target)))
    return [path for path in dict.fromkeys(info(node).callers) if path]


def _ancestors(name: str) -> Iterator[str]:
    """Paths of the modules that what has a full name is in, but for the model."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _open(graph: Graph) -> set[str]:
    """Paths of modules of which something else holds parameters, or which something else calls a part of."""
    opened: set[str] = set()
    for holders in graph.owners.holders.values():
        if len(holders) > 1:
            opened.update(a for h in holders for a in _ancestors(f"{h}.") if not all(_within(o, a) for o in holders))
    for node in graph.nodes:
        if node.op == "call_module":
            opened.update(set(_ancestors(str(node.target))) - set(info(node).callers))
        for name in (str(node.target),) if node.op == "get_attr" else ():
            for user in node.users:
                opened.update(set(_ancestors(name)) - {*info(user).callers, info(user).path})
    return opened


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _region(graph: Graph, path: str, nodes: Sequence[fx.Node], layers: tuple[Layer, ...], tried: _Tried) -> Region:
    module = graph.modules[path]
    if twice := next((layer for layer in layers if len(layer.calls) > 1), None):
        raise _NoRegion(SkipReason.CALLED_TWICE, f"{twice.path} is called several times")
    _check_module(graph, module)
    entry, end, before, after = _ends(nodes)
    written = {each: graph.writers.get(graph.root_of(each), ()) for each in (entry, end)}
    if any(node in nodes for node in written[entry]):
        raise _NoRegion(SkipReason.WRITTEN, "it writes into what it reads")
    spec = _map_between(before.shape, after.shape, layers)
    if spec is None:
        shapes = f"{dims(before.shape)} to {dims(after.shape)}"
        raise _NoRegion(SkipReason.WRONG_FORM, f"no 1×1 map leads from {shapes}")
    if max(spec.in_channels, spec.out_channels) > _WIDEST:
        raise _NoRegion(SkipReason.NO_STATISTICS, f"it has more than {_WIDEST} channels on one side")
    later = any(graph.order[node] > graph.order[end] for each in written.values() for node in each)
    costs = [info(node).cost for node in nodes]
    params, macs = sum(p.numel() for p in module.parameters()), sum(cost.macs for cost in costs)
    moved, positions = sum(cost.bytes for cost in costs), prod(after.shape) // spec.out_channels
    cheap = positions * prod(spec.weight_shape) < _SAVES * macs and spec.params < params
    mappable = cheap and spec.in_channels + spec.out_channels <= _WIDEST
    droppable = before.shape == after.shape and not later
    if not (mappable or droppable):
        raise _NoRegion(
            SkipReason.NO_GAIN, f"a 1×1 map takes more than {_SAVES:.0%} of its MACs, or has as many weights"
        )
    if not tried.stands(module, spec, before):
        raise _NoRegion(
            SkipReason.DATA_DEPENDENT, "at other sizes its outputs have other shapes than those of a 1×1 map"
        )
    sizes = before.shape, positions, after.dtype.itemsize
    activation = _RANGES.get(found[0]) if (found := graph.activation(end)) is not None else None
    return Region(path, spec, layers, params, macs, moved, *sizes, mappable, droppable, activation)


def _check_module(graph: Graph, module: nn.Module) -> None:
    """Refuses a module that cannot be replaced by another."""
    if len(names := graph.names_of(module)) > 1:
        raise _NoRegion(SkipReason.HELD_ELSEWHERE, f"it has several names: {', '.join(names)}")
    if any(map(hooked, module.modules())):
        raise _NoRegion(SkipReason.HOOKS, "a hook inside it would no longer be called")
    if any(isinstance(each, (Factorized, Projected)) for each in module.modules()):
        raise _NoRegion(SkipReason.ALREADY_BOTTLENECK, "it holds what a rewrite put in")


def _ends(nodes: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node, TensorSpec, TensorSpec]:
    """The one node that others read, the one that others read from, and their tensors."""
    own = set(nodes)
    entries = {source for node in nodes for source in node.all_input_nodes} - own
    exits = [node for node in nodes if any(user not in own for user in node.users)]
    for ends, what in ((entries, "reads"), (exits, "gives")):
        if len(ends) != 1:
            raise _NoRegion(SkipReason.WRONG_FORM, f"it {what} {len(ends)} tensors")
    (entry,), (end,) = entries, exits
    before, after = _tensor(entry), _tensor(end)
    if before is None or after is None or before.dtype != after.dtype:
        raise _NoRegion(SkipReason.WRONG_FORM, "what it reads and what it gives are not two tensors of one real dtype")
    return entry, end, before, after


def _tensor(node: fx.Node) -> TensorSpec | None:
    """The one floating-point tensor that a node gives."""
    outputs = info(node).outputs if node.op not in ("get_attr", "output") else ()
    return outputs[0] if len(outputs) == 1 and outputs[0].dtype.is_floating_point else None


def _map_between(before: Sequence[int], after: Sequence[int], layers: Sequence[Layer]) -> ConvSpec | None:
    """The pointwise map between two shapes; None where there is none."""
    dims = len(before) - 2
    if any(layer.spec is not None and layer.spec.dims == dims for layer in layers):
        if len(after) != len(before) or after[0] != before[0]:
            return None
        steps = tuple(round(b / a) for b, a in zip(before[2:], after[2:]) if a)
        spec = replace(pointwise_spec(dims, before[1], after[1], bias=True), stride=steps)
        fits = len(steps) == dims and all(1 <= step <= _LARGEST_STRIDE for step in steps)
        return spec if fits and spec.output_size(tuple(before[2:])) == tuple(after[2:]) else None
    if len(before) < 2 or tuple(before[:-1]) != tuple(after[:-1]):
        return None
    return linear_spec(before[-1], after[-1], True)


class _Tried:
    """How modules answer to inputs of other sizes than those that they had, shapes only; equal ones are asked once."""

    def __init__(self) -> None:
        self._answers: dict[tuple[object, ...], bool] = {}

    def stands(self, module: nn.Module, spec: ConvSpec, before: TensorSpec) -> bool:
        """Whether a map has a module's outputs in shape, whatever the size, and its channels are channels there."""
        key = type(module), str(module), spec, before
        if key not in self._answers:
            self._answers[key] = self._stands(module, spec, before)
        return self._answers[key]

    @staticmethod
    def _stands(module: nn.Module, spec: ConvSpec, before: TensorSpec) -> bool:
        shape, axis = before.shape, 1 if spec.dims else len(before.shape) - 1
        if _given(module, shape, before.dtype) != _of_map(spec, shape):
            return False
        for more in (1, -1):  # of channels there are as many as the weights say
            other = tuple(n + more * (i == axis) for i, n in enumerate(shape))
            if min(other) > 0 and _given(module, other, before.dtype) is not None:
                return False
        sizes = [i for i in range(2 if spec.dims else 1, len(shape)) if i != axis]
        for less in range(1, max((2, *spec.stride)) if sizes else 1):
            smaller = tuple(n - less * (i in sizes) for i, n in enumerate(shape))
            if min(smaller) < 1:
                return all(step == 1 for step in spec.stride)
            given = _given(module, smaller, before.dtype)
            if given != _of_map(spec, smaller) and (given is not None or any(step > 1 for step in spec.stride)):
                return False
        return True


def _given(module: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...] | None:
    """The shape of what a module gives for an input of some shape; None where it gives no single tensor."""
    try:
        run = capture_of(module, (torch.empty(shape, device="meta", dtype=dtype),), values="meta")
    except PwrewriteError:
        return None
    (end,) = (node for node in run.graph.nodes if node.op == "output")
    tensor = _tensor(end.args[0]) if isinstance(end.args[0], fx.Node) else None
    return None if tensor is None else tuple(tensor.shape)


def _of_map(spec: ConvSpec, shape: Sequence[int]) -> tuple[int, ...]:
    if not spec.dims:
        return (*shape[:-1], spec.out_channels)
    return (shape[0], spec.out_channels, *spec.output_size(tuple(shape[2:])))
