"""The graph under construction, and where every tensor in it comes from.

A tensor's origin is an attribute on the tensor object, so that nothing here keeps an activation alive. Tensors that the
run did not make (parameters, buffers, constants of the user's code) are stood for by an alias that has the mark. A
wrapper of ``vmap`` or ``grad`` comes from where the tensor in it does, a transform's result from what made its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..core.cost import Cost
from ..core.nested import Args, Kwargs, map_tensors, tensors_of, to_meta
from .inventory import Inventory
from .liveness import Liveness
from .records import NodeInfo, TensorSpec, info, set_info
from .tensors import has_shape_only, kind_of
from .transforms import rewrapped, unwrapped

_ORIGIN = "_pw_node"

_CONSTANT_LIMIT = 1_000_000
"""Elements above which a tensor of the user's stands on ``meta``, its values unread."""


def spec_of(t: Tensor) -> TensorSpec:
    """Shape and dtype of a tensor; the shape of a nested one is how many elements it has."""
    return TensorSpec((t.numel(),) if t.is_nested else tuple(t.shape), t.dtype)


class NeedsValues(RuntimeError):
    """The model's code asked a meta tensor for its values."""


class Piece:
    """Origin of one of several tensors that a node makes; becomes a node of its own when it is used."""

    __slots__ = ("graph", "maker", "node", "where")

    def __init__(self, maker: fx.Node, where: Args) -> None:
        self.maker, self.where, self.graph = maker, where, maker.graph
        self.node: fx.Node | None = None


