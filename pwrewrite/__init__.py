"""Static analysis and rewriting of convolutional PyTorch models.

::

    import pwrewrite

    analysis = pwrewrite.analyze(model, torch.zeros(1, 3, 224, 224, device="meta"))
    print(analysis)                       # where the work goes
    analysis.to_dict()                    # the same as JSON data

    made = pwrewrite.rewrite(model, inputs, [pwrewrite.passes.InsertBottleneck(0.5)])
    print(made.report)                    # what was saved, what proves the rest
    made = pwrewrite.rewrite(model, inputs, budget={"macs": 0.5}, calibration=batches)
    made.save("folder")                   # and pwrewrite.load("folder", model) brings it back

    capture = pwrewrite.capture(model, example_inputs)
    pwrewrite.graph(capture)              # a networkx.DiGraph for questions of one's own

Importing this package imports nothing heavy: each name is imported when it is first used. No room of the package has
the name of a public function (``capture`` lives in ``capturing``, ``plan`` in ``planning``, ``verify`` in
``verifying``), because Python binds an imported submodule to its package and would hide the function.
"""

from __future__ import annotations

import random
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .core.records import show_with

if TYPE_CHECKING:
    from . import decompose as decompose, passes as passes
    from .analysis.records import Analysis as Analysis
    from .capturing import Capture as Capture, capture as capture
    from .capturing.network import graph as graph
    from .core.convolution import ConvSpec as ConvSpec
    from .core.cost import Cost as Cost, register_formula as register_formula
    from .core.errors import PwrewriteError as PwrewriteError
    from .core.options import (
        Budget as Budget,
        PassOptions as PassOptions,
        Proof as Proof,
        TargetOptions as TargetOptions,
    )
    from .core.plan import Plan as Plan
    from .core.verification import Verification as Verification
    from .edit.actions.plain_layers import unfuse as unfuse
    from .edit.apply import apply as apply
    from .engines.frozen import freeze as freeze
    from .report.records import Report as Report
    from .targets import LoadedModel as LoadedModel, load_target as load_target
    from .targets.opening import load as load
    from .targets.storage import save as save
    from .verifying import verify as verify
    from .workflows.analyze import analyze as analyze, analyze_target as analyze_target
    from .workflows.check import check as check, diff as diff
    from .workflows.compress import compress as compress
    from .workflows.export import export as export
    from .workflows.fuse import fuse as fuse
    from .workflows.plan import make_plan as make_plan, plan as plan
    from .workflows.recover import recover as recover
    from .workflows.rewrite import Rewritten as Rewritten, rewrite as rewrite

    __version__: str

_NAMES = {
    "analysis.records": "Analysis",
    "capturing": "Capture capture",
    "capturing.network": "graph",
    "core.convolution": "ConvSpec",
    "core.cost": "Cost register_formula",
    "core.errors": "PwrewriteError",
    "core.options": "Budget PassOptions Proof TargetOptions",
    "core.plan": "Plan",
    "core.verification": "Verification",
    "edit.apply": "apply",
    "edit.actions.plain_layers": "unfuse",
    "engines.frozen": "freeze",
    "report.records": "Report",
    "targets": "LoadedModel load_target",
    "targets.opening": "load",
    "targets.storage": "save",
    "verifying": "verify",
    "workflows.analyze": "analyze analyze_target",
    "workflows.check": "check diff",
    "workflows.compress": "compress",
    "workflows.export": "export",
    "workflows.fuse": "fuse",
    "workflows.plan": "make_plan plan",
    "workflows.recover": "recover",
    "workflows.rewrite": "Rewritten rewrite",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
"""The module in which each public name lives."""

__all__ = sorted([*_HOMES, "__version__", "decompose", "passes"])  # type checkers read the imports above instead


def _imported(name: str) -> ModuleType:
    """A module of this package; rich, which some of them import, draws a number from Python's random state."""
    state = random.getstate()
    try:
        return import_module(f"{__name__}.{name}")
    finally:
        random.setstate(state)


show_with(lambda: _imported("report.display"))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from .core.version import version

        return version()
    if name in ("decompose", "passes"):
        return _imported(name)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_imported(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
