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

Importing this package imports nothing heavy: each name is imported when it is first used.

Some functions are named as a submodule (``apply``, ``capture``, ``graph``, ``plan``, ``verify``). Once Python has
imported a submodule it binds it to the package under its name, so ``pwrewrite.graph`` is the submodule, and is made
callable as that function. Thus ``pwrewrite.graph(capture)``, ``from pwrewrite import graph``, ``from pwrewrite.graph
import graph`` and ``import pwrewrite.capture.records as records`` all work, in any order.
"""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import Signature, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import decompose, passes
    from .analysis.records import Analysis
    from .api import analyze, analyze_target
    from .apply import apply
    from .budgeting import plan
    from .capture import Capture, capture
    from .convolution import ConvSpec
    from .cost import Cost, register_formula
    from .errors import PwrewriteError
    from .freezing import freeze
    from .fusing import fuse
    from .graph import graph
    from .loading import LoadedModel, load_target
    from .plan import Plan
    from .report.records import Report
    from .rewriting import Rewritten, make_plan, rewrite
    from .storage import load, save
    from .verification import Verification
    from .verify import verify

    __version__: str

__all__ = [
    "Analysis",
    "Capture",
    "ConvSpec",
    "Cost",
    "LoadedModel",
    "Plan",
    "PwrewriteError",
    "Report",
    "Rewritten",
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
    "verify",
]

_ELSEWHERE = {"plan": "budgeting"}
"""Submodules that are called as a function of their name that lives in another one."""

_HOMES = {
    "Analysis": "analysis.records",
    "Capture": "capture",
    "ConvSpec": "convolution",
    "Cost": "cost",
    "LoadedModel": "loading",
    "Plan": "plan",
    "PwrewriteError": "errors",
    "Report": "report.records",
    "Rewritten": "rewriting",
    "Verification": "verification",
    "analyze": "api",
    "analyze_target": "api",
    "apply": "apply",
    "capture": "capture",
    "decompose": "decompose",
    "freeze": "freezing",
    "fuse": "fusing",
    "graph": "graph",
    "load": "storage",
    "load_target": "loading",
    "make_plan": "rewriting",
    "passes": "passes",
    "plan": "plan",
    "register_formula": "cost",
    "rewrite": "rewriting",
    "save": "storage",
    "verify": "verify",
}
"""Where each public name lives; a name that is its own home is a submodule."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version(__name__)
        except PackageNotFoundError:  # run from a checkout that is not installed
            return "0+unknown"
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{home}")
    if home == name:
        return module  # callable where it holds a function of its name, see _Package
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallableModule(ModuleType):
    """A submodule that can be called as the function of the same name in it."""

    @property
    def _function(self) -> Any:
        name = self.__name__.rpartition(".")[2]
        if name in _ELSEWHERE:
            return getattr(import_module(f"{__name__}.{_ELSEWHERE[name]}"), name)
        return self.__dict__[name]

    @property
    def __signature__(self) -> Signature:
        return signature(self._function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class _Package(ModuleType):
    """This package: makes a submodule callable at the moment when Python binds it here, whoever imported it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if _HOMES.get(name) == name and type(value) is ModuleType and (name in vars(value) or name in _ELSEWHERE):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
