"""Whether a model's own code still does what it did after a rewrite: the probe for `pwrewrite.edit.apply.carry_out`.

Code that reads a layer (``conv.weight.dtype``) fails once the layer is replaced. Code that asks what a layer *is*
(``isinstance(m, nn.Conv2d)``) may run on and do something else in silence, which no comparison of shapes shows. So the
probe captures the rewritten model and compares: outside of what was put in, it must run the same operations in the same
modules, equally often.

Fusing takes operations away on purpose, all of them in places that the ops name or in code that became a graph, which
cannot branch. Everywhere else the same must run as before: code that reads the width of a map that a merge made
narrower may go another way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from ..capturing import Inputs, capture
from ..capturing.records import Capture, info
from ..core.plan import Op, Plan
from ..layers.factorized import Factorized, Projected
from .actions.simplify import CODE
from .apply import Probe
from .graph_edit import Regraphed

_CHANGES = frozenset({"factorize", "project"})
"""Actions that put other layers in."""

_FUSES = frozenset({"fold", "merge", "fuse", "remove"})
"""Actions that take operations away."""


class OtherOperations(RuntimeError):
    """A rewritten model that runs other operations than before, outside of what was put in."""


def probe_for(plan: Plan, before: Capture, inputs: Inputs) -> Probe:
    """How a model that a plan changes is tried.

    By whether it runs, and by what it runs where that can be told: how many operations a model runs that needs values
    depends on the values.

    Args:
        plan: What is done.
        before: The capture of the model as it was.
        inputs: What it was captured on.
    """
    actions = {op.action for op in plan.ops}
    if before.coverage.values == "meta" and actions <= _CHANGES:
        return survives(before, inputs)
    compared = before.coverage.values == "meta" and actions <= _FUSES

    def probe(changed: nn.Module) -> None:
        after = capture(changed, inputs, values=before.coverage.values)
        if compared:
            graphs = {path for path, module in changed.named_modules() if isinstance(module, Regraphed)}
            touched = {path for op in plan.ops for path in _named(op)}
            _compare_elsewhere(before, after, touched, graphs)

    return probe


def survives(before: Capture, inputs: Inputs) -> Probe:
    """A probe that captures a changed model and compares its operations.

    Args:
        before: The capture of the model as it was.
        inputs: What it was captured on.

    Returns:
        A function that raises if the changed model does not run, or runs something else.
    """

    def probe(changed: nn.Module) -> None:
        after = capture(changed, inputs, values=before.coverage.values)
        new, graphs = _put_in(before.model, changed)
        _compare(_operations(before, new, graphs), _operations(after, new, graphs), where="what was put in")

    return probe


def _compare(*runs: Counter[tuple[str, str]], where: str) -> None:
    """Checks that of two runs the second has the operations of the first.

    Raises:
        OtherOperations: If others do.
    """
    old, new = runs
    lost, gained = old - new, new - old
    if lost or gained:
        said = [f"{_counted(ops)} {how}" for ops, how in ((lost, "no longer run"), (gained, "run now")) if ops]
        raise OtherOperations(f"outside of {where}, {', '.join(said)}")


def _named(op: Op) -> Iterator[str]:
    """Paths of the modules in which an op may take operations away; code that becomes a graph is none of them."""
    settings: Mapping[str, Any] = op.settings
    if op.action != "remove" or settings.get("kind") != CODE:
        yield op.path
    for key in ("layer", "first", "remove", "called"):
        if isinstance(settings.get(key), str) and settings[key]:
            yield settings[key]
    yield from settings.get("unread", ())
    for pair in settings.get("same", ()) if op.action == "remove" else ():
        for what, _ in pair:
            kind, _, name = what.partition(" ")
            if kind == "call_module":
                yield f"{op.path}.{name}" if op.path else name


def _compare_elsewhere(before: Capture, after: Capture, touched: set[str], graphs: set[str]) -> None:
    """Checks that what is neither touched nor a graph runs the same operations, with the same numbers.

    Raises:
        OtherOperations: If it does not.
    """
    old, new = _elsewhere(before, touched, graphs), _elsewhere(after, touched, graphs)
    _compare(*(Counter(key[:2] for key in found.elements()) for found in (old, new)), where="what was fused")
    if old != new:
        other = Counter(key[:2] for key in (old - new).elements())
        raise OtherOperations(f"outside of what was fused, {_counted(other)} would be called with other numbers")


def _elsewhere(captured: Capture, touched: set[str], graphs: set[str]) -> Counter[tuple[str, str, str]]:
    """Operations by name, path and the numbers that they take."""
    found: Counter[tuple[str, str, str]] = Counter()
    for node in captured.graph.nodes:
        facts = info(node)
        if node.op not in ("call_module", "call_function", "call_method") or facts.op == "identity":
            continue
        if (node.op != "call_module" and facts.path in graphs) or _inside(facts.path, touched):
            continue
        numbers = fx.node.map_arg((node.args, node.kwargs), lambda _: None)
        found[facts.op, facts.path, str(numbers)] += 1
    return found


def _put_in(old: nn.Module, new: nn.Module) -> tuple[set[str], set[str]]:
    """Paths at which modules of ours were put in, and those of modules whose code became a graph."""
    before = dict(old.named_modules(remove_duplicate=False))
    ours, graphs = set(), set()
    for path, module in new.named_modules(remove_duplicate=False):
        if isinstance(module, (Factorized, Projected)) and type(before.get(path)) is not type(module):
            ours.add(path)
        if isinstance(module, Regraphed):
            graphs.add(path)
    return ours, graphs


def _operations(captured: Capture, put_in: set[str], graphs: set[str]) -> Counter[tuple[str, str]]:
    """Operations by name and path, those in what was put in left out."""
    found: Counter[tuple[str, str]] = Counter()
    for node in captured.graph.nodes:
        facts = info(node)
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        if _inside(facts.path, put_in):
            continue
        if node.op == "call_function" and facts.path in graphs and (facts.spec is not None or facts.op == "linear"):
            continue
        found[facts.op, facts.path] += 1
    return found


def _inside(path: str, scopes: set[str]) -> bool:
    if not scopes:
        return False
    parts = path.split(".") if path else []
    return any(".".join(parts[:i]) in scopes for i in range(len(parts) + 1))


def _counted(operations: Counter[tuple[str, str]]) -> str:
    shown = [f"{op} in {path}" if path else op for op, path in list(operations)[:3]]
    more = len(operations) - len(shown)
    return " and ".join(shown) + (f" and {more} more" if more > 0 else "")
