"""ptflops: hooks on modules, and counting wrappers around functions while the model runs.

``get_model_complexity_info`` (its ``pytorch`` backend, the default) hooks modules of the classes in its table, and
replaces some functions of ``torch.nn.functional``, ``torch`` and ``torch.Tensor``. Modules of torch call the replaced
functions, so an ``nn.ReLU`` counts twice. What was bound before (``from torch.nn.functional import relu``, operators
such as ``+``) is not replaced. Modules' figures are divided by the batch size, functions' are not; a module that
several parents share is added once per parent.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...capturing import Capture, NodeInfo, info
from ...capturing.functions import argument, function_name
from ...core.convolution import CONV_MODULES
from .by_module import RECURRENT, uncounted
from .units import Share, Unit, operand_shapes, visits, words

_ACTIVATIONS = ("relu", "prelu", "elu", "relu6", "gelu", "silu", "softmax")
_RESIZES = ("interpolate", "upsample")
_PATCHED = frozenset((*_ACTIVATIONS, *_RESIZES)) | frozenset(
    f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for dims in (1, 2, 3)
)
_PATCHED_TENSOR = frozenset(["matmul", "mm", "bmm", "addmm", "baddbmm", "mul", "add"])
_OPERATORS = ("matmul", "mul", "add")
"""Methods that an operator calls too, under the same name."""


def ptflops_shares(capture: Capture, all_units: Sequence[Unit]) -> tuple[list[Share], list[str]]:
    """What ``get_model_complexity_info(model, …, as_strings=False)`` counts."""
    shares: list[Share] = []
    caveats: list[str] = []
    closed = (*RECURRENT, nn.MultiheadAttention)
    added = visits(capture.model, lambda module: _hook_of(module) is not None or isinstance(module, closed))
    batch = next((spec.shape[0] for _, spec in capture.inputs if spec.shape), 1)
    hooked = 0
    for unit in all_units:
        rule = _hook_of(unit.module) if unit.whole else None
        own: list[Share] = rule(unit) if rule is not None else []
        functions = [share for node in unit.nodes if (share := _function(node, unit)) is not None]
        if rule is None and unit.ours and not functions:
            shares.append(uncounted(unit))
        elif rule is None and functions:
            functions[0] = Share(functions[0].kind, functions[0].rule, functions[0].counted, unit.ours)
        times = added[unit.module] if own else 1
        counted = int(sum(share.counted for share in own))
        hooked += times * counted
        shares += own + functions
        if times != 1 and counted:
            shared = f"shared module, each call counted {times} times"
            why = shared if times else "inside a module with its own formula"
            shares.append(Share(unit.kind, why, (times - 1) * counted))
        _warn(unit, caveats)
    if batch > 1:
        shares.append(Share("modules", f"divided by the batch size, {batch}", hooked / batch - hooked))
    return shares, caveats


def _warn(unit: Unit, caveats: list[str]) -> None:
    if unit.whole and isinstance(unit.module, RECURRENT):
        caveats.append("ptflops has formulas of its own for recurrent modules, here they count as 0")
    elif isinstance(unit.module, nn.MultiheadAttention):
        caveats.append("ptflops has a formula of its own for nn.MultiheadAttention, here it counts as 0")
    elif type(unit.module).__name__ == "Attention" and type(unit.module).__module__.startswith("timm."):
        caveats.append("ptflops has a formula of its own for timm's Attention, here its parts are counted")
    else:
        caveats += [text for node in unit.nodes for function in _functions_of(node, unit.module)
                    if (text := _hidden(function, unit.module))]  # fmt: skip


def _hidden(function: object, module: nn.Module) -> str:
    """What a graph does not show of a function of ``functional``: which others it calls, or was called by."""
    name = getattr(function, "__name__", "")
    pool = name.removesuffix("_with_indices")
    if pool != name:
        known = not isinstance(function, FunctionType) or {pool, name} & _names_of(module)
        return "" if known else f"ptflops counts F.{pool} but not F.{name}, and which of them was called is not known"
    inside = [] if name in _PATCHED else _replaced_inside(function)
    return f"ptflops counts the {' and '.join(inside)} inside F.{name}, here as 0" if inside else ""


_Hook = Callable[[Unit], list[Share]]


def _convolution(unit: Unit, extra: int = 0) -> list[Share]:
    m, transposed = unit.module, getattr(unit.module, "transposed", False)
    batch, size = unit.input.shape[0], (unit.input if transposed else unit.output).shape[2:]
    per_position = prod(m.kernel_size) * (m.in_channels * (m.out_channels // m.groups) + extra)
    weight = per_position * batch * prod(size)
    shares = [Share(unit.kind, "" if weight == unit.ours else "counted differently", weight, unit.ours)]
    if unit.module.bias is not None:
        bias = batch * prod(unit.output.shape[1:])
        shares.append(Share(f"{unit.kind} bias", "1 per output element", bias))
    return shares


def _deformable(unit: Unit) -> list[Share]:
    """Counts 20 for the interpolation of a tap, 4 for its coordinates and 1 for the mask, as if once per position."""
    masked = unit.nodes[-1].args[-1] is True
    return _convolution(unit, 24 + masked)


def _linear(unit: Unit) -> list[Share]:
    rows, out = prod(unit.input.shape[:-1]), unit.output.shape[-1]
    shares = [Share(unit.kind, "", unit.input.shape[-1] * out * rows, unit.ours)]
    if unit.module.bias is not None:
        shares.append(Share(f"{unit.kind} bias", "1 per output element", out * rows))
    return shares


def _norm(unit: Unit) -> list[Share]:
    each = 2 if getattr(unit.module, "affine", False) else 1
    return [Share(unit.kind, f"{each} per element", each * unit.input.numel)]


def _hooks() -> dict[type[nn.Module], _Hook]:
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    activations = (nn.ReLU, nn.PReLU, nn.ELU, nn.LeakyReLU, nn.ReLU6, nn.GELU)
    table: dict[type[nn.Module], _Hook] = dict.fromkeys(CONV_MODULES, _convolution)
    table |= dict.fromkeys((*norms, nn.GroupNorm, nn.LayerNorm), _norm)
    table |= dict.fromkeys(activations, lambda unit: [Share(unit.kind, "1 per element", unit.output.numel)])
    for dims in (1, 2, 3):
        for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg"):
            pool = getattr(nn, f"{kind}Pool{dims}d")
            table[pool] = lambda unit: [Share(unit.kind, "1 per input element", unit.input.numel)]
    first = "1 per output element of the first item"
    table[nn.Upsample] = lambda unit: [Share(unit.kind, first, prod(unit.output.shape[1:]))]
    return table | {nn.Linear: _linear}


_HOOKS = _hooks()


def _hook_of(module: nn.Module) -> _Hook | None:
    """What ptflops counts for a call of a module of this class; None where it has no hook for it."""
    kind = type(module)
    if kind.__name__ == "DeformConv2d" and kind.__module__.startswith("torchvision.ops"):
        return _deformable
    return _HOOKS.get(kind)


def _function(node: fx.Node, unit: Unit) -> Share | None:
    """The share of a function that is replaced while ptflops runs; None where the node calls none."""
    facts = info(node)
    if node.op == "call_module":
        return _inside(unit.module, facts)
    name = function_name(node)
    if name.endswith("_with_indices") and _calls_by(unit.module, name.removesuffix("_with_indices")):
        return Share(unit.kind, "1 per input element, as a function", facts.inputs[0].numel)
    if name in _PATCHED and node.target is getattr(F, name) and not _bound_before(unit.module, name):
        if name in _RESIZES:
            return Share(unit.kind, "1 per output element, as a function", _interpolated(node))
        return Share(unit.kind, "1 per input element, as a function", facts.inputs[0].numel)
    if name not in _PATCHED_TENSOR or (node.op == "call_function" and node.target is not getattr(torch, name)):
        return None
    if node.op == "call_method" and name in _OPERATORS and name not in _names_of(unit.module):
        return None
    counted = _tensor_function(name, node)
    return Share(name, "1 per element, as a function" if name in ("add", "mul") else "as a function", counted)


def _inside(module: nn.Module, facts: NodeInfo) -> Share | None:
    """What the forward of a stock module adds by calling a replaced function."""
    forward: object = type(module).forward
    if not isinstance(forward, FunctionType) or forward.__globals__.get("F") is not F:
        return None
    kind, again = words(facts.op), "again " if type(module) in _HOOKS else ""
    for name in forward.__code__.co_names:
        if name in _RESIZES:
            return Share(kind, f"{again}in F.{name}, 1 per output element", facts.outputs[0].numel)
        if name in _PATCHED:
            return Share(kind, f"{again}in F.{name}, 1 per input element", facts.inputs[0].numel)
    return None


def _interpolated(node: fx.Node) -> float:
    shape = info(node).inputs[0].shape
    dims = len(shape) - 2
    size = argument(node, 1, "size")
    if size is not None:
        return prod(size if isinstance(size, (tuple, list)) else (size,) * dims) * prod(shape[:2])
    scale = argument(node, 2, "scale_factor")
    if isinstance(scale, tuple) and len(scale) == dims:
        return prod(shape) * int(prod(scale))
    return float(prod(shape) * (scale[0] if isinstance(scale, (tuple, list)) else scale) ** dims)


def _tensor_function(name: str, node: fx.Node) -> int:
    tensors = operand_shapes(node)
    if name in ("addmm", "baddbmm"):
        bias, left, right = tensors[:3]
        return prod(left) * right[-1] + (prod(bias) if node.kwargs.get("beta", 1) else 0)
    if name not in ("add", "mul"):
        return prod(tensors[0]) * tensors[1][-1]
    # aligned on the left, unlike broadcasting
    length = max(len(shape) for shape in tensors)
    return prod(max(sizes) for sizes in zip(*(shape + (1,) * (length - len(shape)) for shape in tensors)))


def _functions_of(node: fx.Node, module: nn.Module) -> list[object]:
    """What a node calls: itself, or the functions of ``functional`` that a stock module's forward names."""
    if node.op != "call_module":
        return [node.target]
    forward: object = type(module).forward
    return [getattr(F, name, None) for name in forward.__code__.co_names] if isinstance(forward, FunctionType) else []


