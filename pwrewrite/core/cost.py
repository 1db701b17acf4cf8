"""What operations cost, from shapes alone: `Cost`, `price` and `PricingMode`.

`register_formula` adds a formula of one's own to those of `pwrewrite.core.operations`::

    register_formula(torch.ops.mylib.correlate, lambda args, kwargs, out: out.numel() * args[1].shape[1])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import UsageError
from .nested import Args, Kwargs, Tree
from .operations import FORMULAS, FREE, Formula


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of an operation, a layer or a model: elements, multiply-accumulates, bytes of weights and activations."""

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


def register_formula(op: OpOverloadPacket, formula: Formula) -> None:
    """Gives an operation its cost, ``formula(args, kwargs, out) -> MACs``, by shapes alone (tensors may be on meta)."""
    if not isinstance(op, OpOverloadPacket):
        expected = "a packet of overloads, such as torch.ops.aten.fft_fft"
        raise UsageError("this is no operation", expected=expected, got=repr(op))
    FORMULAS[op._qualified_op_name] = formula


def price(op: OpOverload, args: Args, kwargs: Kwargs, out: Tree) -> int | None:
    """MACs of one dispatched operation, of which ``out`` came; 0 where it has none, None where no formula is known."""
    name = op.overloadpacket._qualified_op_name
    formula = FORMULAS.get(name)
    if formula is not None:
        return formula(args, kwargs, out[0] if isinstance(out, tuple) else out)
    if name in FREE or torch.Tag.pointwise in op.tags or torch.Tag.inplace_view in op.tags:
        return 0
    returns = op._schema.returns  # of a view: all aliases of inputs that are not written
    return 0 if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns) else None


class PricingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the ``macs`` of everything that runs under it; ``unpriced`` names what has no formula, once per call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.unpriced: list[str] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        """Runs the operation and adds its cost."""
        kwargs = kwargs or {}
        # What torch itself checks by values, as istft does that its window is not zero somewhere, passes on meta.
        passes = func is torch.ops.aten.equal.default and args[0].is_meta
        out = False if passes else func(*args, **kwargs)
        cost = price(func, args, kwargs, out)
        if cost is None:
            self.unpriced.append(func.overloadpacket._qualified_op_name)
        else:
            self.macs += cost
        return out
