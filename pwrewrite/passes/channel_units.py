"""Which layers share which channels: `find_units`.

The channels of a tensor are those of the layer that makes them (its *producer*), and stay apart through norms by
channel, activations, pools, depthwise convolutions and whatever else treats each of them alone, up to the layers that
mix them (its *readers*). Tensors that are multiplied, as by the gate of a squeeze-and-excitation block (Hu et al.
2018), have the same channels, so a unit may have several producers. In a *unit* some channels can go altogether: from
the producers' outputs, all on the way, and the readers' inputs.

Channels that a sum, a concatenation or an output of the model has as well have to stay, since what is on its other side
would keep them. So have those that reach anything that is not known to treat each channel alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from math import prod

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..capturing.control_flow import decided
from ..capturing.eligibility import eligible
from ..capturing.records import Capture, Layer, info, shape_of
from ..core.operations import OPERATIONS
from ..core.plan import Skip, SkipReason
from ..edit.actions.project import CHANNEL_NORMS
from ..layers.factorized import Factorized, Projected
from ..layers.known import Found
from .base import enclosing_rewrite, spec_of
from .channel_flow import describe, reduced_axes
from .patterns import Graph
from .reaching import reached_around


def _named(*kinds: str) -> frozenset[str]:
    return frozenset(name for row in OPERATIONS if row.kind in kinds for name in row.names)


_PLAIN = _named("pool", "dropout", "cast") | {"interpolate", "pad"}
"""What leaves about as much of a channel as there was."""
_POINTWISE = _named("activation", "elementwise") - {"prelu"}
_ARITHMETIC = _named("arithmetic")
_PRODUCTS = frozenset(("mul", "multiply", "__imul__", "__rmul__"))
_SAME_CHANNELS = _PLAIN | _POINTWISE
_RESHAPES = frozenset(("flatten", "view", "reshape", "squeeze"))


@dataclass(frozen=True)
class ReaderOf:
    """A layer that reads the channels of a unit.

    Attributes:
        repeat: Inputs per channel: above 1 behind a flatten.
        norm: Path of the batch norm that alone reads its output, where it has no bias; ``""`` for none.
        source: Path of what last set the mean and spread of what it reads: a norm, or a layer; ``""`` if unknown.
        activation: What was applied to that, if anything.
    """

    layer: Layer
    repeat: int = 1
    norm: str = ""
    source: str = ""
    activation: Found | None = None


@dataclass(frozen=True)
class Unit:
    """Channels that can go.

    Attributes:
        channels: How many there are.
        producers: The layers that make them, in graph order.
        readers: The layers that mix them.
        depthwise: Depthwise convolutions on the way.
        norms: Paths of the norms, and activations with a slope for each channel, on the way.
        norm_params: Parameters of those per channel.
    """

    channels: int
    producers: tuple[Layer, ...]
    readers: tuple[ReaderOf, ...]
    depthwise: tuple[Layer, ...]
    norms: tuple[str, ...]
    norm_params: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers that change with it."""
        layers = (*self.producers, *self.depthwise, *(reader.layer for reader in self.readers))
        return tuple({id(layer): layer for layer in layers}.values())


@dataclass(eq=False)
class _Space:
    """The channels of some tensors, as they are found."""

    width: int
    producers: list[Layer] = field(default_factory=list)
    readers: list[tuple[fx.Node, _Place]] = field(default_factory=list)
    depthwise: list[Layer] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    refusal: tuple[SkipReason, str] | None = None
    joined: _Space | None = None

    def root(self) -> _Space:
        return self if self.joined is None else self.joined.root()


@dataclass(frozen=True)
class _Place:
    """Where channels are in a tensor.

    Attributes:
        axis: Which of its axes.
        repeat: Entries of that axis per channel.
        source: As `ReaderOf` has it, with the activation.
    """

    space: _Space
    axis: int
    repeat: int = 1
    source: str = ""
    activation: Found | None = None


