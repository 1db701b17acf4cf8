"""A batch norm that a module's code calls as a function, taken out of that code: the graph edit of ``fold``.

The module whose code makes the call becomes a graph without it. What only the call read goes with it: scale and shift,
statistics, and a norm module that did nothing but hold them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...core.errors import PlanError
from ...core.plan import Op
from ..graph_edit import argument
from .bench import Bench, not_traced


@dataclass(frozen=True)
class NormTensors:
    """Full names of what a batch norm reads beside its input."""

    running_mean: str
    running_var: str
    weight: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class NormFacts:
    """What a batch norm computes with."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, norm: nn.Module) -> NormFacts | None:
        """Those of a norm module; None where it has no running statistics."""
        values: dict[str, Any] = {field.name: getattr(norm, field.name, None) for field in fields(cls)}
        complete = all(isinstance(values[key], Tensor) for key in ("running_mean", "running_var"))
        return cls(**values) if complete and isinstance(values["eps"], float) else None

    @property
    def params(self) -> int:
        """How many of its numbers are parameters."""
        return sum(t.numel() for t in (self.weight, self.bias) if isinstance(t, nn.Parameter))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """One scale and one shift per channel, in float64."""
        mean, var = self.running_mean.detach().double(), self.running_var.detach().double()
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.detach().double()
        return scale, -mean * scale if self.bias is None else self.bias.detach().double() - mean * scale

    def apply(self, x: Tensor) -> Tensor:
        """What it makes of a tensor in evaluation."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


TENSORS = tuple(field.name for field in fields(NormTensors))
"""What a batch norm reads beside its input, in the order of its arguments."""

_EPS = 1e-5
"""Default of ``F.batch_norm``."""


class CodeNorm:
    """One call of ``F.batch_norm``.

    Attributes:
        scope: Path of the module whose code makes it.
        names: What it reads, to the full name of that.
        facts: What it computes with.

    Args:
        bench: The model.
        op: A ``fold``.
        tensors: The names of what the call reads.
        eps: What it adds to the variance.
        scope: Path of the module whose code makes the call.

    Raises:
        PlanError: If the settings make no sense here.
        Refused: If the code cannot become a graph, or does not make this call.
    """

    def __init__(self, bench: Bench, op: Op, tensors: NormTensors, eps: float, scope: str | None) -> None:
        if scope is None:
            raise PlanError("fold needs a scope for the norm of a call", where=op.where("scope"), expected="a path")
        self.bench, self.op, self.scope = bench, op, scope
        self.names: dict[str, str | None] = vars(tensors)
        values = {key: None if name is None else bench.tensor(op, name, "tensors") for key, name in self.names.items()}
        self.facts = NormFacts(**values, eps=eps)  # type: ignore[arg-type]
        self.module = bench.find(op, scope, "scope")
        self.graph_module = bench.graph(op, self.module, frozenset({F.batch_norm}))
        self.node = self._call()

    def _call(self) -> fx.Node:
        """The node that makes the call."""
        calls = [n for n in self.graph_module.graph.nodes if n.op == "call_function" and n.target is F.batch_norm]
        matching: list[fx.Node] = [n for n in calls if self._reads(n, 1, "running_mean") is self.facts.running_mean]
        if len(matching) != 1:
            calls_found = f"{len(matching)} calls of batch_norm with {self.names['running_mean']}"
            raise not_traced(self.op, f"this code has {calls_found}, expected one")
        for i, key in enumerate(TENSORS, start=1):
            if self._reads(matching[0], i, key) is not getattr(self.facts, key):
                raise not_traced(self.op, f"the {key} of the call of batch_norm is another one")
        call_eps = argument(matching[0], len(TENSORS) + 3, "eps")
        if (_EPS if call_eps is None else call_eps) != self.facts.eps:
            raise not_traced(self.op, f"the eps of the call of batch_norm is {call_eps}, not {self.facts.eps}")
        return matching[0]

    def _reads(self, node: fx.Node, position: int, key: str) -> Any:
        read = argument(node, position, key)
        if not isinstance(read, fx.Node) or read.op != "get_attr":
            return read
        return attrgetter(str(read.target))(self.graph_module)

    def remove(self) -> None:
        """Takes the call out and puts the graph in the module's place."""
        graph, node = self.graph_module.graph, self.node
        source = argument(node, 0, "input")
        reads = [read for read in node.all_input_nodes if read.op == "get_attr"]
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        for read in reads:
            if not read.users:
                graph.erase_node(read)
        self.bench.replace(self.module, self.graph_module)
        for name in self.names.values():
            if name is not None:
                self._drop(name)
        graph.lint()
        self.graph_module.recompile()

    def _drop(self, name: str) -> None:
        """Removes a tensor that nothing reads any more, and its holder where that held nothing else."""
        path, _, attribute = name.rpartition(".")
        holder = self.bench.find(self.op, path, "tensors")
        if path == self.scope:
            holder._parameters.pop(attribute, None)
            holder._buffers.pop(attribute, None)
            return
        for store in (holder._parameters, holder._buffers):
            if attribute in store:
                store[attribute] = None
        rest = [key for s in (holder._parameters, holder._buffers) for key, value in s.items() if value is not None]
        if set(rest) <= {"num_batches_tracked"} and not any(True for _ in holder.children()):
            self.bench.remove(holder)
