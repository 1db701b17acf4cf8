"""A function of tensors as a TorchScript graph, whose operations oneDNN's graph interface takes as compiled partitions.

torch reaches that interface through the graph fuser of its TorchScript interpreter alone, by private functions of
``torch._C``, named in this file only; where one is gone, `FUSER` is False, and models run as they do without.

The fuser is not trusted. It writes a residual sum into memory that is read again later; two sums behind one convolution
crash the process; some operations fail only when they run. What it is known not to do is kept apart in the graph
(`pwrewrite.layers.graph_edits`), the result is compared with the function itself, at the outputs and inside, and where
they differ, every operation of two tensors is kept apart before this gives up.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C import Graph, Node, TensorType

from ..core.errors import shortened
from ..core.nested import tensors_of
from .comparing import Function, alike, copies, outputs_of, same_function, trial_inputs
from .graph_edits import gather_outputs, prepare_numbers, separate, sizes_of, spare, work_out_sizes, write_out
from .packing import ForkSafeLock
from .strides import keep_kernels

_C: Any = torch._C
_LOCK = ForkSafeLock()
"""Held while a function is made, by settings of the whole process. What is traced may hold fused layers itself."""
_thread = threading.local()
_NEEDED = """_jit_set_llga_enabled _jit_llga_enabled _jit_pass_remove_mutation _create_graph_by_tracing
_create_function_from_graph _last_executed_optimized_graph"""
FUSER = all(hasattr(_C, name) for name in _NEEDED.split())
"""Whether this build of torch has oneDNN graphs behind its interpreter."""

OTHER_VALUES = "a traced run gives other values, or other outputs share memory"

_INNER_BYTES = 256 * 2**20  # bytes of values inside that are compared, at most
_ROUNDING = 8 * 2.0**-24  # of a float32 after some operations, relative to it


@dataclass(frozen=True)
class Traced:
    """A function, compiled for some shapes, its outputs for the inputs it was made from, and the optimised graph."""

    run: Function
    outputs: tuple[Tensor, ...]
    graph: Graph

    def whole(self) -> bool:
        """Whether the fuser took all of it."""
        kinds = {node.kind() for node in self.graph.nodes()}
        return "prim::oneDNNFusionGuard" in kinds and not any(kind.startswith("aten::") for kind in kinds)


def tracing() -> bool:
    """Whether this thread is making a function at the moment."""
    return getattr(_thread, "tracing", False)


@contextmanager
def making() -> Iterator[None]:
    """While a function is made: one thread at a time, and no fork in between, which would leave the child without."""
    with _LOCK, torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: sizes are what they are
        yield


def traced(run: Function, inputs: Sequence[Tensor], tolerance: float, *, keep_nan: bool = False) -> Traced | str:
    """A function of float32 tensors with what the fuser can take of it as partitions; or why torch cannot make it.

    It is made for the shapes and memory formats of some inputs, which are not kept, and differs from the function's own
    values by ``tolerance`` at most. With ``keep_nan`` ReLU, clamps and max-pools, whose kernels give numbers for NaN,
    stay out of the partitions. The function's parameters need no gradient.
    """
    if not FUSER:
        return "this build of torch has no oneDNN graphs"
    with making():
        fuser = _C._jit_llga_enabled()
        _thread.tracing = True
        try:
            names = [f"t{i}" for i in range(len(inputs))]
            graph, _ = _C._create_graph_by_tracing(run, tuple(inputs), lambda _: "", True, False, None, names)
            if any(map(_draws, graph.nodes())):
                return "it draws random numbers"
            work_out_sizes(graph)
            _C._jit_pass_remove_mutation(graph)  # the fuser fails on operations in place
            if keep_nan:
                spare(graph)
            write_out(graph)
            keep_kernels(graph)
            trials = trial_inputs(run, inputs)
            if isinstance(trials, str):
                return trials
            result = _compiled(graph.copy(), run, trials, tolerance, apart=False)
            return _compiled(graph, run, trials, tolerance, apart=True) if isinstance(result, str) else result
        except Exception as error:
            return _reason(error)
        finally:
            _thread.tracing = False
            _C._jit_set_llga_enabled(fuser)


def _compiled(
    graph: Graph, run: Function, trials: Sequence[tuple[Tensor, ...]], tolerance: float, *, apart: bool
) -> Traced | str:
    """A traced graph, compiled and compared; with every operation of two tensors apart from others, or only some."""
    try:
        separate(graph, every=apart)
        prepare_numbers(graph)
        inner = graph.copy()
        _C._jit_set_llga_enabled(True)
        function: Function = _C._create_function_from_graph("forward", graph)
        function(*trials[0])
        outputs = outputs_of(function(*trials[0]))
        optimised = _C._last_executed_optimized_graph()
        if not all(same_function(function, run, trial, tolerance) for trial in trials):
            return OTHER_VALUES
        if not _same_inside(inner, trials[-1], tolerance):
            return "a traced run gives other values inside"
    except Exception as error:
        return _reason(error)
    return Traced(function, outputs, optimised)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    graph = any(line.startswith("graph(") for line in lines)  # shown behind what happened; the interpreter says it last
    return f"torch's tracer or fuser fails: {shortened(lines[0 if graph else -1])}"


def _draws(node: Node) -> bool:
    """Whether a traced operation draws random numbers; attention only where it drops, dropouts only in training."""
    given: list[Any] = list(node.inputs())
    if node.kind() == "aten::scaled_dot_product_attention":
        return bool(given[4].toIValue() != 0)
    if "dropout" in node.kind() and given[-1].toIValue() is False:
        return False  # torch knows it of those that are not in place
    return bool(node.isNondeterministic())


def _same_inside(graph: Graph, inputs: Sequence[Tensor], tolerance: float) -> bool:
    """Whether values inside a graph that are read more than once are the same with partitions and without."""
    size = 0
    for node in list(graph.nodes()):
        for value in node.outputs():
            kind = value.type()
            if len(value.uses()) < 2 or not isinstance(kind, TensorType) or kind.dtype() is not torch.float32:
                continue
            size += 4 * prod(sizes_of(value) or ())
            if size <= _INNER_BYTES:
                graph.registerOutput(value)
    if not size:
        return True
    gather_outputs(graph)
    results = []
    for fused in (False, True):
        _C._jit_set_llga_enabled(fused)
        function = _C._create_function_from_graph("inside", graph.copy())
        function(*copies(inputs))
        results.append(tensors_of(function(*copies(inputs))))
    # What little is left where large values cancel each other is rounding of those.
    floating = [t.nan_to_num(0, 0, 0) for t in results[0] if t.is_floating_point() and t.numel()]
    largest = max((float(t.square().mean()) ** 0.5 for t in floating), default=0.0)
    return alike(results[1], results[0], tolerance, _ROUNDING * largest)