def find_units(capture: Capture, graph: Graph | None = None) -> tuple[list[Unit], list[Skip]]:
    """The units of a model, and for every other layer that makes channels why these have to stay."""
    walk = _Walk(capture, graph or Graph(capture))
    for node in capture.graph.nodes:
        walk.visit(node)
    units, skips = list[Unit](), list[Skip]()
    for space in walk.spaces:
        if space.joined is not None:
            continue
        if space.refusal is None and not space.readers:
            space.refusal = SkipReason.WRONG_FORM, "no layer reads its channels"
        unit = walk.unit(space) if space.refusal is None else None
        if unit is not None and (why := _used_elsewhere(walk.graph, unit)):
            unit, space.refusal = None, (SkipReason.DATA_DEPENDENT, why)
        if unit is not None:
            units.append(unit)
        else:
            assert space.refusal is not None
            skips += [Skip(layer.path, *space.refusal) for layer in space.producers]
    return units, skips


def _used_elsewhere(graph: Graph, unit: Unit) -> str:
    """Whether code around all that a unit changes may use some of it by itself, on other inputs; ``""`` where not."""
    paths = [path.split(".") for path in (*(layer.path for layer in unit.layers), *unit.norms)]
    parents = zip(*(path[:-1] for path in paths))
    scope = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, parents)]
    return reached_around(graph.modules, ".".join(scope), {path[len(scope)] for path in paths})


