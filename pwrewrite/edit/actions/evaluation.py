"""A module's own code as a graph of what it does in evaluation, where the modes differ in what is to be taken out.

`to_graph` refuses code that does something else in training, such as ``F.dropout(x, p, self.training)``. An edit that
is exact in evaluation takes just these calls out, so here they are written down as they are in evaluation. A trace
makes ``x = x + y`` of ``x += y``, which is something else where another name, a view or the caller holds what was
written into; code with such assignments is refused where that may be so.
"""

from __future__ import annotations

import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...capturing.code_trace import NotTraceable, value_or
from ...capturing.functions import function_name, words
from ...core.operations import OPERATIONS
from ..graph_edit import Regraphed, to_graph

Functions = frozenset[Callable[..., object]]
"""Functions that take ``training``."""

DROPS: Functions = frozenset(
    getattr(F, name) for row in OPERATIONS if row.kind == "dropout" for name in row.functions if hasattr(F, name)
)
"""Functions that drop something where ``training`` is true, and return their input where it is not."""


class Watching(TorchFunctionMode):
    """Shows the calls of torch's functions, and their arguments by position and by name, before they are made."""

    def __init__(self, watch: Callable[[object, tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self.watch(func, args, kwargs)
        return func(*args, **kwargs)


def code_graph(module: nn.Module, functions: Functions = frozenset()) -> Regraphed:
    """As `to_graph`, for edits that are exact in evaluation: calls of ``functions`` are as they are there.

    Raises:
        NotTraceable: As there, and where an assignment such as ``+=`` may write into what something else holds.
    """

    def evaluate(function: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if function in functions:
            kwargs["training"] = False  # these functions hand their flags on by name

    with Watching(evaluate), _assignments() as written:
        graph_module = to_graph(module)
    for node in graph_module.graph.nodes:
        if node.name in written and _seen_elsewhere(node):
            raise NotTraceable(f"{type(module).__name__}.forward writes with += into what another name may hold")
    return graph_module


def function_of(node: fx.Node) -> str:
    """Name of the function or method that a node calls; empty for any other."""
    return function_name(node) if node.op in ("call_function", "call_method") else ""


def numbered(graph: fx.Graph, what: Callable[[fx.Node], str]) -> dict[tuple[str, int], fx.Node]:
    """The calls in some code by ``what`` they call, where that is not empty, and how often it was called before."""
    calls, before = dict[tuple[str, int], fx.Node](), Counter[str]()
    for node in graph.nodes:
        if name := what(node):
            calls[name, before[name]] = node
            before[name] += 1
    return calls


_OPERATORS = {f"__i{name}__": getattr(operator, name) for name in words("add sub mul truediv floordiv mod pow")}
_tracing = threading.RLock()  # held by the one trace that may run at a time, since it adds methods to ``fx.Proxy``


@contextmanager
def _assignments() -> Iterator[set[str]]:
    """Names of the nodes that come from assignments such as ``+=`` in a trace."""
    names: set[str] = set()

    def method(function: Any) -> Any:
        def assign(self: fx.Proxy, other: Any) -> Any:
            result = function(self, other)
            names.add(result.node.name)
            return result

        return assign

    with _tracing:
        ours = [name for name in _OPERATORS if not hasattr(fx.Proxy, name)]
        try:
            for name in ours:
                setattr(fx.Proxy, name, method(_OPERATORS[name]))
            yield names
        finally:
            for name in ours:
                delattr(fx.Proxy, name)


_VIEWS = words(
    """getitem view reshape permute transpose flatten unflatten unsqueeze squeeze narrow select chunk split expand
    expand_as view_as detach contiguous movedim swapaxes unbind diagonal t to float"""
)
"""Functions and methods whose result may share storage with their input."""
_KEEPS = words("append insert extend update setdefault")  # methods of containers that keep their argument


def _seen_elsewhere(node: fx.Node) -> bool:
    """Whether the first operand, or what may share its storage, came from outside, is kept there, or is read later."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return False
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    related, todo = set[fx.Node](), [first]
    while todo:
        other = todo.pop()
        if other not in related:
            related.add(other)
            todo += [*_viewed(other), *(user for user in other.users if other in _viewed(user))]
    return any(other.op in ("placeholder", "get_attr") for other in related) or any(
        order[user] > order[node] or _keeps(user, other) for other in related for user in other.users
    )


def _keeps(user: fx.Node, node: fx.Node) -> bool:
    """Whether a call puts a value into a container that came from outside."""
    keeps = user.target is operator.setitem or (user.op == "call_method" and user.target in _KEEPS)
    return keeps and user.args[0] is not node


def _viewed(node: fx.Node) -> list[fx.Node]:
    """What a node may be a view of."""
    if node.target is value_or:
        return node.all_input_nodes
    return [arg for arg in node.args[:1] if isinstance(arg, fx.Node)] if function_of(node) in _VIEWS else []
