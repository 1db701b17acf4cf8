"""What the fusing passes ask of a captured graph: who reads a tensor, what is an activation, who else calls a module.

A pattern is safe to fuse only if nobody else sees what lies between: each node has one reader, which reads it once,
and each module in it is called once in the whole graph. Checking a node's readers alone is not enough; it is how
public tools corrupt a convolution that is called twice (pytorch#104593).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from ..capturing.control_flow import always_follows
from ..capturing.eligibility import Owners
from ..capturing.records import Capture, Layer, info
from ..core.operations import OPERATIONS
from ..layers.known import Found, call_activation, drops, is_identity, module_activation

_PASSES_ON = frozenset({"identity", "dropout"})
UNFUSED = frozenset(name for row in OPERATIONS if row.kind == "activation" and row.kernel is None for name in row.names)
"""Activations without a fused kernel."""


_Callee = str | fx.Node
"""What code calls: a module, by its path, or a function, by its node."""

_Link = tuple[_Callee, _Callee | None, _Callee | None]
"""A module whose code hands what the second returns (its own input where None) to the third (its output where None)."""


class Graph:
    """A captured graph as the fusing passes read it.

    Attributes:
        nodes: Its nodes in order.
        modules: Path to module, every alias included.
        owners: Who holds and reads which parameter.
        calls: Path to how many nodes call that module.
        layers: Name of a node to the layer that it calls.
    """

    def __init__(self, capture: Capture) -> None:
        self.nodes = list(capture.graph.nodes)
        self.named = {node.name: node for node in self.nodes}
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.owners = Owners(capture)
        self.modules: Mapping[str, nn.Module] = self.owners.modules
        self.calls = Counter(str(node.target) for node in self.nodes if node.op == "call_module")
        self.layers: dict[str, Layer] = {call.node: layer for layer in capture.layers for call in layer.calls}
        self.code: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if node.op in ("call_function", "call_method"):
                self.code.setdefault(info(node).path, []).append(node)
        self.inside = Counter({path: len(nodes) for path, nodes in self.code.items()})
        self._links: dict[tuple[_Callee, _Callee | None, _Callee | None, bool], str | None] = {}

    def sole_reader(self, node: fx.Node) -> fx.Node | None:
        """The one node that reads another, once."""
        if len(node.users) != 1:
            return None
        reader = next(iter(node.users))
        return reader if _count(reader, node) == 1 else None

    def onward(self, node: fx.Node, *, dropouts: bool = True) -> fx.Node:
        """The last of the identities behind a node, where each has one reader; the node itself where none follows.

        Args:
            node: The node.
            dropouts: Whether dropouts count, which are identities in evaluation only.
        """
        while True:
            reader = self.sole_reader(node)
            if reader is None or not passes_on(reader) or not (dropouts or info(reader).op == "identity"):
                return node
            node = reader

    def back(self, node: Any) -> Any:
        """The node before the identities that lead to a node, where each has one reader."""
        while isinstance(node, fx.Node) and passes_on(node) and node.args and isinstance(node.args[0], fx.Node):
            if len(node.args[0].users) != 1:
                return node
            node = node.args[0]
        return node

    def activation(self, node: fx.Node) -> tuple[Found, str] | None:
        """The activation that a node is, and the path of its module.

        The path is empty for a function that other code calls, be it only one that scales the result.
        """
        if node.op == "call_module":
            found = module_activation(self.modules[str(node.target)])
            return None if found is None else (found, str(node.target))
        found = call_activation(node)
        if found is None:
            return None
        path = info(node).path
        alone = bool(path) and self.wraps(path) and all(call_activation(n) == found for n in self.code[path])
        return found, path if alone else ""

    def wraps(self, path: str) -> bool:
        """Whether a module is nothing but the calls of one function: no children, no weights."""
        module = self.modules.get(path)
        if module is None or any(True for _ in module.children()):
            return False
        return not any(True for _ in (*module.parameters(), *module.buffers()))

    def calls_of(self, path: str) -> int:
        """How many nodes a module made: its calls where it is a leaf, the calls inside where it is not."""
        return self.calls[path] + self.inside[path]

    def is_call_of(self, node: fx.Node, path: str) -> bool:
        """Whether a node is a call of a module, or of the function that is all its code does."""
        return str(node.target) == path if node.op == "call_module" else node in self.code.get(path, ())

    def names_of(self, module: nn.Module) -> list[str]:
        """Every path of a module."""
        return [path for path, other in self.modules.items() if other is module]

    def root_of(self, node: fx.Node) -> str:
        """Name of the node that made the storage of a node's output."""
        seen = set[str]()
        name: str = node.name
        while name not in seen:
            seen.add(name)
            name = info(self.named[name]).alias_of or name
        return name

    def written(self, held: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether a node between two others may write into what a third holds: shares its storage, is no identity."""
        root = self.root_of(held)
        between = [node for node in self.nodes[self.order[first] + 1 : self.order[last]] if not passes_on(node)]
        items = [node.args[0] for node in between if info(node).op == "setitem"]  # returns nothing that shares storage
        return any(self.root_of(node) == root for node in (*between, *items) if isinstance(node, fx.Node))

    def private(self, node: fx.Node) -> bool:
        """Whether what a node makes, and all that shares its storage, is read by one node only, each by the next.

        Writing into it is then the same as making another one.
        """
        while len(node.users) == 1 and node.op not in ("placeholder", "get_attr"):
            held = info(node).alias_of
            if held is None:
                return True
            node = self.named[held]
        return False

    def unfixed(self, first: fx.Node, then: fx.Node, *, only: bool = True) -> str | None:
        """Why code may connect two nodes for some inputs only: on other values or sizes it takes another way.

        Asked of every module whose code passes the result on. A call in such code itself (a function) is not asked
        about: that code becomes a graph, which only code without decisions can.

        Args:
            first: The node that makes a tensor.
            then: The node that reads it.
            only: Whether the second module may read nothing else in any of its calls, as one that is taken out.

        Returns:
            A clause for a message; None where the two are connected for every input.
        """
        up, down = self._stack(first), self._stack(then)
        shared = 0
        while shared < min(len(up), len(down)) - 1 and up[shared] == down[shared]:
            shared += 1
        links: list[_Link] = [(up[shared - 1], up[shared], down[shared])] if shared else []
        links += [(owner, callee, None) for owner, callee in zip(up[shared:], up[shared + 1 :])]
        links += [(owner, None, callee) for owner, callee in zip(down[shared:], down[shared + 1 :])]
        for link in links:
            if (*link, only) not in self._links:
                self._links[*link, only] = self._link(*link, only)
            if self._links[*link, only] is not None:
                return self._links[*link, only]
        return None

    def _stack(self, node: fx.Node) -> list[_Callee]:
        """Paths of the modules whose code was running, and what was called in the end: a path, or a function's node."""
        callers: list[_Callee] = list(info(node).callers)
        return [*callers, str(node.target) if node.op == "call_module" else node]

    def _link(self, owner: _Callee, first: _Callee | None, then: _Callee | None, only: bool) -> str | None:
        module = self.modules.get(owner) if isinstance(owner, str) else None
        if module is None or isinstance(first, fx.Node) or isinstance(then, fx.Node):
            return None
        if any(end is not None and (end not in self.modules or end == owner) for end in (first, then)):
            return f"the code of {owner or 'the model'} calls a layer that is no submodule of it, such as one in a list"
        before, behind = (None if end is None else self.modules[end] for end in (first, then))
        fixed = always_follows(module, before, behind, lambda m: is_identity(m) or drops(m), only=only)
        if fixed:
            return None
        where = f"the code of {owner}" if owner else "the model's own code"
        if fixed is None:
            return f"{where} decides by values or sizes in a way that cannot be followed"
        return f"{where} connects them for some inputs only"

    def where(self, node: fx.Node) -> str:
        """A path for what a node does: its module's, or its scope's and its name."""
        if node.op == "call_module":
            return str(node.target)
        path = info(node).path
        return f"{path}.{node.name}" if path else str(node.name)


def overwriter(capture: Capture, layer: Layer) -> fx.Node | None:
    """The first node that writes in place into what a layer has read."""
    roots: dict[str, str] = {}
    calls, read = {call.node for call in layer.calls}, set[str]()
    for node in capture.graph.nodes:
        facts = info(node)
        roots[node.name] = root = roots.get(facts.alias_of or "", node.name)
        if facts.op == "setitem":  # returns nothing that shares storage
            root = roots[node.args[0].name]
        if root in read and (facts.cost.write_bytes or facts.op == "setitem" or "out" in node.kwargs):
            return node  # type: ignore[no-any-return]
        if node.name in calls:
            read.update(roots[source.name] for source in node.all_input_nodes)
    return None


def passes_on(node: fx.Node) -> bool:
    """Whether a node returns what it is given, in evaluation."""
    return node.op == "call_module" and info(node).op in _PASSES_ON


def _count(reader: fx.Node, node: fx.Node) -> int:
    found: list[fx.Node] = []

    def note(argument: fx.Node) -> fx.Node:
        found.append(argument)
        return argument

    fx.node.map_arg((reader.args, reader.kwargs), note)
    return sum(one is node for one in found)


def plain_weight(weight: Any) -> bool:
    """Whether a weight is a plain tensor of real floating-point numbers."""
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and not weight.is_quantized


def tensor(graph: Graph, name: str) -> Tensor | None:
    """The parameter or buffer of a full name."""
    path, _, attribute = name.rpartition(".")
    found = getattr(graph.modules.get(path), attribute, None)
    return found if isinstance(found, Tensor) else None
