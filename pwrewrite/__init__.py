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

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core.records import show_with

if TYPE_CHECKING:
    from . import decompose, passes
    from .analysis.records import Analysis
    from .capturing import Capture, capture
    from .capturing.network import graph
    from .core.convolution import ConvSpec
    from .core.cost import Cost, register_formula
    from .core.errors import PwrewriteError
    from .core.options import Budget, PassOptions, Proof, TargetOptions
    from .core.plan import Plan
    from .core.verification import Verification
    from .edit.apply import apply
    from .edit.unfuse import unfuse
    from .engines.frozen import freeze
    from .report.records import Report
    from .targets import LoadedModel, load_target
    from .targets.opening import load
    from .targets.storage import save
    from .verifying import verify
    from .workflows.analyze import analyze, analyze_target
    from .workflows.fuse import fuse
    from .workflows.plan import make_plan, plan
    from .workflows.rewrite import Rewritten, rewrite

    __version__: str

__all__ = [
    "Analysis",
    "Budget",
    "Capture",
    "ConvSpec",
    "Cost",
    "LoadedModel",
    "PassOptions",
    "Plan",
    "Proof",
    "PwrewriteError",
    "Report",
    "Rewritten",
    "TargetOptions",
    "Verification",
    "__version__",
    "analyze",
    "analyze_target",
    "apply",
    "capture",
    "decompose",
    "freeze",
    "fuse",
    "graph",
    "load",
    "load_target",
    "make_plan",
    "passes",
    "plan",
    "register_formula",
    "rewrite",
    "save",
    "unfuse",
    "verify",
]

_HOMES = {
    "Analysis": "analysis.records",
    "Budget": "core.options",
    "Capture": "capturing",
    "ConvSpec": "core.convolution",
    "Cost": "core.cost",
    "LoadedModel": "targets",
    "PassOptions": "core.options",
    "Plan": "core.plan",
    "Proof": "core.options",
    "PwrewriteError": "core.errors",
    "Report": "report.records",
    "Rewritten": "workflows.rewrite",
    "TargetOptions": "core.options",
    "Verification": "core.verification",
    "analyze": "workflows.analyze",
    "analyze_target": "workflows.analyze",
    "apply": "edit.apply",
    "capture": "capturing",
    "freeze": "engines.frozen",
    "fuse": "workflows.fuse",
    "graph": "capturing.network",
    "load": "targets.opening",
    "load_target": "targets",
    "make_plan": "workflows.plan",
    "plan": "workflows.plan",
    "register_formula": "core.cost",
    "rewrite": "workflows.rewrite",
    "save": "targets.storage",
    "unfuse": "edit.unfuse",
    "verify": "verifying",
}
"""The module in which each public name lives."""


show_with(lambda: import_module(f"{__name__}.report.display"))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from .core.version import version

        return version()
    if name in ("decompose", "passes"):
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
