"""What the fusing passes ask of a captured graph: who reads a tensor, what is an activation, who else calls a module.

A pattern is safe to fuse only if nobody else sees what lies between: each node has one reader, which reads it once,
and each module in it is called once in the whole graph. Checking a node's readers alone is not enough; it is how
public tools corrupt a convolution that is called twice (pytorch#104593).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from functools import cache, cached_property

from torch import Tensor, fx, nn

from ..capturing.code_trace import NotTraceable, trace
from ..capturing.control_flow import Key, Ways, handed_on
from ..capturing.eligibility import Owners, eligible
from ..capturing.records import Capture, Layer, info
from ..core.operations import OPERATIONS
from ..core.plan import Skip, SkipReason
from ..edit.swap import stem
from ..layers.known import Found, bare, call_activation, drops, is_identity, module_activation
from ..layers.written_out import written_out

UNFUSED = frozenset(name for row in OPERATIONS if row.kind == "activation" and row.kernel is None for name in row.names)
"""Activations without a fused kernel."""

_Callee = str | fx.Node
"""What code calls: a module, by its path, or a function, by its node."""


class Graph:
    """A captured graph as the fusing passes read it.

    Attributes:
        modules: Path to module, every alias included.
        calls: Path to how many nodes call that module; ``code`` to the functions that its own code calls.
        layers: Name of a node to the layer that it calls.
        ways: All ways through a module's own code, as `paths` of `capturing.control_flow`.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture, self.owners = capture, Owners(capture)
        self.nodes: list[fx.Node] = list(capture.graph.nodes)
        self.named = {node.name: node for node in self.nodes}
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.modules = self.owners.modules
        self.calls = Counter(str(node.target) for node in self.nodes if node.op == "call_module")
        self.layers: dict[str, Layer] = {call.node: layer for layer in capture.layers for call in layer.calls}
        self.code: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if node.op in ("call_function", "call_method"):
                self.code.setdefault(info(node).path, []).append(node)
        self._ways = Ways()
        self.ways = self._ways.graphs
        self._plain = cache(_is_plain)
        self._link = cache(self._unlinked)

    def sole_reader(self, node: fx.Node) -> fx.Node | None:
        """The one node that reads another, once."""
        if len(node.users) != 1:
            return None
        reader, reads = next(iter(node.users)), list[fx.Node]()
        fx.node.map_arg((reader.args, reader.kwargs), reads.append)
        return reader if reads.count(node) == 1 else None

    def onward(self, node: fx.Node, *, dropouts: bool = True) -> fx.Node:
        """The last of the identities (and ``dropouts``) behind a node, where each has one reader; else the node."""
        while (reader := self.sole_reader(node)) and passes_on(reader) and (dropouts or info(reader).op == "identity"):
            node = reader
        return node

    def back(self, node: object) -> object:
        """The node before the identities that lead to a node, where each has one reader."""
        while isinstance(node, fx.Node) and passes_on(node) and node.args and isinstance(node.args[0], fx.Node):
            if len(node.args[0].users) != 1:
                return node
            node = node.args[0]
        return node

    def activation(self, node: fx.Node) -> tuple[Found, str] | None:
        """The activation that a node is, and the path of its module; empty for a function that other code calls."""
        if node.op == "call_module":
            found = module_activation(self.modules[str(node.target)])
            return None if found is None else (found, str(node.target))
        if (found := call_activation(node)) is None:
            return None
        path = info(node).path
        alone = bool(path) and self.wraps(path) and all(call_activation(n) == found for n in self.code[path])
        if alone and not self._plain(self.modules[path]):
            return None
        return found, path if alone else ""

    def wraps(self, path: str) -> bool:
        """Whether a module is nothing but the calls of one function: no children, no weights."""
        return path in self.modules and bare(self.modules[path])

    def calls_of(self, path: str) -> int:
        """How many nodes a module made: its calls where it is a leaf, the calls inside where it is not."""
        return self.calls[path] + len(self.code.get(path, ()))

    def is_call_of(self, node: fx.Node, path: str) -> bool:
        """Whether a node is a call of a module, or of the function that is all its code does."""
        return str(node.target) == path if node.op == "call_module" else node in self.code.get(path, ())

    def names_of(self, module: nn.Module) -> list[str]:
        """Every path of a module."""
        return [path for path, other in self.modules.items() if other is module]

    def readers(self, path: str, *names: str) -> list[fx.Node]:
        """The nodes that read tensors which a module holds under some names other than by calling it."""
        return [user for name in names for read in self.owners.reads.get(stem(path) + name, ()) for user in read.users]

    def shares(self, module: nn.Module, *, recurse: bool = True) -> bool:
        """Whether another module holds a parameter of this one, too."""
        return any(len(self.owners.holders.get(id(p), ())) > 1 for p in module.parameters(recurse))

    def unfusable(self, layer: Layer) -> Skip | None:
        """Why a layer may not be replaced by another module; None where it may."""
        refusal = eligible(self.capture, layer, self.owners)
        if refusal is None and layer.functional:
            return Skip(layer.path, SkipReason.FUNCTIONAL, "a functional call; make it a module")
        return refusal

    def root_of(self, node: fx.Node) -> str:
        """Name of the node that made the storage of a node's output."""
        name, alias = node.name, info(node).alias_of
        while alias and alias != name:
            name, alias = alias, info(self.named[alias]).alias_of
        return name

    def written(self, held: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether a node between two others may write into what a third holds: shares its storage, is no identity."""
        places = self._sharing.get(self.root_of(held), [])
        return bisect_right(places, self.order[first]) < bisect_left(places, self.order[last])

    @cached_property
    def _sharing(self) -> dict[str, list[int]]:
        """Name of the node that made a storage to the places in order of those that share it and are no identities."""
        sharing: dict[str, list[int]] = {}
        for place, node in enumerate(self.nodes):
            for root in () if passes_on(node) else {self.root_of(node), self.root_of(_target(node))}:
                sharing.setdefault(root, []).append(place)
        return sharing

    @cached_property
    def writers(self) -> dict[str, list[fx.Node]]:
        """Name of the node that made a storage to the nodes that write into it."""
        writers: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            writes = info(node).cost.write_bytes or info(node).op == "setitem" or "out" in node.kwargs
            if writes and node.op != "output":
                writers.setdefault(self.root_of(_target(node)), []).append(node)
        return writers

    def overwriter(self, layer: Layer) -> fx.Node | None:
        """The first node that writes in place into what a layer has read."""
        calls = [self.named[call.node] for call in layer.calls]
        reads = [(call, root) for call in calls for root in map(self.root_of, call.all_input_nodes)]
        later = (n for call, root in reads for n in self.writers.get(root, ()) if self.order[n] > self.order[call])
        return min(later, key=self.order.__getitem__, default=None)

    def private(self, node: fx.Node) -> bool:
        """Whether one node only reads what a node makes and all that shares its storage: writing into it is safe."""
        while len(node.users) == 1 and node.op not in ("placeholder", "get_attr"):
            held = info(node).alias_of
            if held is None or held == node.name:
                return True
            node = self.named[held]
        return False

    def unfixed(self, first: fx.Node, then: fx.Node, *, only: bool = True) -> str | None:
        """Why code may connect two nodes for some inputs only: on other values or sizes it takes another way.

        Asked of every module whose code passes the result on. A call in such code itself (a function) is not asked
        about: that code becomes a graph, which only code without decisions can.

        With ``only``, the second module may read nothing else in any of its calls, as one that is taken out.
        """
        up, down = stack_of(first), stack_of(then)
        shared = 0
        while shared < min(len(up), len(down)) - 1 and up[shared] == down[shared]:
            shared += 1
        # Each link: a module whose code hands what the second returns (its own input where None) to the third; from
        # the innermost one out to the code that has both, since each may put it into a tuple, and in again.
        links = [
            *((owner, callee, None) for owner, callee in reversed([*zip(up[shared:], up[shared + 1 :])])),
            *([(up[shared - 1], up[shared], down[shared])] if shared else []),
            *((owner, None, callee) for owner, callee in zip(down[shared:], down[shared + 1 :])),
        ]
        key: Key | str = ()
        for link in links:
            key = self._link(*link, key, only)
            if isinstance(key, str):
                return key
        return None

    def _unlinked(self, owner: _Callee, first: _Callee | None, then: _Callee | None, key: Key, only: bool) -> Key | str:
        """Where a link hands on what lies at a key of its source's value; or a text that says why not always."""
        module = self.modules.get(owner) if isinstance(owner, str) else None
        if module is None or isinstance(first, fx.Node) or isinstance(then, fx.Node):
            return ()
        if any(end is not None and (end not in self.modules or end == owner) for end in (first, then)):
            return f"the code of {owner or 'the model'} calls a layer that is no submodule of it, such as one in a list"
        before, behind = (None if end is None else self.modules[end] for end in (first, then))
        found = handed_on(module, before, behind, _passing, key=key, only=only, ways=self.ways)
        where = f"the code of {owner}" if owner else "the model's own code"
        if found is None:
            line = None if self.ways(module) is not None else self._ways.unfollowed(module)
            return f"{where} decides by values or sizes in a way that cannot be followed" + (
                f": {line}" if line else ""
            )
        return f"{where} {found}" if isinstance(found, str) else found

    def where(self, node: fx.Node) -> str:
        """A path for what a node does: its module's, or its scope's and its name."""
        return str(node.target) if node.op == "call_module" else f"{info(node).path}.{node.name}".removeprefix(".")


def _is_plain(module: nn.Module) -> bool:
    """Whether what a module calls is all there is to it: no gradients of its own, as of a `torch.autograd.Function`."""
    try:
        trace(module)
    except NotTraceable:
        return written_out(module) is not None
    return True


def _passing(module: nn.Module) -> bool:
    return is_identity(module) or drops(module)


def stack_of(node: fx.Node) -> list[_Callee]:
    """Paths of the modules whose code was running, and what was called in the end: a path, or a function's node."""
    return [*info(node).callers, str(node.target) if node.op == "call_module" else node]


def _target(node: fx.Node) -> fx.Node:
    """What shares storage with what a node writes: its output, or what it assigns items to, which returns nothing."""
    item = node.args[0] if info(node).op == "setitem" else None
    return item if isinstance(item, fx.Node) else node


def tensor_of(owners: Owners, name: str) -> Tensor | None:
    """The parameter or buffer of a full name."""
    path, _, attribute = name.rpartition(".")
    tensor = getattr(owners.modules.get(path), attribute, None)
    return tensor if isinstance(tensor, Tensor) else None


def passes_on(node: fx.Node) -> bool:
    """Whether a node returns what it is given, in evaluation."""
    return node.op == "call_module" and info(node).op in ("identity", "dropout")