class _Walk:
    def __init__(self, capture: Capture, graph: Graph) -> None:
        self.capture, self.graph = capture, graph
        self.spaces: list[_Space] = []
        self.where: dict[fx.Node, _Place] = {}
        self.decided: dict[str, bool] = {}

    def visit(self, node: fx.Node) -> None:
        """Notes where the channels are in what a node makes."""
        sources = [source for source in node.all_input_nodes if source in self.where]
        if node.name in self.graph.layers:
            self._layer(node, sources)
        elif sources:
            place = self._through(node, sources)
            if place is not None:
                self.where[node] = place
        for source in sources:
            if why := self._undecided(source, node):
                self._refuse(source, SkipReason.DATA_DEPENDENT, why)

    def unit(self, space: _Space) -> Unit:
        """The unit of a space that can be narrowed."""
        readers = []
        for node, place in space.readers:
            layer = self.graph.layers[node.name]
            norm = "" if spec_of(layer).bias else norm_behind(self.graph, node)
            readers.append(ReaderOf(layer, place.repeat, norm, place.source, place.activation))
        norms = [self.graph.modules[path] for path in space.norms]
        params = sum(p.numel() for norm in norms for p in norm.parameters(recurse=False)) // space.width
        lists = tuple(space.producers), tuple(readers), tuple(space.depthwise), tuple(space.norms)
        return Unit(space.width, *lists, params)

    def _refuse(self, node: fx.Node, reason: SkipReason, why: str) -> None:
        space = self.where[node].space.root()
        space.refusal = space.refusal or (reason, why)

    def _layer(self, node: fx.Node, sources: Sequence[fx.Node]) -> None:
        """A layer reads the channels of one tensor and makes those of another."""
        layer, read = self.graph.layers[node.name], node.args[0] if node.args else node.kwargs.get("input")
        spec, shape = spec_of(layer), info(node).outputs[0].shape
        axis = 1 if spec.dims else len(shape) - 1
        refusal = self._layer_refusal(node, layer, len(shape))
        alone = spec.is_depthwise and spec.out_channels == spec.in_channels
        if refusal is None and spec.groups > 1 and not alone:
            refusal = SkipReason.WRONG_FORM, f"{layer.path} is grouped: each group would have to lose as many channels"
        place = None
        for source in sources:
            place = self.where[source]
            if refusal is not None:
                self._refuse(source, *refusal)
            elif source is not read or place.axis != axis or (alone and place.repeat > 1):
                self._refuse(source, SkipReason.WRONG_FORM, f"{describe(node)} reads another axis as its channels")
            elif alone:
                place.space.root().depthwise.append(layer)
            else:
                place.space.root().readers.append((node, place))
        if alone and place is not None:
            self.where[node] = _Place(place.space, axis, 1, layer.path)
            return
        if alone:
            refusal = refusal or (SkipReason.DEPTHWISE, "its channels are those of what it reads, which have to stay")
        space = _Space(spec.out_channels, [layer], refusal=refusal)
        self.spaces.append(space)
        self.where[node] = _Place(space, axis, 1, layer.path)

    def _layer_refusal(self, node: fx.Node, layer: Layer, rank: int) -> tuple[SkipReason, str] | None:
        if layer.functional:
            return SkipReason.FUNCTIONAL, f"{describe(node)} is called as a function, whose weight is not a module's"
        if len(layer.calls) > 1:
            return SkipReason.CALLED_TWICE, f"{layer.path} is called several times"
        if (skip := eligible(self.capture, layer, self.graph.owners)) is not None:
            return skip.reason, f"{layer.path} cannot change: {skip.detail}"
        place = enclosing_rewrite(self.graph.modules, layer.path, (Factorized, Projected))
        if place is not None:
            return SkipReason.ALREADY_BOTTLENECK, f"{layer.path} is part of what a rewrite put at {place or 'the root'}"
        dims = spec_of(layer).dims
        if dims and rank != dims + 2:
            return SkipReason.WRONG_FORM, f"{layer.path} runs without a batch axis"
        return None

    def _through(self, node: fx.Node, sources: Sequence[fx.Node]) -> _Place | None:
        """Where the channels of a tensor are in what a node makes of it; None where they end, or have to stay."""
        op, place = info(node).op, self.where[sources[0]]
        if node.op == "output" or op == "cat":
            shares = "an output of the model has them" if node.op == "output" else f"{describe(node)} shares them"
            for source in sources:
                self._refuse(source, SkipReason.SHARED_CHANNELS, shares)
            return None
        others = [n for n in node.all_input_nodes if n is not sources[0] and n.op != "get_attr"]
        if op in ("batch_norm", "instance_norm"):
            why = (
                _norm_refusal(self.graph, node, place.axis, place.repeat)
                if not others
                else f"{describe(node)} reads several tensors"
            )
        elif op in _ARITHMETIC and len(node.all_input_nodes) > 1:
            return self._arithmetic(node, sources)
        elif others:
            why = f"{describe(node)} reads several tensors"
        else:
            return self._alone(node, sources[0], place)
        if why:
            self._refuse(sources[0], SkipReason.WRONG_FORM, why)
            return None
        path = info(node).path
        place.space.root().norms.append(path)
        return _Place(place.space, place.axis, 1, path)

    def _alone(self, node: fx.Node, source: fx.Node, place: _Place) -> _Place | None:
        """An operation of one tensor."""
        op, before, after = info(node).op, info(source).outputs[0].shape, info(node).outputs
        shape, axis = after[0].shape if len(after) == 1 else (), place.axis
        same = len(shape) > axis and shape[: axis + 1] == before[: axis + 1]
        if op in _RESHAPES:
            spatial = prod(before[axis + 1 :])
            if same:
                return place
            if axis == 1 and shape == (before[0], before[1] * spatial):
                return replace(place, repeat=place.repeat * spatial)
        elif op in ("mean", "sum"):
            if same and min(reduced_axes(node, len(before)), default=0) > axis:
                return place
        elif op == "prelu":
            module = self.graph.modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.PReLU) and same and module.num_parameters == 1:
                return replace(place, source="")
            whole = isinstance(module, nn.PReLU) and axis == 1 and place.repeat == 1 and same
            if (
                whole
                and self.graph.calls[str(node.target)] == 1
                and not _other_owners(self.graph, node, str(node.target))
            ):
                place.space.root().norms.append(str(node.target))
                return replace(place, source="")
        elif same and op in _PLAIN and (axis == 1 or shape == before):
            return place
        elif same and op in _POINTWISE:
            found = self.graph.activation(node)
            known = found is not None and place.activation is None
            return replace(place, source=place.source if known else "", activation=found[0] if found else None)
        elif same and op in _ARITHMETIC:  # with a number
            return replace(place, source="", activation=None)
        self._refuse(source, SkipReason.WRONG_FORM, f"{describe(node)} is not known to treat each channel alone")
        return None

    def _arithmetic(self, node: fx.Node, sources: Sequence[fx.Node]) -> _Place | None:
        """An operation of several tensors: their channels are the same, or one has a single value for all of them."""
        shape = info(node).outputs[0].shape
        wide = [s for s in sources if self._spans(s, shape)]
        for source in sources:
            if source not in wide:
                self._refuse(source, SkipReason.WRONG_FORM, f"{describe(node)} spreads it over other channels")
        if not wide:
            return None
        first = self.where[wide[0]]
        for other in (n for n in node.all_input_nodes if n not in sources):
            own, back = shape_of(other) or (), len(shape) - first.axis  # () for a number
            if len(own) >= back and own[-back] != 1:
                self._refuse(wide[0], SkipReason.SHARED_CHANNELS, f"{describe(node)} joins them with another tensor")
                return None
        for source in wide[1:]:
            place = self.where[source]
            if (place.axis, place.repeat) != (first.axis, first.repeat):
                self._refuse(source, SkipReason.WRONG_FORM, f"{describe(node)} joins them along another axis")
                self._refuse(wide[0], SkipReason.WRONG_FORM, f"{describe(node)} joins them along another axis")
                return None
            one, two = first.space.root(), place.space.root()
            if one is two:
                continue
            if info(node).op not in _PRODUCTS:
                one.refusal = one.refusal or (SkipReason.SHARED_CHANNELS, f"{describe(node)} shares them")
            for name in ("producers", "readers", "depthwise", "norms"):
                getattr(one, name).extend(getattr(two, name))
            one.refusal, two.joined = one.refusal or two.refusal, one
        whole = next((s for s in wide if info(s).outputs[0].shape == shape), wide[0])  # the other one is a gate
        return self.where[whole] if info(node).op in _PRODUCTS else replace(first, source="", activation=None)

    def _spans(self, source: fx.Node, shape: Sequence[int]) -> bool:
        """Whether the channels of an operand are those of a result of this shape."""
        place, own = self.where[source], info(source).outputs[0].shape
        return len(own) == len(shape) and own[place.axis] == shape[place.axis]

    def _undecided(self, source: fx.Node, node: fx.Node) -> str:
        """Why code may do other things with what a node made, on other values or at other sizes; ``""`` for nothing.

        Asked of every module whose code hands it on, out of where it was made and into where it is read.
        """
        up, down = info(source).callers, info(node).callers
        shared = 0
        while shared < min(len(up), len(down)) and up[shared] == down[shared]:
            shared += 1
        owners = dict.fromkeys((*up[max(shared - 1, 0) :], *down[max(shared - 1, 0) :])) or {"": None}
        path = next((path for path in owners if not self._decided(path)), None)
        what = "decides by values or sizes what becomes of them"
        return "" if path is None else f"{describe(node)} reads them, and the code of {path or 'the model'} {what}"

    def _decided(self, path: str) -> bool:
        """Whether a module's own code calls the same for every input."""
        if path not in self.decided:
            module = self.graph.modules.get(path)
            ways = None if module is None else self.graph.ways(module)
            self.decided[path] = ways is not None and decided(ways, _SAME_CHANNELS)
        return self.decided[path]