class Origins:
    """Graph, names and origins of one recording; ``items`` gives each of several tensors that a node makes a node of
    its own, ``device`` is where real values live.

    Attributes:
        constants: Tensors that the graph reads and no module owns, by their name in the graph.
        lost: How many tensors came from code that torch functions do not show.
        outside: Weights that the graph reads and that are no parameters of the model.
        transformed: Whether a function transform ran.
    """

    def __init__(
        self, inventory: Inventory, liveness: Liveness, *, real: bool, items: bool, device: torch.device
    ) -> None:
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.lost, self.transformed = 0, False
        self.outside: list[Tensor] = []
        self._inventory, self._liveness = inventory, liveness
        self._real, self._items, self._device = real, items, device
        self._aliases: dict[int, Tensor] = {}
        self._held: list[Tensor] = []
        self._attributes: dict[str, fx.Node] = {}
        self._names: dict[str, int] = {}

    # --------------------------------------------------------------------------------------------- nodes

    def create(self, op: str, target: str | Callable[..., Any], args: Args, kwargs: Kwargs, base: str) -> fx.Node:
        """Appends a node named after ``base``; arguments hold tensors in any nesting."""
        if len(args) == 1 and isinstance(args[0], Tensor):
            lowered: Args = (self.node(args[0]),)
        else:
            lowered = map_tensors(args, self.node, plain=True)
        named = map_tensors(kwargs, self.node, plain=True) if kwargs else None
        # Arguments are set afterwards: create_node would search them for symbolic integers, at half its cost.
        node = self.graph.create_node(op, target, (), None, self._name(base))
        if lowered:
            node.args = lowered
        if named:
            node.kwargs = named
        return node

    def placeholder(self, name: str, t: Tensor) -> fx.Node:
        """Appends an input."""
        node = self.graph.placeholder(self._name(name))
        set_info(node, NodeInfo("input", "", (), (spec_of(t),), Cost()))
        return node

    def output(self, value: object) -> fx.Node:
        """Appends what the model returned."""
        node: fx.Node = self.graph.output(map_tensors(value, self.node, plain=True))
        return node

    def _name(self, base: str) -> str:
        """A node name that is new: the path or operation, numbered from the second use on."""
        base = base.replace(".", "_").lstrip("_") or "node"
        if not base.isidentifier():
            base = "".join(c if c.isalnum() else "_" for c in base)
            if base[0].isdigit():
                base = f"_{base}"
        count = self._names.get(base, -1) + 1
        self._names[base] = count
        if not count:
            return base
        name = f"{base}_{count}"
        return name if name not in self._names else self._name(name)

    # ------------------------------------------------------------------------------------------- origins

    def mark(self, out: object, node: fx.Node) -> None:
        """Notes that ``node`` made a tensor, or the tensors in a container."""
        if isinstance(out, Tensor):
            setattr(out, _ORIGIN, node)
            if self.transformed:
                self._set_origin(out, node)
        elif self._items:
            self._mark_pieces(out, node, ())
        else:
            for t in tensors_of(out):
                self._set_origin(t, node)

    def _set_origin(self, t: Tensor, origin: fx.Node | Piece) -> None:
        setattr(t, _ORIGIN, origin)
        if self.transformed:
            setattr(unwrapped(t), _ORIGIN, origin)

    def _origin(self, t: Tensor) -> fx.Node | Piece | None:
        """The node of this recording that made a tensor."""
        origin: fx.Node | Piece | None = getattr(t, _ORIGIN, None)
        if origin is not None and origin.graph is self.graph:
            return origin
        inner = unwrapped(t) if self.transformed else t
        return None if inner is t else self._origin(inner)

    def _maker(self, t: Tensor) -> fx.Node | None:
        """The node that made the memory of a tensor which a function transform moved the lanes of."""
        name = self._liveness.maker(t) if self.transformed else ""
        return next((node for node in self.graph.nodes if node.name == name), None) if name else None

    def _mark_pieces(self, value: object, node: fx.Node, where: tuple[object, ...]) -> None:
        if isinstance(value, Tensor):
            self._set_origin(value, Piece(node, where) if where else node)
        elif isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                self._mark_pieces(item, node, (*where, i))
        elif isinstance(value, dict):
            for key, item in value.items():
                self._mark_pieces(item, node, (*where, key))

    def known(self, t: Tensor) -> bool:
        """Whether this recording made the tensor object."""
        origin = getattr(t, _ORIGIN, None)
        if origin is None:
            return self.transformed and self._origin(t) is not None
        return origin.graph is self.graph

    def node(self, t: Tensor) -> fx.Node:
        """The node a tensor comes from; a ``get_attr`` for parameters, buffers and constants."""
        origin: Any = getattr(t, _ORIGIN, None)
        if origin is None or self._aliases or origin.graph is not self.graph:
            value = self.value(t)
            origin = getattr(value, _ORIGIN, None) or self._origin(value)
            if origin is None:  # a wrapper of one of the model's own tensors
                return self.node(unwrapped(value))
        if type(origin) is Piece:
            return self._resolve(origin, t)
        assert isinstance(origin, fx.Node)
        return origin

    def made_by(self, t: Tensor) -> fx.Node | None:
        """The node of the operation that made a tensor, alone or among several; None where the run did not make it."""
        origin = self._origin(t)
        return origin.maker if isinstance(origin, Piece) else origin

    def _resolve(self, piece: Piece, t: Tensor) -> fx.Node:
        """The node of one tensor among several, made when it is first used."""
        if piece.node is None:
            spec, node, maker = spec_of(t), piece.maker, info(piece.maker)
            for key in piece.where:
                base = f"{piece.maker.name}_{key}"
                item = self.graph.create_node("call_function", getitem, (), None, self._name(base))
                item.args = (node, key)
                set_info(item, NodeInfo("tuple_getitem", maker.path, (spec,), (spec,), Cost(), piece.maker.name))
                node = item
            piece.node = node
        return piece.node

    def value(self, t: Tensor) -> Tensor:
        """What stands for a tensor here: itself, or an alias for one that the run did not make.

        Raises `NeedsValues` if it has no form without values, or gradients flow to it through a function transform.
        """
        if self._aliases:
            alias = self._aliases.get(id(t))
            if alias is not None:
                return alias
        origin = getattr(t, _ORIGIN, None)
        if origin is not None and origin.graph is self.graph:
            return t
        inner = unwrapped(t)
        if inner is not t:
            value = self.value(inner)
            wrapper = t if self._real or value is inner else rewrapped(t, value)
            if wrapper is None:
                raise NeedsValues("a function transform takes gradients of the model's own weights")
            return wrapper
        name, known = self._inventory.owned.get(id(t), ("", None))
        if known is None and not isinstance(t, nn.Parameter):
            maker = self._maker(t)
            if maker is not None:
                self._set_origin(t, maker)
                return t
        alias = self._alias(name, t)
        self._aliases[id(t)] = alias
        self._held.append(t)
        self._liveness.ignore(alias)
        lost = known is None and t.is_meta and not isinstance(t, nn.Parameter)
        self._set_origin(alias, self._attribute(name, t, lost=lost))
        return alias

    def _alias(self, name: str, t: Tensor) -> Tensor:
        if self._real:
            values = self._materialized(name, t) if t.is_meta else t.detach()
            return values if isinstance(t, nn.Parameter) else values.clone()
        if t.is_meta:
            return t.detach()
        if has_shape_only(t) and (isinstance(t, nn.Parameter) or t.numel() > _CONSTANT_LIMIT):
            return to_meta(t.detach())
        return t.detach().clone()

    def meta_value(self, t: Tensor) -> Tensor:
        """The same, on ``meta``."""
        value = self.value(t)
        if value.is_meta:
            return value
        if not has_shape_only(t):
            raise NeedsValues(f"a {kind_of(t)} tensor has no form without values")
        inner = unwrapped(value)
        wrapper = to_meta(value) if inner is value else rewrapped(value, to_meta(inner))
        if wrapper is None:
            raise NeedsValues("a function transform takes gradients of the model's own weights")
        return wrapper

    def written(self, t: Tensor, node: fx.Node, *, on_meta: bool) -> None:
        """Notes that ``node`` wrote into a tensor of the model's code: it is its origin from now on.

        ``on_meta`` says that the values written are not there, so that the tensor's own are void.
        """
        value = self.value(t)
        if on_meta and not value.is_meta:
            self._aliases[id(t)] = value = to_meta(value)
            self._held.append(t)
        self._set_origin(value, node)

    def overwritten(self, t: Tensor) -> bool:
        """Whether a tensor with values of its own stands for one without."""
        alias = self._aliases.get(id(t))
        return alias is not None and alias.is_meta

    def _attribute(self, name: str, t: Tensor, *, lost: bool) -> fx.Node:
        op = "get_attr"
        if lost:
            self.lost += 1
            name, op = f"_lost{self.lost}", "unknown"
        elif not name:
            name = f"_constant{len(self.constants)}"
            self.constants[name] = t
            if isinstance(t, nn.Parameter):
                self.outside.append(t)
        node = self._attributes.get(name)
        if node is None:
            node = self.graph.create_node("get_attr", name, (), None, self._name(name))
            set_info(node, NodeInfo(op, name.rpartition(".")[0], (), (spec_of(t),), Cost()))
            self._attributes[name] = node
        return node

    def _materialized(self, name: str, t: Tensor) -> Tensor:
        """Seeded values for a weight that has none: small normal weights, unit variances, zeros elsewhere."""
        one = name.endswith("running_var") or (t.dim() <= 1 and name.endswith("weight"))
        if t.is_floating_point() and not one and isinstance(t, nn.Parameter) and t.dim() > 1:
            generator = torch.Generator().manual_seed(0)
            values = torch.randn(t.shape, dtype=torch.float32, generator=generator, device="cpu").mul_(
                prod(t.shape[1:]) ** -0.5
            )
            return values.to(self._device, t.dtype)
        return torch.full(t.shape, t.is_floating_point() and one, dtype=t.dtype, device=self._device)
