"""Which layers write into a sum with a tensor that was there before: the residual branches of a network.

A layer before a residual sum can put right, too, what has gone wrong on the other side of the sum so far, where that
can be read. `residuals` finds layers whose output goes through nothing but a batch norm to a sum whose other side is
also the first input of a module, or the output of one, that has run before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from ..capturing.records import Capture, info

_IDENTITIES = frozenset({"identity", "dropout"})
"""What passes its input on in eval mode."""


@dataclass(frozen=True, slots=True)
class Residual:
    """Where the other side of a layer's sum can be read.

    Attributes:
        norm: Path of the batch norm between the layer and the sum; ``""`` where there is none.
        module: Path of a module that reads or writes the other side.
        side: ``input`` or ``output`` of that module.
    """

    norm: str
    module: str
    side: str


def residuals(capture: Capture, paths: Collection[str]) -> dict[str, Residual]:
    """Path to the residual sum that a layer writes into, of those layers that do; they are modules called once."""
    place = {node: i for i, node in enumerate(capture.graph.nodes)}
    calls = Counter(info(node).path for node in place if node.op == "call_module" or _is_norm(node))
    same: dict[fx.Node, list[fx.Node]] = {}
    for node in place:
        same.setdefault(_source(node), []).append(node)
    sums = {}
    for node in place:
        path = str(node.target)
        if node.op != "call_module" or path not in paths or calls[path] != 1:
            continue
        norm, end = _through_norm(node, calls)
        add = _only_user(end)
        if add is None or info(add).op != "add" or add.kwargs or len(add.args) != 2:
            continue
        others = [arg for arg in add.args if arg is not end]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            continue
        own, there = info(end).outputs, info(others[0]).outputs
        if not own or not there or own[0] != there[0]:
            continue
        anchor = _anchor(same[_source(others[0])], place, place[node], calls)
        if anchor is not None:
            sums[path] = Residual(norm, *anchor)
    return sums


def _is_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and info(node).op == "batch_norm"


def _source(node: fx.Node) -> fx.Node:
    """The node whose value an identity passes on."""
    while node.op == "call_module" and info(node).op in _IDENTITIES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _through_norm(node: fx.Node, calls: Counter[str]) -> tuple[str, fx.Node]:
    """Past what reads a layer's output alone: identities and one batch norm."""
    norm = ""
    while (user := _only_user(node)) is not None and user.args and user.args[0] is node:
        facts = info(user)
        if facts.op == "batch_norm" and not norm and calls[facts.path] == 1:
            norm = facts.path
        elif facts.op not in _IDENTITIES:
            break
        node = user
    return norm, node


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _anchor(
    nodes: list[fx.Node], place: dict[fx.Node, int], before: int, calls: Counter[str]
) -> tuple[str, str] | None:
    """A module at which a tensor, under any of its nodes, can be read before a moment."""
    for node in nodes:
        if node.op == "call_module" and calls[str(node.target)] == 1 and place[node] < before:
            return str(node.target), "output"
        for user in node.users:
            once = user.op == "call_module" and calls[str(user.target)] == 1
            if once and user.args and user.args[0] is node and place[user] <= before:
                return str(user.target), "input"
    return None
