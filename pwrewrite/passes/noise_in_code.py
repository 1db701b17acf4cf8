"""What does nothing in evaluation and is a call in some module's code: `code_ops`, for `RemoveInferenceNoise`.

Found in the captured graph, where all writes into tensors and all readers of a result are known, and told to the action
by the module whose code makes the calls. A result that nobody reads is looked for outwards: where nothing of what a
module makes is read, the call of that module goes. Views cost nothing, so only in pairs are they worth a graph.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx, nn

from ..capturing.records import info
from ..core.plan import Estimate, Op
from ..edit.actions.evaluation import DROPS
from ..edit.actions.simplify import CODE, called, doubled, pure, undone
from ..layers.known import hooked
from .patterns import Graph


def code_ops(graph: Graph, name: str) -> list[Op]:
    """One op for each module whose code has something to remove.

    Args:
        graph: The model.
        name: Name of the pass.
    """
    found: dict[str, _Scope] = {}
    for node in graph.nodes:
        before = node.args[0] if node.args else None
        if node.op not in ("call_function", "call_method") or not isinstance(before, fx.Node):
            continue
        near = info(before).path == info(node).path
        if (near and _pair(node, before)) or _blocks(graph, node, before):
            found.setdefault(info(node).path, _Scope())
    for scope, first, second in _duplicates(graph):
        found.setdefault(scope, _Scope()).same.append([first, second])
    for scope, path in _unread(graph):
        entry = found.setdefault(scope, _Scope())
        entry.priced = True
        if path is not None and path not in entry.unread:
            entry.unread.append(path)
    return [entry.op(path, name) for path, entry in found.items()]


class _Scope:
    """What one module's code has to remove."""

    def __init__(self) -> None:
        self.same: list[Any] = []
        self.unread: list[str] = []
        self.priced = False

    def op(self, path: str, name: str) -> Op:
        settings: dict[str, Any] = {"kind": CODE}
        if self.same:
            settings["same"] = self.same
        if self.unread:
            settings["unread"] = self.unread
        known = not self.priced and not self.same  # else MACs go, too
        return Op("remove", path, name, settings, Estimate(0, 0, 0, 0) if known else None)


def _pair(node: fx.Node, before: fx.Node) -> bool:
    return undone(node, before) or (doubled(node, before) and len(before.users) == 1)


def _blocks(graph: Graph, node: fx.Node, before: fx.Node) -> bool:
    """Whether a node is a functional dropout that stands between a layer and what could be fused with it."""
    if node.op != "call_function" or node.target not in DROPS or node.kwargs.get("training") is not False:
        return False
    return graph.sole_reader(before) is node and (before.name in graph.layers or info(before).op == "batch_norm")


def _duplicates(graph: Graph) -> list[tuple[str, Any, Any]]:
    """Pairs of equal calls in one module's code: its path, and both calls."""
    found: list[tuple[str, Any, Any]] = []
    seen: Counter[tuple[str, str]] = Counter()
    first: dict[Any, tuple[fx.Node, Any]] = {}
    for node in graph.nodes:
        scope = _scope(node)
        what = called(node, scope)
        this = [what, seen[scope, what]]
        seen[scope, what] += 1
        if not info(node).cost.write_bytes or not (pure(node) or _plain(graph, node)):
            continue
        key = (scope, what, str(node.args), str(node.kwargs))
        if key not in first:
            first[key] = (node, this)
            continue
        other, that = first[key]
        inputs = node.all_input_nodes
        if inputs and not any(graph.written(held, other, node) for held in inputs) and _kept(graph, other, node):
            found.append((scope, that, this))
    return found


def _kept(graph: Graph, *nodes: fx.Node) -> bool:
    """Whether nothing shares the storage of these results, and so nothing writes into it."""
    return all(info(n).alias_of is None for n in nodes) and not any(
        info(other).alias_of and graph.root_of(other) in {n.name for n in nodes} for other in graph.nodes
    )


def _unread(graph: Graph) -> list[tuple[str, str | None]]:
    """Results that nobody reads: the module whose code makes the call, and what it calls where that is a module."""
    dead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if all(user in dead for user in node.users) and (pure(node) or _plain(graph, node)):
            dead.add(node)
    alive = Counter[str]()
    for node in graph.nodes:
        if node not in dead and node.op not in ("placeholder", "output", "get_attr"):
            path = info(node).path
            while path:
                alive[path] += 1
                path = path.rpartition(".")[0]
    found: list[tuple[str, str | None]] = []
    for node in dead:
        facts = info(node)
        if not facts.cost.write_bytes:
            continue
        path, inner = facts.path, None
        while path and not alive[path] and _quiet(graph.modules.get(path)):
            inner, path = path, path.rpartition(".")[0]
        if inner is not None or node.op != "call_module":
            found.append((path, inner))
    return sorted(set(found), key=str)


def _quiet(module: nn.Module | None) -> bool:
    """Whether a module is torch's own through and through, with nobody looking on."""
    if module is None:
        return False
    return all(type(m).__module__.split(".")[0] == "torch" and not hooked(m) for m in module.modules())


def _plain(graph: Graph, node: fx.Node) -> bool:
    """Whether a node is the call of a module that computes something from its input, and nothing else."""
    if node.op != "call_module":
        return False
    module = graph.modules.get(str(node.target))
    return _quiet(module) and not getattr(module, "training", True) and not getattr(module, "inplace", False)


def _scope(node: fx.Node) -> str:
    """The module whose code makes a call."""
    path = info(node).path
    return path.rpartition(".")[0] if node.op == "call_module" else path