def norm_behind(graph: Graph, node: fx.Node) -> str:
    """The batch norm that alone reads what a layer makes, and whose running mean can follow it."""
    reader = graph.sole_reader(graph.onward(node))
    if reader is None or info(reader).op != "batch_norm":
        return ""
    norm = graph.modules.get(info(reader).path)
    follows = isinstance(norm, _BatchNorm) and norm.running_mean is not None
    return info(reader).path if follows and not _norm_refusal(graph, reader) else ""


def _norm_refusal(graph: Graph, node: fx.Node, axis: int = 1, repeat: int = 1) -> str:
    """Why a norm cannot lose channels; ``""`` where it can."""
    path = info(node).path
    norm, what = graph.modules.get(path), describe(node)
    if not isinstance(norm, CHANNEL_NORMS):
        return f"{what} is not a norm module, whose tensors could change with them"
    if axis != 1 or repeat > 1:
        return f"{what} normalises single positions"
    if sum(info(n).path == path and info(n).op == info(node).op for n in graph.nodes) > 1:
        return f"{what} is called several times"
    return _other_owners(graph, node, path)


def _other_owners(graph: Graph, node: fx.Node, path: str) -> str:
    """What else has the tensors of a module that one node calls; ``""`` for nothing."""
    module = graph.modules[path]
    if graph.shares(module, recurse=False):
        return f"{path} shares its parameters"
    names = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    strangers = [user for user in graph.readers(path, *names) if user is not node]
    return f"{describe(strangers[0])} reads the tensors of {path}, too" if strangers else ""
