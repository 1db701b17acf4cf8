"""``remove``: a module that does nothing in evaluation becomes an identity, or goes out of another one's own code.

That code becomes a graph (the kind ``code``). What goes: functional dropouts; calls whose result nobody reads; the
first of two ``contiguous`` or reshapes in a row, both of two permutations that undo each other; and the second of two
equal calls.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from ...capturing.functions import VALUE_READS, argument, function_name, writes
from ...core.errors import shortened
from ...core.plan import Edit, Op
from ...layers.known import drops
from ..graph_edit import Regraphed, drop_identities, drop_node, finish
from ..swap import stem
from .bench import Bench, not_traced
from .evaluation import DROPS, function_of, numbered
from .settings import Offset, wrong

CODE = "code"  # the kind of a ``remove`` on code
RESHAPES = frozenset({"reshape", "view", "flatten"})
"""Functions and methods that give the same numbers another shape."""

RANDOM = ("rand", "bernoulli", "multinomial", "normal", "poisson", "dropout", "rrelu", "exponential", "uniform", "seed")
"""Parts of the names of functions that draw numbers, or set what does."""

Call = tuple[str, Offset]
"""A call in some code: what is called (see `called`), and how often the code called it before."""


@dataclass(frozen=True)
class RemoveSettings:
    """Settings of ``remove``: name of the module's class."""

    kind: str


@dataclass(frozen=True)
class SimplifySettings:
    """Settings of a ``remove`` on code: paths of modules whose result nobody reads, and pairs of equal calls."""

    kind: str
    unread: tuple[str, ...] = ()
    same: tuple[tuple[Call, Call], ...] = ()


def remove_module(bench: Bench, op: Op, settings: RemoveSettings) -> Edit:
    """Carries out a ``remove`` op."""
    module = bench.find(op, op.path)
    if type(module).__name__ != settings.kind or not drops(module):
        message, expected = "the plan removes a module that does something here", "that drops only in training"
        raise wrong(op, "path", message, f"a {settings.kind} {expected}", shortened(str(module), 80))
    bench.check_removable(op, op.path, module)
    return Edit(op, "module", "remove", exact="eval", aliases=bench.remove(module, op.path))


def simplify_code(bench: Bench, op: Op, settings: SimplifySettings) -> Edit:
    """Carries out a ``remove`` op on code."""
    module = bench.find(op, op.path)
    graph_module = bench.graph(op, module, DROPS)
    if settings.same and any(node.target is operator.setitem for node in graph_module.graph.nodes):
        raise not_traced(op, "the code assigns items, behind which an equal call may give something else")
    unread = {path.removeprefix(stem(op.path)) for path in settings.unread}
    if not _simplified(graph_module, unread, settings.same):
        raise not_traced(op, "nothing in its own code goes unread there, or is computed twice")
    aliases = bench.replace(module, graph_module, op.path)
    return Edit(op, "graph", "simplify", exact="eval", aliases=aliases, graph_module=op.path)


def _simplified(graph_module: Regraphed, unread: set[str], same: tuple[tuple[Call, Call], ...]) -> bool:
    """Takes what does nothing out of a graph; whether that was anything, and no unread module is called any more."""
    nodes, size = graph_module.graph.nodes, len(graph_module.graph.nodes)
    calls = numbered(graph_module.graph, called)
    for first, second in same:
        a, b = calls.get(first), calls.get(second)
        if a is not None and b is not None and a is not b and (a.args, a.kwargs) == (b.args, b.kwargs):
            drop_node(b, a)
    for node in list(nodes):
        source = argument(node, 0, "input")
        dropout = node.op == "call_function" and node.target in DROPS and node.kwargs.get("training") is False
        if isinstance(source, fx.Node) and dropout:
            drop_node(node, source)
    drop_identities(graph_module)
    _join_pairs(graph_module)
    for node in reversed(list(nodes)):
        silent = node.op == "get_attr" or (node.op == "call_module" and str(node.target) in unread)
        if not node.users and (silent or pure(node)):
            graph_module.graph.erase_node(node)
    finish(graph_module)
    return len(nodes) < size and not any(node.op == "call_module" and str(node.target) in unread for node in nodes)


def _join_pairs(graph_module: Regraphed) -> None:
    """Takes out what the next call in a row does too, or undoes."""
    written = writes_anywhere(graph_module)
    for node in list(graph_module.graph.nodes):
        while isinstance(before := node.args[0] if node.args else None, fx.Node):
            source = before.args[0] if before.args else None
            if not isinstance(source, fx.Node):
                break
            if undone(node, before):
                drop_node(node, source)
                break
            if written or len(before.users) > 1 or not doubled(node, before):
                break
            node.update_arg(0, source)
            graph_module.graph.erase_node(before)


def writes_anywhere(graph_module: Regraphed) -> bool:
    """Whether code, or a child, writes into a tensor, so that it matters what is a copy."""
    inplace = any(getattr(module, "inplace", False) for module in graph_module.modules())
    return inplace or any(map(writes_to, graph_module.graph.nodes))


def called(node: fx.Node, scope: str = "") -> str:
    """What a node calls, and in which way; where modules have absolute paths, seen from the code of ``scope``."""
    name = function_name(node)
    return f"{node.op} {name.removeprefix(f'{scope}.') if scope and node.op == 'call_module' else name}"


def pure(node: fx.Node) -> bool:
    """Whether a call of a function or method does nothing but return something, always the same."""
    name = function_of(node)
    if not name or writes_to(node) or name in VALUE_READS or node.kwargs.get("out") is not None:
        return False
    if node.op == "call_function" and node.target is not getattr and not _of_torch(node.target):
        return False
    return not any(word in name for word in RANDOM)


def writes_to(node: fx.Node) -> bool:
    """Whether a call of a function or method writes into a tensor."""
    name = function_of(node)
    return bool(name) and (node.target is operator.setitem or writes(name, node.args, node.kwargs))


def _of_torch(function: object) -> bool:
    module = str(getattr(function, "__module__", None) or "")
    name = str(getattr(function, "__name__", ""))
    return module.split(".")[0] in ("_operator", "torch") or getattr(torch, name, None) is function


def doubled(node: fx.Node, before: fx.Node) -> bool:
    """Whether of two calls in a row the first one does nothing that the second does not do."""
    kinds = (function_of(before), function_of(node))
    if kinds == ("contiguous", "contiguous"):
        return before.args[1:] == node.args[1:] and before.kwargs == node.kwargs
    if kinds[1] == "reshape":
        return kinds[0] in RESHAPES and not casts(before)
    return kinds == ("view", "view") and not casts(before) and not casts(node)


def casts(node: fx.Node) -> bool:
    """``view`` with a dtype."""
    return any(isinstance(arg, torch.dtype) for arg in (*node.args, *node.kwargs.values()))


def undone(node: fx.Node, before: fx.Node) -> bool:
    """Whether two calls in a row give back what went in."""
    kinds = {function_of(before), function_of(node)}
    if kinds == {"permute"}:
        first, second = _order(before), _order(node)
        return bool(first) and len(first) == len(second) and [first[i] for i in second] == [*range(len(first))]
    transposed = kinds == {"transpose"} and len(node.args) == len(before.args) == 3
    return transposed and set(node.args[1:]) == set(before.args[1:])


def _order(node: fx.Node) -> list[int]:
    """The axes of a permutation; none where they are not known."""
    axes: tuple[object, ...] = node.args[1:]
    if len(axes) == 1 and isinstance(axes[0], (list, tuple)):
        axes = tuple(axes[0])
    known = [axis % len(axes) for axis in axes if type(axis) is int]
    return known if len(known) == len(axes) else []
