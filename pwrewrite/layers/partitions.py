"""A layer as a compiled partition of oneDNN's graph interface, which costs less to call than its convolution.

A call of ``torch.ops.mkldnn`` describes the convolution to oneDNN anew each time, some 30 µs on top of the kernel (60
between other layers, when the caches are cold): on small maps as much as the kernel itself. A partition is described
once, for one shape, and its call costs a fourth of that; the kernel is the same one. torch reaches partitions through
the graph fuser of its TorchScript interpreter, which is used here for a single layer: traced, run twice, and taken only
where the fuser took all of it and the values on random input are those of the plain layer.

A partition holds its own packed copy of the weight. It is made after a few calls with the same shape, for calls short
enough to notice, and costs about 10 ms once. Where torch has no such fuser, there are none.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_C: Any = torch._C
_LOCK = threading.RLock()
"""Held while a function is made, by settings of the whole process. What is traced may hold fused layers itself."""
_AT_WORK = threading.local()
FUSER = all(
    hasattr(_C, name)
    for name in (
        "_jit_set_llga_enabled",
        "_jit_llga_enabled",
        "_create_graph_by_tracing",
        "_create_function_from_graph",
        "_last_executed_optimized_graph",
    )
)
_MACS = 400_000_000
"""Above this many MACs the call's own cost is below a hundredth of the kernel's time."""

_TOLERANCE = 1e-5
"""Relative distance to the plain layer, on random input, above which a partition computes something else (the fuser
takes the tanh approximation of GELU for GELU itself, at 1e-4)."""

CALLS = 3
"""Calls with one shape after which a partition is made for it."""

Run = Callable[..., Tensor]


def worthwhile(x: Tensor, out: Tensor, weight: Tensor) -> bool:
    """Whether a call is one that a partition makes faster: on float32, short, and not itself a part of tracing."""
    if not FUSER or x.dtype is not torch.float32 or getattr(_AT_WORK, "tracing", False):
        return False
    return out.numel() * weight[0].numel() <= _MACS


def compiled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: Sequence[Any],
    act: Callable[..., Tensor],
    scalars: Sequence[float],
    *,
    adds: Tensor | None,
) -> Run | None:
    """The layer as one partition for inputs of this shape; None where the fuser does not take all of it.

    Args:
        x: An input, in channels_last.
        weight: The weight, as the layer has it.
        bias: The bias.
        settings: Padding, stride, dilation and groups.
        act: The activation.
        scalars: Its numbers.
        adds: A residual in channels_last, where the layer adds one.
    """
    padding, stride, dilation, groups = settings
    w, b = weight.detach(), None if bias is None else bias.detach()

    def plain(t: Tensor) -> Tensor:
        return act(torch.conv2d(t, w, b, stride, padding, dilation, groups), *scalars)

    def adding(t: Tensor, residual: Tensor) -> Tensor:
        return act(torch.conv2d(t, w, b, stride, padding, dilation, groups) + residual, *scalars)

    run = plain if adds is None else adding
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(t.shape, generator=generator) for t in (x, adds) if t is not None]
        found = traced(run, [t.contiguous(memory_format=torch.channels_last) for t in drawn], _TOLERANCE)
    if isinstance(found, str):
        return None
    made, (out,), graph = found
    kinds = {node.kind() for node in graph.nodes()}
    if "prim::oneDNNFusionGuard" not in kinds or any(kind.startswith("aten::") for kind in kinds):
        return None
    return made if out.is_contiguous(memory_format=torch.channels_last) else None


def traced(
    run: Callable[..., Tensor | tuple[Tensor, ...]], given: Sequence[Tensor], tolerance: float
) -> tuple[Callable[..., Any], tuple[Tensor, ...], Any] | str:
    """A function of float32 tensors with what the fuser can take of it as partitions.

    Args:
        run: The function; its parameters need no gradient.
        given: Inputs of the shapes and in the memory formats that it is made for; they are not kept.
        tolerance: Greatest relative distance to the function's own values.

    Returns:
        What computes it for these shapes, its outputs and the optimised graph; or why torch cannot make it, such as
        that its values are not those of the function.
    """
    if not FUSER:
        return "this build of torch has no oneDNN graphs"
    with _LOCK, torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: sizes are what they are
        before = _C._jit_llga_enabled()
        _C._jit_set_llga_enabled(True)
        _AT_WORK.tracing = True
        try:
            right = _outputs(run(*given))
            names = [f"t{i}" for i in range(len(given))]
            graph, _ = _C._create_graph_by_tracing(run, tuple(given), _unnamed, True, False, None, names)
            if any(map(_draws, graph.nodes())):
                return "it draws random numbers"
            _separate(graph)
            made: Callable[..., Any] = _C._create_function_from_graph("forward", graph)
            made(*given)
            found = _outputs(made(*given))
            done = _C._last_executed_optimized_graph()
            same = _same(made, run, given, tolerance)
        except Exception as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            return f"torch's tracer or fuser fails: {said[-1][:160]}"  # the interpreter says last what happened
        finally:
            _AT_WORK.tracing = False
            _C._jit_set_llga_enabled(before)
    if not same or not alike(found, right, tolerance):
        return "a traced run gives other values, or other outputs share memory"
    return made, found, done


_BINARY = frozenset({"aten::add", "aten::sub", "aten::mul", "aten::div", "aten::maximum", "aten::minimum"})


def _separate(graph: Any) -> None:
    """Puts a view between operations of two tensors that follow each other, which no partition reaches across.

    Two of them in a partition behind a convolution crash the process (in torch 2.15: ``conv(x) + a + x``,
    where ``x`` is read elsewhere too), or give wrong values; operations of one tensor may lie between.
    """
    for node in list(graph.nodes()):
        if not _joins(node):
            continue
        for i, value in enumerate(list(node.inputs())[:2]):
            if _behind_another(value):
                view = graph.create("aten::alias", [value], 1)
                view.insertBefore(node)
                view.output().setType(value.type())
                node.replaceInput(i, view.output())


def _joins(node: Any) -> bool:
    """Whether a traced operation is one of two tensors, element by element."""
    if node.kind().removesuffix("_") not in _BINARY:
        return False
    return all(value.type().kind() == "TensorType" for value in list(node.inputs())[:2])


def _behind_another(value: Any) -> bool:
    """Whether a tensor comes from an operation of two tensors, by way of any of one, and is read nowhere else."""
    while len(value.uses()) == 1:
        node = value.node()
        if _joins(node):
            return True
        if not node.kind().startswith("aten::") or node.kind() in ("aten::_convolution", "aten::conv2d", "aten::alias"):
            return False
        tensors = [v for v in node.inputs() if v.type().kind() == "TensorType"]
        if len(tensors) != 1:
            return False
        value = tensors[0]
    return False


def _draws(node: Any) -> bool:
    """Whether a traced operation draws random numbers; attention only where it drops."""
    if node.kind() == "aten::scaled_dot_product_attention":
        return bool(list(node.inputs())[4].toIValue() != 0)
    return bool(node.isNondeterministic())


def _same(made: Callable[..., Any], run: Callable[..., Any], given: Sequence[Tensor], tolerance: float) -> bool:
    """Whether two functions give the same on random inputs, and leave them as they are.

    The fuser adds a residual into memory that it believes nobody reads again, and is wrong about that in some graphs.
    The interpreter makes one tensor of two that are equal, and returns ``x`` for ``x + 0``: who writes to one output
    would change the other, or the input.
    """
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator)) for t in given]
    kept = [t.clone() for t in drawn]
    right = _outputs(run(*drawn))
    found = _outputs(made(*drawn))
    if not alike(found, right, tolerance) or not all(map(torch.equal, drawn, kept)):
        return False
    return _sharing(drawn, found) == _sharing(drawn, right)


def _sharing(given: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[int]:
    """For each tensor, the first one in the same memory."""
    memory = [t.untyped_storage().data_ptr() for t in (*given, *outputs)]
    return [memory.index(pointer) for pointer in memory]


def alike(found: Sequence[Tensor], right: Sequence[Tensor], tolerance: float) -> bool:
    """Whether two runs gave the same up to rounding: as many tensors of the same shapes, dtypes and values."""
    if [(t.shape, t.dtype) for t in found] != [(t.shape, t.dtype) for t in right]:
        return False
    return all(_near(a, b, tolerance) for a, b in zip(found, right))


def _outputs(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether ``a`` is ``b`` up to rounding; values that are not finite have to be the same ones."""
    if not a.is_floating_point() or not bool(b.isfinite().all()):
        return bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    return bool((a - b).norm() <= tolerance * b.norm())


def _unnamed(_: Any) -> str:
    return ""
