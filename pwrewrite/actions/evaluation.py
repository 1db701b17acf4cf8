"""A module's own code as a graph of what it does in evaluation, where the modes differ in what is to be taken out.

`pwrewrite.graph_edit.to_graph` refuses code that does something else in training. ``F.batch_norm(…, self.training)``
and ``F.dropout(x, p, self.training)`` are such code; an edit that is exact in evaluation takes just these calls out, so
here they are written down as they are in evaluation. All else that differs is refused as ever.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..graph_edit import Regraphed, to_graph

DROPS: frozenset[Any] = frozenset(
    {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
)
"""Functions that drop something where ``training`` is true, and return what they are given where it is not."""


class _Evaluating(TorchFunctionMode):
    """Makes calls of some functions, that take ``training``, calls in evaluation."""

    def __init__(self, functions: frozenset[Any]) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.functions:
            kwargs["training"] = False  # these functions hand their flags on by name
        return func(*args, **kwargs)


def evaluation_graph(module: nn.Module, functions: frozenset[Any]) -> Regraphed:
    """As `pwrewrite.graph_edit.to_graph`, with calls of some functions as they are in evaluation.

    Args:
        module: The module.
        functions: The functions, of those that take ``training``.

    Raises:
        NotTraceable: As there.
    """
    with _Evaluating(functions):
        return to_graph(module)
