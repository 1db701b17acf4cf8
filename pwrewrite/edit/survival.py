"""Whether a model's own code still does what it did after a rewrite: the probe for `pwrewrite.edit.apply.carry_out`.

Code that reads a layer (``conv.weight.dtype``) fails once that is replaced. Code that asks what a layer *is*, or how
wide a map, may do something else in silence, which no comparison of shapes shows. So the rewritten model is captured:
outside of what was put in, it must run the same operations in the same modules, equally often. Fusing takes operations
away on purpose, in places that the ops name or in code that became a graph, which cannot branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import fx, nn

from ..capturing import Inputs, capture
from ..capturing.records import Capture, info
from ..core.plan import Op, Plan
from ..layers.factorized import Factorized, Projected
from ..layers.known import module_activation
from .actions.simplify import CODE
from .apply import Probe
from .graph_edit import Regraphed
from .swap import stem

_CHANGES = frozenset({"factorize", "project", "narrow", "substitute", "share-reduction"})  # put other layers in
_FUSES = frozenset({"fold", "merge", "merge-branches", "fuse", "remove", "canonicalize"})  # which take operations away
_Operations = Counter[tuple[str, str, str]]


class OtherOperations(RuntimeError):
    """A rewritten model that runs other operations than before, outside of what was put in."""


def probe_for(plan: Plan, before: Capture, inputs: Inputs) -> Probe:
    """How a model that a plan changes is tried: by whether it runs, and by what it runs where that can be told.

    How many operations a model runs that needs values depends on these. ``before`` is its capture, on ``inputs``.
    """
    actions, values = {op.action for op in plan.ops}, before.coverage.values
    if values == "meta" and actions <= _CHANGES:
        whole = {op.path for op in plan.ops if op.action == "substitute"}
        shared = (op.settings for op in plan.ops if op.action == "share-reduction")
        whole |= {stem(settings["scope"]) + settings["reduction"] for settings in shared}
        return survives(before, inputs, whole=whole)
    if values == "meta" and actions <= _FUSES:
        called = {op.path for op in plan.ops if op.action == "canonicalize"}
        return survives(before, inputs, {path for op in plan.ops for path in _named(op)}, called=called)
    return lambda changed: capture(changed, inputs, values=values)


def survives(
    before: Capture,
    inputs: Inputs,
    fused: set[str] | None = None,
    *,
    whole: Collection[str] = (),
    called: Collection[str] = (),
) -> Probe:
    """A probe that raises if a changed model does not run, or runs something else outside of what was put in.

    For a plan that fuses, ``fused`` are the paths at which it takes operations away; ``whole`` are those of modules
    that something else took the place of, ``called`` those of activations that are called unless fused since.
    """

    def probe(changed: nn.Module) -> None:
        after = capture(changed, inputs, values=before.coverage.values)
        modules, old = (dict(model.named_modules(remove_duplicate=False)) for model in (changed, before.model))
        graphs = {path for path, module in modules.items() if isinstance(module, Regraphed)}
        ours = {path for path, module in modules.items() if isinstance(module, (Factorized, Projected))}
        put_in = {path for path in ours if type(old.get(path)) is not type(modules[path])} if fused is None else fused
        put_in = put_in.union(whole)
        still = {str(node.target) for node in after.graph.nodes if node.op == "call_module"}
        for path in called:
            if module_activation(modules[path]) is not None and path not in still:
                raise OtherOperations(f"{path} is no longer called")
        first = {id(module): path for path, module in reversed(old.items())}
        names = {path: first[id(module)] for path, module in old.items()}
        was, now = (_operations(run, put_in, graphs, names, fused=fused is not None) for run in (before, after))
        _compare(was, now, "what was put in" if fused is None else "what was fused")

    return probe


def _named(op: Op) -> Iterator[str]:
    """Paths of the modules in which an op may take operations away; code that becomes a graph is none of them."""
    settings: Mapping[str, Any] = op.settings
    if op.action != "remove" or settings.get("kind") != CODE:
        yield op.path
    for key in ("layer", "first", "remove", "called"):
        if isinstance(settings.get(key), str) and settings[key]:
            yield settings[key]
    yield from settings.get("unread", ())
    if op.action == "merge-branches":
        yield from (stem(settings["scope"]) + name for name, _ in settings["calls"])
    for pair in settings.get("same", ()) if op.action == "remove" else ():
        for what, _ in pair:
            kind, _, name = what.partition(" ")
            if kind == "call_module":
                yield stem(op.path) + name


def _operations(
    captured: Capture, changed: set[str], graphs: set[str], names: Mapping[str, str], *, fused: bool
) -> _Operations:
    """Operations outside of what a plan changes by name and path, where it fuses also by the numbers that they take.

    Of code that became a graph, all is left out where a plan fuses, else the calls that were replaced. ``names`` has
    the first of a module's paths before the change, which may have taken the module out of that place.
    """
    found: _Operations = Counter()
    for node in captured.graph.nodes:
        facts = info(node)
        path = names.get(facts.path, facts.path)
        if node.op not in ("call_module", "call_function", "call_method") or _inside(path, changed):
            continue
        if not fused and any(_inside(caller, changed) for caller in facts.callers):
            continue  # a module that others hold, too, and that goes by the name that the first of them has for it
        if fused:
            changes = facts.op == "identity" or (node.op != "call_module" and facts.path in graphs)
        else:
            weighted = node.op == "call_function" and (facts.spec is not None or facts.op == "linear")
            changes = weighted and facts.path in graphs
        if not changes:
            numbers = str(fx.node.map_arg((node.args, node.kwargs), lambda _: None)) if fused else ""
            found[facts.op, path, numbers] += 1
    return found


def _compare(old: _Operations, new: _Operations, where: str) -> None:
    """Checks that of two runs the second has the operations of the first, and then with the same numbers."""
    before, after = _named_only(old), _named_only(new)
    lost, gained = before - after, after - before
    if lost or gained:
        said = [f"{_counted(ops)} {how}" for ops, how in ((lost, "no longer run"), (gained, "run now")) if ops]
        raise OtherOperations(f"outside of {where}, {', '.join(said)}")
    if old != new:
        other = _counted(_named_only(old - new))
        raise OtherOperations(f"outside of {where}, {other} would be called with other numbers")


def _named_only(operations: _Operations) -> Counter[tuple[str, str]]:
    return Counter(key[:2] for key in operations.elements())


def _inside(path: str, scopes: set[str]) -> bool:
    parts = path.split(".")
    return bool(scopes) and any(".".join(parts[:i]) in scopes for i in range(len(parts) + 1))


def _counted(operations: Counter[tuple[str, str]]) -> str:
    shown = [f"{op} in {path}" if path else op for op, path in list(operations)[:3]]
    more = len(operations) - len(shown)
    return " and ".join(shown) + (f" and {more} more" if more > 0 else "")
