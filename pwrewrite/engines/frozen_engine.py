"""`pwrewrite.freeze`: the model as one function of oneDNN's compiled partitions.

It stands on the graph fuser of torch's TorchScript interpreter, which torch deprecates. Where a torch has it no more,
this engine says so; then ``torch`` or ``onnxruntime`` serves.
"""

from __future__ import annotations

from torch import nn

from ..core.nested import Args, Kwargs, deep_copy
from ..layers import tracing
from .engine import Engine, Session
from .frozen import freeze


class FrozenEngine(Engine):
    """The model frozen for its inputs; refused where it cannot be."""

    name = "frozen"

    @property
    def missing(self) -> str:
        return "" if tracing.FUSER else "needs a build of torch with oneDNN graphs behind TorchScript"

    def _session(self, model: nn.Module, args: Args, kwargs: Kwargs) -> Session:
        frozen = freeze(deep_copy(model).eval(), kwargs or args)
        return Session(frozen, self._ran("oneDNN graph", "float32"))


ENGINE = FrozenEngine()
