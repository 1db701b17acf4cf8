"""`RemoveInferenceNoise`: what does nothing in evaluation goes. Exact in evaluation.

Dropout of every kind, stochastic depth and drop path become identities, so that what lies on both sides of them can be
fused. Torch's own modules are known by their class; others are taken where their class says that they drop something
and they return the very tensor that they are given. Identities in code that has become a graph are left out of it by
the passes that made the graph. One that is in training mode in a model that is not is meant to drop, and stays.

In code: functional dropouts that keep a layer from what is behind it, results that nobody reads, the first of two
``contiguous`` or reshapes in a row, permutations that undo each other, equal calls on the same tensors. They are found
in the captured graph, where all writes into tensors and all readers of a result are known. A result that nobody reads
is looked for outwards: where nothing of what a module makes is read, the call of that module goes. Views cost nothing,
so only in pairs are they worth a graph.
"""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from ..capturing.records import Capture, info
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..core.records import Json
from ..edit.actions.evaluation import DROPS
from ..edit.actions.simplify import CODE, called, doubled, pure, undone
from ..layers.known import drops, hooked, stock_dropout
from .base import Pass, Proposal
from .patterns import Graph


class RemoveInferenceNoise(Pass):
    """Makes identities of modules that only act in training."""

    name = "remove-inference-noise"
    summary = "dropout and stochastic depth become identities; dead, repeated and undone operations leave the code"
    exact = "eval"

    def propose(self, capture: Capture) -> list[Proposal]:
        proposals: list[Proposal] = []
        modules = dict(capture.model.named_modules(remove_duplicate=False))
        called = {id(modules.get(str(node.target))) for node in capture.graph.nodes if node.op == "call_module"}
        for path, module in capture.model.named_modules():
            if not path or not drops(module) or (stock_dropout(module) and id(module) not in called):
                continue
            if module.training and not capture.model.training:
                detail = "in training mode in a model that is not, so it is meant to drop; call eval() on it, too"
                proposals.append(Skip(path, SkipReason.EXCLUDED, detail))
            elif hooked(module):
                proposals.append(Skip(path, SkipReason.HOOKS, "has a hook, which would no longer be called; remove it"))
            else:
                settings = {"kind": type(module).__name__}
                proposals.append(Op("remove", path, self.name, settings, Estimate(0, 0, 0, 0)))
        return [*proposals, *_code_ops(Graph(capture))]


def _code_ops(graph: Graph) -> list[Op]:
    """One op for each module whose code has something to remove."""
    found: dict[str, dict[str, list[Json]]] = {}
    for node in graph.nodes:
        before = node.args[0] if node.args else None
        if node.op not in ("call_function", "call_method") or not isinstance(before, fx.Node):
            continue
        near = info(before).path == info(node).path
        if (near and _pair(node, before)) or _blocks(graph, node, before):
            found.setdefault(info(node).path, {})
    for scope, first, second in _duplicates(graph):
        found.setdefault(scope, {}).setdefault("same", []).append([first, second])
    priced = {scope for scope, settings in found.items() if settings}  # MACs go, too
    for scope, path in _unread(graph):
        priced.add(scope)
        unread = [] if path is None else [path]
        found.setdefault(scope, {}).setdefault("unread", []).extend(unread)
    ops = []
    for path, lists in found.items():
        settings = {"kind": CODE} | {key: value for key, value in lists.items() if value}
        estimate = None if path in priced else Estimate(0, 0, 0, 0)
        ops.append(Op("remove", path, RemoveInferenceNoise.name, settings, estimate))
    return ops


def _pair(node: fx.Node, before: fx.Node) -> bool:
    return undone(node, before) or (doubled(node, before) and len(before.users) == 1)


def _blocks(graph: Graph, node: fx.Node, before: fx.Node) -> bool:
    """Whether a node is a functional dropout that stands between a layer and what could be fused with it."""
    if node.op != "call_function" or node.target not in DROPS or node.kwargs.get("training") is not False:
        return False
    return graph.sole_reader(before) is node and (before.name in graph.layers or info(before).op == "batch_norm")


def _duplicates(graph: Graph) -> list[tuple[str, Json, Json]]:
    """Pairs of equal calls in one module's code: its path, and both calls."""
    found: list[tuple[str, Json, Json]] = []
    seen: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, ...], tuple[fx.Node, Json]] = {}
    for node in graph.nodes:
        scope = _scope(node)
        what = called(node, scope)
        this = [what, seen[scope, what]]
        seen[scope, what] += 1
        if not info(node).cost.write_bytes or not (pure(node) or _plain(graph, node)):
            continue
        key = (scope, what, str(node.args), str(node.kwargs))
        other, that = first.setdefault(key, (node, this))
        inputs = node.all_input_nodes if other is not node else []
        shared = {graph.root_of(n) for n in graph.nodes if info(n).alias_of} if inputs else set()
        kept = not any(info(n).alias_of or n.name in shared for n in (other, node))  # so nothing writes into it
        if inputs and kept and not any(graph.written(held, other, node) for held in inputs):
            found.append((scope, that, this))
    return found


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
    unread: set[tuple[str, str | None]] = set()
    kept: set[fx.Node] = set()  # the module's code returns these, or computes with them what it returns
    for node in (node for node in reversed(graph.nodes) if node in dead):
        path, inner = info(node).path, None
        while path and not alive[path] and _quiet(graph.modules.get(path)):
            inner, path = path, path.rpartition(".")[0]
        if path in info(node).returned or not kept.isdisjoint(node.users):
            kept.add(node)
        elif info(node).cost.write_bytes and (inner is not None or node.op != "call_module"):
            unread.add((path, inner))
    return sorted(unread, key=str)


def _quiet(module: nn.Module | None) -> bool:
    """Whether a module is torch's own through and through, with nobody looking on."""
    return module is not None and all(
        type(m).__module__.split(".")[0] == "torch" and not hooked(m) for m in module.modules()
    )


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
