"""Tools that see every operation: torch's ``FlopCounterMode`` and fvcore's ``FlopCountAnalysis``.

FlopCounterMode sees what reaches the dispatcher and counts what has a formula: matrix products (not matrix times
vector), convolutions, attention. fvcore sees the operations of a TorchScript trace and has a handle for a dozen of
them; what has none, ``baddbmm``, attention and convolutions with ``padding="same"`` among them, counts as 0. Its
figure for a product broadcast over a batch is that of one batch item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, prod
from typing import Any

import torch
from torch import fx, nn

from ...capturing import Capture, NodeInfo, info
from ...capturing.functions import argument, function_name
from ...capturing.records import shape_of
from .units import Share, Unit, operand_shapes, words

_COMPLEX = "complex: three real convolutions"
_FAILS = "matrix-vector products counted as 0"


def torch_shares(capture: Capture, all_units: Sequence[Unit]) -> tuple[list[Share], list[str]]:
    """What ``FlopCounterMode`` counts, its FLOPs halved."""
    shares: list[Share] = []
    caveats: list[str] = []
    for node in (node for unit in all_units for node in unit.nodes):
        facts = info(node)
        macs = facts.cost.macs
        if not macs:
            continue
        counted: int | None = macs
        if facts.op in ("lstm", "sparse_mm"):
            counted = 0
            if facts.op == "lstm":
                caveats.append("an LSTM counts as 0 where oneDNN runs it, as on most CPUs")
        elif _is_complex(facts):
            counted = 3 * macs
        elif node.op != "call_module" and not _plain(node, facts):
            counted = _dispatched(node)
        if counted is None:
            counted = macs
            caveats.append(f"torch's figure for {words(facts.op)} is not known, here it counts as ours")
        shares.append(Share(words(facts.op), _rule(facts, counted, macs), counted, macs))
    return shares, caveats


def _rule(facts: NodeInfo, counted: int, macs: int) -> str:
    if counted == macs:
        return ""
    if _is_complex(facts):
        return _COMPLEX
    if counted:
        return "counted as what it runs"
    vector = facts.op in ("mv", "addmv", "dot", "vdot", "inner", "matmul", "vecdot")
    return _FAILS if vector else "no formula: counted as 0"


def _is_complex(facts: NodeInfo) -> bool:
    """Whether an operation is a convolution of complex numbers, which runs as three of real ones."""
    return facts.spec is not None and facts.outputs[0].dtype.is_complex


def _plain(node: fx.Node, facts: NodeInfo) -> bool:
    """Whether a call dispatches to the one operation that our own formula prices."""
    if isinstance(getattr(node.target, "overloadpacket", node.target), torch._ops.OpOverloadPacket):
        return False
    matrices = facts.op == "matmul" and all(len(shape) > 1 for shape in operand_shapes(node))
    return matrices or facts.spec is not None or facts.op in ("linear", "mm", "bmm", "addmm", "baddbmm", "attention")


def _dispatched(node: fx.Node) -> int | None:
    """What ``FlopCounterMode`` counts for one call, from shapes alone; None where it does not run on them."""
    from torch.utils.flop_counter import FlopCounterMode

    read = list(info(node).inputs)

    def empty(source: fx.Node) -> fx.node.Argument:
        outputs = info(source).outputs
        spec = outputs[0] if len(outputs) == 1 else next(spec for spec in read if spec in outputs)  # a piece of it
        if spec in read:
            read.remove(spec)
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")

    function: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
    try:
        args, kwargs = fx.map_arg(node.args, empty), fx.map_arg(node.kwargs, empty)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(*args, **kwargs)
    except Exception:
        return None
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True, slots=True)
class _Call:
    """A node, its facts, and the module that it calls; None for a function."""

    node: fx.Node
    facts: NodeInfo
    module: Any


_Handle = Callable[[_Call], tuple[float, str]]


def fvcore_shares(capture: Capture, all_units: Sequence[Unit]) -> tuple[list[Share], list[str]]:
    """What ``FlopCountAnalysis(model, inputs).total()`` counts."""
    shares: list[Share] = []
    caveats: list[str] = []
    for unit in all_units:
        for node in unit.nodes:
            facts = info(node)
            module = unit.module if node.op == "call_module" else None
            name = function_name(node)
            macs = facts.cost.macs
            private = name.startswith("_") and not name.startswith("_convolution")  # which have no handle
            handle = None if private else _HANDLES.get(facts.op)
            if handle is None:
                shares += [Share(words(facts.op), "no handle: counted as 0", 0, macs)] if macs else []
                if facts.op == "attention" and name == "multi_head_attention_forward":
                    caveats.append("fvcore counts the parts of nn.MultiheadAttention, here it counts as 0")
                continue
            counted, rule = handle(_Call(node, facts, module))
            if rule == _FAILS:
                caveats.append("fvcore fails on a matrix-vector product, here it counts as 0")
            shares.append(Share(words(facts.op), rule, counted, macs))
    return shares, caveats


def _convolution(call: _Call) -> tuple[float, str]:
    padding = argument(call.node, 4, "padding") if call.module is None else call.module.padding
    if isinstance(padding, str) and getattr(call.module, "padding_mode", "zeros") == "zeros":
        return 0, 'padding="same" or "valid": no handle, counted as 0'
    return (3 * call.facts.cost.macs, _COMPLEX) if _is_complex(call.facts) else (call.facts.cost.macs, "")


def _matmul(call: _Call) -> tuple[float, str]:
    left, right = operand_shapes(call.node)
    if len(right) == 1:
        return 0, _FAILS
    counted = prod(left) * right[-1]
    return counted, "" if counted == call.facts.cost.macs else "broadcast over a batch: one item counted"


def _einsum(call: _Call) -> tuple[float, str]:
    equation = call.node.args[0]
    operands = call.node.args[1] if isinstance(call.node.args[1], (list, tuple)) else call.node.args[1:]
    shapes = [shape for operand in operands if (shape := shape_of(operand)) is not None]
    if not isinstance(equation, str) or len(shapes) != len(operands):
        return call.facts.cost.macs, ""
    counted = _einsum_macs(equation.replace(" ", ""), shapes)
    return counted, "" if counted == call.facts.cost.macs else "half of NumPy's estimate of its FLOPs"


def _einsum_macs(equation: str, shapes: list[tuple[int, ...]]) -> int:
    """fvcore's figure: two known forms, else half of what ``numpy.einsum_path`` prints, in its few digits."""
    import numpy as np

    letters = dict.fromkeys(c for c in equation if c.isalpha())
    form = equation.translate({ord(c): 97 + i for i, c in enumerate(letters)})
    if form == "abc,abd->acd":
        return prod(shapes[0]) * shapes[-1][-1]
    if form == "abc,adc->adb":
        return prod(shapes[0]) * shapes[-1][1]
    operands = [np.broadcast_to(np.zeros(()), shape) for shape in shapes]
    for line in str(np.einsum_path(form, *operands, optimize="optimal")[1]).split("\n"):
        if "optimized flop" in line.lower():
            return floor(float(line.split(":")[-1]) / 2)
    return 0


