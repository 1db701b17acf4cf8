"""A batch norm that a module's code calls as a function, taken out of that code: the graph edit of ``fold``.

The module whose code makes the call becomes a graph without it. What only the call read goes with it: scale and shift,
statistics, and a norm module that did nothing but hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...capturing.code_trace import NotTraceable
from ...core.errors import PlanError
from ...core.plan import Op, Skip, SkipReason
from ..graph_edit import Regraphed
from .bench import Bench, Refused
from .evaluation import code_graph

TENSORS = ("running_mean", "running_var", "weight", "bias")
"""What a batch norm reads beside its input."""


class CodeNorm:
    """One call of ``F.batch_norm``.

    Attributes:
        scope: Path of the module whose code makes it.
        norm: What it reads, as attributes like those of a norm module.

    Args:
        bench: The model.
        op: A ``fold`` whose settings name the ``tensors``, the ``eps`` and the ``scope``.

    Raises:
        PlanError: If the settings make no sense here.
        Refused: If the code cannot become a graph, or does not make this call.
    """

    def __init__(self, bench: Bench, op: Op) -> None:
        self.bench, self.op = bench, op
        names, eps, scope = (op.settings.get(key) for key in ("tensors", "eps", "scope"))
        if not isinstance(scope, str):
            raise PlanError("scope is no path", where=op.where("scope"), expected="a string", got=repr(scope))
        if isinstance(eps, bool) or not isinstance(eps, (int, float)):
            raise PlanError("eps is no number", where=op.where("eps"), got=repr(eps))
        self.names = self._read_names(names)
        self.scope = scope
        self.norm = SimpleNamespace(**{key: self._tensor(key) for key in TENSORS}, eps=float(eps))
        self.module = bench.find(op, scope, "scope")
        bench.check_held(op.path, self.module)
        try:
            self.made: Regraphed = code_graph(self.module, frozenset({F.batch_norm}))
        except NotTraceable as error:
            raise Refused(Skip(op.path, SkipReason.NOT_TRACED, str(error))) from error
        self.node = self._call()

    def _read_names(self, names: Any) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        if isinstance(names, Mapping):
            found = {key: names.get(key) for key in TENSORS}
        if not found or any(not (name is None or isinstance(name, str)) for name in found.values()):
            expected = f"an object with {', '.join(TENSORS)}"
            raise PlanError("no tensors of a norm", where=self.op.where("tensors"), expected=expected, got=repr(names))
        return found

    def _tensor(self, key: str) -> Tensor | None:
        name = self.names[key]
        if name is None:
            return None
        owner, _, attribute = name.rpartition(".")
        found = getattr(self.bench.find(self.op, owner, "tensors"), attribute, None)
        if not isinstance(found, Tensor):
            raise PlanError("the model has no such tensor", where=self.op.where("tensors"), got=name)
        return found

    def _call(self) -> fx.Node:
        """The node that makes the call."""
        calls = [n for n in self.made.graph.nodes if n.op == "call_function" and n.target is F.batch_norm]
        found: list[fx.Node] = [n for n in calls if self._reads(n, 1, "running_mean") is self.norm.running_mean]
        if len(found) != 1:
            detail = f"this code has {len(found)} calls of batch_norm with {self.names['running_mean']}, expected one"
            raise Refused(Skip(self.op.path, SkipReason.NOT_TRACED, detail))
        for i, key in enumerate(TENSORS, start=1):
            if self._reads(found[0], i, key) is not getattr(self.norm, key):
                detail = f"the {key} of the call of batch_norm is another one"
                raise Refused(Skip(self.op.path, SkipReason.NOT_TRACED, detail))
        return found[0]

    def _reads(self, node: fx.Node, position: int, key: str) -> Any:
        read = node.args[position] if len(node.args) > position else node.kwargs.get(key)
        if not isinstance(read, fx.Node) or read.op != "get_attr":
            return read
        return attrgetter(str(read.target))(self.made)

    def remove(self) -> None:
        """Takes the call out and puts the graph in the module's place."""
        graph, node = self.made.graph, self.node
        source: Any = node.args[0] if node.args else node.kwargs["input"]
        reads = [read for read in node.all_input_nodes if read.op == "get_attr"]
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        for read in reads:
            if not read.users:
                graph.erase_node(read)
        self.bench.replace(self.module, self.made)
        for name in self.names.values():
            if name is not None:
                self._drop(name)
        graph.lint()
        self.made.recompile()

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
            identity = nn.Identity()
            identity.train(holder.training)
            self.bench.replace(holder, identity)
