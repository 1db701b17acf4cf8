"""What ``fold`` takes for a batch norm beside stock modules: a call in some code, and a scale and shift written out.

The module whose code calls ``F.batch_norm`` becomes a graph without the call, and what only the call read goes with it.
Frozen batch norms and channel-wise scales are written in many ways. What such a module computes is read off its
outputs, ``shift = f(0)`` and ``scale = f(1) - f(0)`` in float64, and checked on random numbers of two sizes, with
gradients wanted and not, since such code often has a branch for either.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...capturing.functions import argument
from ...core.nested import deep_copy
from ...core.plan import Op, SkipReason
from ..graph_edit import drop_node, drop_reads, finish, stored
from .bench import Bench, Refused, not_traced
from .settings import wrong


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
        mean, var, gain, shift, eps = (getattr(norm, field.name, None) for field in fields(cls))
        if not (isinstance(mean, Tensor) and isinstance(var, Tensor) and isinstance(eps, float)):
            return None
        return cls(mean, var, gain, shift, eps)

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

_EPS = 1e-5  # default of ``F.batch_norm``
_SIZES = ((2, 3), (5, 1))  # batch size and extent on which a scale and shift is tried
_TOLERANCE = 1e-4  # of the largest value: code that computes in float32 inside rounds to 6e-8 a few times


class CodeNorm:
    """One call of ``F.batch_norm`` with some tensors and eps in the code of the module ``scope``."""

    def __init__(self, bench: Bench, op: Op, tensors: NormTensors, eps: float, scope: str | None) -> None:
        if scope is None:
            raise wrong(op, "scope", "fold needs a scope for the norm of a call", "a path")
        self.bench, self.op, self.scope = bench, op, scope
        self.names: dict[str, str | None] = vars(tensors)
        read = partial(bench.tensor, op, key="tensors")
        gain, shift = (None if name is None else read(name) for name in (tensors.weight, tensors.bias))
        self.facts = NormFacts(read(tensors.running_mean), read(tensors.running_var), gain, shift, eps)
        self.module = bench.find(op, scope, "scope")
        self.graph_module = bench.graph(op, self.module, frozenset({F.batch_norm}))
        self.node = self._call()

    def _call(self) -> fx.Node:
        made, mean = self.graph_module, self.facts.running_mean
        calls = [n for n in made.graph.nodes if n.op == "call_function" and n.target is F.batch_norm]
        nodes: list[fx.Node] = [n for n in calls if stored(made, argument(n, 1, "running_mean")) is mean]
        if len(nodes) != 1:
            what = f"{len(nodes)} calls of batch_norm with {self.names['running_mean']}"
            raise not_traced(self.op, f"this code has {what}, expected one")
        for i, key in enumerate(TENSORS, start=1):
            if stored(made, argument(nodes[0], i, key)) is not getattr(self.facts, key):
                raise not_traced(self.op, f"the {key} of the call of batch_norm is another one")
        eps = argument(nodes[0], len(TENSORS) + 3, "eps")
        if (_EPS if eps is None else eps) != self.facts.eps:
            raise not_traced(self.op, f"the eps of the call of batch_norm is {eps}, not {self.facts.eps}")
        return nodes[0]

    def remove(self) -> None:
        """Takes the call out and puts the graph in the module's place."""
        reads = [str(read.target) for read in self.node.all_input_nodes if read.op == "get_attr"]
        drop_node(self.node, argument(self.node, 0, "input"))
        drop_reads(self.graph_module, *reads)
        self.bench.replace(self.module, self.graph_module)
        for name in filter(None, self.names.values()):
            self._drop(name)
        finish(self.graph_module)

    def _drop(self, name: str) -> None:
        """Removes a tensor that nothing reads any more, and its holder where that held nothing else."""
        path, _, attribute = name.rpartition(".")
        holder = self.bench.find(self.op, path, "tensors")
        stores: tuple[dict[str, Any], ...] = (holder._parameters, holder._buffers)
        for store in stores:
            if path == self.scope:
                store.pop(attribute, None)
            elif attribute in store:
                store[attribute] = None
        rest = {key for store in stores for key, value in store.items() if value is not None}
        if path != self.scope and rest <= {"num_batches_tracked"} and not list(holder.children()):
            self.bench.remove(holder)


def affine_facts(op: Op, module: nn.Module, channels: int, dims: int, *, fill: bool) -> NormFacts:
    """A channel-wise affine map as a batch norm of mean 0 and variance 1, or `Refused`; ``fill``: do values matter?"""
    zeros = torch.zeros(channels, dtype=torch.float64, device="cpu")
    tensors = (*module.parameters(), *module.buffers())
    if not fill or any(t.is_meta for t in tensors):
        return NormFacts(zeros, zeros + 1, zeros, zeros, 0.0)
    device = tensors[0].device if tensors else zeros.device
    trial, shape = deep_copy(module).double(), (1, channels, *(1,) * dims)

    def run(x: Tensor, gradient: bool = False) -> Tensor:
        with torch.set_grad_enabled(gradient):
            out = trial(x.to(device).requires_grad_(gradient))
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise ValueError("not a map of the same shape")
        return out.detach().double().cpu()

    try:
        shift = run(zeros.view(shape).clone()).flatten()
        scale = run(zeros.view(shape) + 1).flatten() - shift
        generator = torch.Generator().manual_seed(0)
        for batch, extent in _SIZES:
            x = torch.randn(batch, channels, *(extent,) * dims, generator=generator, dtype=torch.float64, device="cpu")
            expected = x * scale.view(shape) + shift.view(shape)
            limit = _TOLERANCE * float(expected.abs().max())
            if any(not torch.allclose(run(x.clone(), gradient), expected, 0.0, limit) for gradient in (False, True)):
                raise ValueError("something else")
    except Exception as error:
        raise no_affine(op, module) from error
    return NormFacts(zeros, zeros + 1, scale, shift, 0.0)


def no_affine(op: Op, module: nn.Module) -> Refused:
    """A module that is no norm to fold."""
    detail = f"{type(module).__name__} is more than a scale and a shift per channel"
    return Refused(op.path, SkipReason.OVERRIDDEN_FORWARD, detail)
