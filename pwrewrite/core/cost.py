"""What operations cost, from shapes alone: `Cost`, `price` and `PricingMode`.

The formulas stand in `pwrewrite.core.operations`. `register_formula` adds one for an operation of one's own::

    register_formula(torch.ops.mylib.correlate, lambda args, kwargs, out: out.numel() * args[1].shape[1])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode

from .nested import Args, Kwargs
from .operations import FORMULAS, FREE, Formula


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of an operation, a layer or a model.

    Attributes:
        params: Parameter elements.
        macs: Multiply-accumulates.
        read_bytes: Bytes of activations and weights read.
        write_bytes: Bytes of activations written.
    """

    params: int = 0
    macs: int = 0
    read_bytes: int = 0
    write_bytes: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations, 2 × MACs."""
        return 2 * self.macs

    @property
    def bytes(self) -> int:
        """Bytes moved, read and written."""
        return self.read_bytes + self.write_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.macs + other.macs,
            self.read_bytes + other.read_bytes,
            self.write_bytes + other.write_bytes,
        )

    def __sub__(self, other: Cost) -> Cost:
        return self + Cost(-other.params, -other.macs, -other.read_bytes, -other.write_bytes)


def register_formula(op: OpOverloadPacket, formula: Formula) -> None:
    """Gives an operation its cost.

    Args:
        op: An ``OpOverloadPacket`` such as ``torch.ops.mylib.correlate``.
        formula: ``formula(args, kwargs, out) -> MACs``, from shapes alone: the tensors may be on ``meta``.
    """
    FORMULAS[op._qualified_op_name] = formula


def price(op: OpOverload, args: Args, kwargs: Kwargs, out: Any) -> int | None:
    """MACs of one dispatched operation.

    Args:
        op: The operation that ran.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: What it returned.

    Returns:
        MACs, 0 for an operation known to have none, None where no formula is known.
    """
    name = op.overloadpacket._qualified_op_name
    formula = FORMULAS.get(name)
    if formula is not None:
        return formula(args, kwargs, out[0] if isinstance(out, tuple) else out)
    if name in FREE or torch.Tag.pointwise in op.tags or torch.Tag.inplace_view in op.tags or _is_view(op):
        return 0
    return None


def _is_view(op: OpOverload) -> bool:
    """Whether every output is an alias of an input that is not written: a view, by the operation's schema."""
    returns = op._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class PricingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the MACs of everything that runs under it, and lists what has no formula.

    Attributes:
        macs: MACs so far.
        unpriced: Qualified names of operations without a formula, one entry per call.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.unpriced: list[str] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        """Runs the operation and adds its cost."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        cost = price(func, args, kwargs, out)
        if cost is None:
            self.unpriced.append(func.overloadpacket._qualified_op_name)
        else:
            self.macs += cost
        return out