@cache
def _replaced_inside(function: object) -> list[str]:
    """Functions that ptflops replaces among those that a function of ``functional`` calls."""
    if not isinstance(function, FunctionType) or function.__globals__ is not vars(F):
        return []
    called = dict.fromkeys(i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL")
    return [name for name in called if name in _PATCHED]


@cache
def _names(kind: type) -> frozenset[str]:
    """Names of attributes and globals in the code of a class of one's own."""
    return frozenset(name for code in _codes(kind) for name in code.co_names)


def _calls_by(module: nn.Module, name: str) -> bool:
    """Whether the code of a class calls a function of ``functional`` by this name, which ptflops has replaced."""
    return name in _names_of(module) and not _bound_before(module, name)


def _names_of(module: nn.Module) -> frozenset[str]:
    kind: type = type(module)  # which mypy takes for hashable
    return _names(kind)


def _codes(kind: type) -> Iterator[CodeType]:
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        for value in vars(base).values():
            function = getattr(value, "__func__", value)
            if isinstance(function, FunctionType):
                yield from _nested(function.__code__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _bound_before(module: nn.Module, name: str) -> bool:
    """Whether a module calls a function of ``functional`` by a reference taken before ptflops replaced it."""
    function = getattr(F, name)
    if any(value is function for value in vars(module).values() if not isinstance(value, Tensor)):
        return True
    namespace: Any = sys.modules.get(type(module).__module__)
    return (
        name in _names_of(module)
        and getattr(namespace, name, None) is function
        and not any(value is F for value in vars(namespace).values())
    )
