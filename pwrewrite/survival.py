"""Whether a model's own code still does what it did after a rewrite: the probe for `pwrewrite.apply.carry_out`.

Code that reads a layer (``conv.weight.dtype``) fails once the layer is replaced. Code that asks what a layer *is*
(``isinstance(m, nn.Conv2d)``) may run on and do something else in silence, which no comparison of shapes shows. So the
probe captures the rewritten model and compares: outside of what was put in, it must run the same operations in the same
modules, equally often.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from .apply import Probe
from .capture import Inputs, capture
from .capture.records import Capture, info
from .graph_edit import Regraphed
from .modules import Factorized, Projected


class OtherOperations(RuntimeError):
    """A rewritten model that runs other operations than before, outside of what was put in."""


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
        old_ops, new_ops = _operations(before, new, graphs), _operations(after, new, graphs)
        lost, gained = old_ops - new_ops, new_ops - old_ops
        if lost or gained:
            said = [f"{_counted(ops)} {how}" for ops, how in ((lost, "no longer run"), (gained, "run now")) if ops]
            raise OtherOperations(f"outside of what was put in, {', '.join(said)}")

    return probe


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
