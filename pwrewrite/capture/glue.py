"""The price of what runs outside every node: TorchScript functions, functorch and other code that torch functions do
not show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from ..cost import Cost, price


class Glue(TorchDispatchMode):
    """Adds up the MACs of dispatched operations while nothing else accounts for them.

    Args:
        accounted: Whether what runs now belongs to a node.

    Attributes:
        macs: MACs so far.
        unpriced: Qualified names of operations without a formula, one entry per call.
    """

    def __init__(self, accounted: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.accounted = accounted
        self.macs = 0
        self.unpriced: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and, where no node accounts for it, adds its cost."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.accounted():
            cost = price(func, args, kwargs, out)
            if cost is None:
                self.unpriced.append(func.overloadpacket._qualified_op_name)
            else:
                self.macs += cost
        return out

    def settle(self, graph: fx.Graph) -> None:
        """Gives the cost to the first tensor in ``graph`` that came out of such code."""
        if not (self.macs or self.unpriced):
            return
        first = next(node for node in graph.nodes if node.meta["info"].op == "unknown")
        facts = first.meta["info"]
        facts.cost = Cost(0, self.macs, 0, facts.outputs[0].nbytes)
        facts.unpriced = tuple(self.unpriced)