def _affine(call: _Call, position: int) -> bool:
    if call.module is not None:
        return getattr(call.module, "weight", None) is not None
    return shape_of(argument(call.node, position, "weight")) is not None


def _batch_norm(call: _Call) -> tuple[float, str]:
    if _is_torch(call.node, "batch_norm"):
        affine, training = _affine(call, 1), bool(argument(call.node, 5, "training"))
    elif call.module is not None:
        affine, training = _affine(call, 3), call.module.running_mean is None
    else:
        affine, training = _affine(call, 3), bool(argument(call.node, 5, "training", False))
    each = (5 if affine else 4) if training else (2 if affine else 1)
    return each * call.facts.outputs[0].numel, f"{each} per element" + (" with batch statistics" if training else "")


def _norm(position: int) -> _Handle:
    def handle(call: _Call) -> tuple[float, str]:
        each = 5 if _affine(call, 1 if _is_torch(call.node, "instance_norm") else position) else 4
        return each * call.facts.outputs[0].numel, f"{each} per element"

    return handle


def _is_torch(node: fx.Node, name: str) -> bool:
    """Whether a node calls the function in ``torch``, whose arguments come in another order than ``functional``'s."""
    return node.target is getattr(torch, name)


def _interpolate(call: _Call) -> tuple[float, str]:
    mode = call.module.mode if isinstance(call.module, nn.Upsample) else argument(call.node, 3, "mode", "nearest")
    known = len(call.facts.outputs[0].shape) == 4 and not argument(call.node, 6, "antialias", False)
    return _sampled({"nearest": 1, "bilinear": 4}.get(mode, 0) if known else 0)(call)


def _sampled(each: int) -> _Handle:
    return lambda call: (each * call.facts.outputs[0].numel, f"{each} per output element")


_HANDLES: dict[str, _Handle] = {
    **{f"conv{kind}{dims}d": _convolution for kind in ("", "_transpose") for dims in (1, 2, 3)},
    "convolution": _convolution,
    **dict.fromkeys(("linear", "mm", "bmm", "addmm"), lambda call: (call.facts.cost.macs, "")),
    "matmul": _matmul,
    "einsum": _einsum,
    "batch_norm": _batch_norm,
    **dict.fromkeys(("layer_norm", "group_norm"), _norm(2)),
    "instance_norm": _norm(3),
    "adaptive_avg_pool2d": lambda call: (call.facts.inputs[0].numel, "1 per input element"),
    **dict.fromkeys(("interpolate", "upsample"), _interpolate),
    "upsample_nearest2d": _sampled(1),
    **dict.fromkeys(("grid_sample", "grid_sampler", "upsample_bilinear2d"), _sampled(4)),
}
