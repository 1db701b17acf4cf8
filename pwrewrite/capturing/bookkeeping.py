"""Writing down the facts of a node: what it read and made, what it cost, whose storage it shares."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from ..core.convolution import ConvSpec
from ..core.cost import Cost
from ..core.nested import tensors_of
from .inventory import Inventory
from .liveness import Liveness
from .origins import Origins, spec_of
from .records import NodeInfo, TensorSpec, Window, info, set_info
from .tensors import byte_count
from .threads import Here


class Bookkeeper:
    """Keeps the books of one recording; ``thread`` knows the modules whose forward runs."""

    def __init__(self, origins: Origins, liveness: Liveness, inventory: Inventory, thread: Here) -> None:
        self.origins, self.liveness, self._thread = origins, liveness, thread
        self._parameters = {id(p) for p in inventory.parameters if not inventory.kinds or not is_lazy(p)}
        self._counted: set[int] = set()

    def record(
        self,
        node: fx.Node,
        op: str,
        path: str,
        read: object,
        out: object,
        *,
        macs: int = 0,
        writes: bool = False,
        params: int = 0,
        weight_bytes: int = 0,
        window: Window | None = None,
        spec: ConvSpec | None = None,
        unpriced: tuple[str, ...] = (),
        temporary: int = 0,
        weights: set[int] | frozenset[int] = frozenset(),
    ) -> None:
        """Writes down the facts of a node, and that it made ``out``.

        Args:
            read: Its arguments, tensors in any nesting.
            writes: Whether it writes into an argument.
            params: Parameters that it used first, those in ``read`` apart; likewise ``weight_bytes``.
            unpriced: Operations without a formula.
            temporary: Bytes that it holds beside its result while it runs.
            weights: Identities of tensors in ``read`` that serve as weights though they are no parameters.
        """
        origins, watch, strided = self.origins, self.liveness.watch, torch.strided
        inputs: dict[int, TensorSpec] = {}
        read_bytes = written = 0
        for t in tensors_of(read):
            if id(t) in weights or (type(t) is not Tensor and isinstance(t, nn.Parameter)):
                params += self.count(t)
                weight_bytes += byte_count(t)
            elif id(t) not in inputs:
                inputs[id(t)] = _known_spec(t)
                read_bytes += t.nbytes if t.layout is strided else byte_count(t)
        outputs: list[TensorSpec] = []
        alias = None
        name = node.name
        for t in (out,) if isinstance(out, Tensor) else tensors_of(out):
            outputs.append(spec_of(t))
            shared = watch(t, name, known=origins.known(t))
            if shared is None or writes:
                written += t.nbytes if t.layout is strided else byte_count(t)
            alias = alias or shared
        origins.mark(out, node)
        self.liveness.pass_by(name, temporary)
        moves = written or macs or unpriced
        cost = Cost(params, macs, weight_bytes + read_bytes if moves else 0, written)
        callers = tuple(self._thread.scope)
        facts = NodeInfo(op, path, tuple(inputs.values()), tuple(outputs), cost, alias, window, spec, unpriced, callers)
        set_info(node, facts)

    def count(self, t: Tensor) -> int:
        """Elements of a parameter of the model the first time it is met, then 0."""
        key = id(t)
        if key in self._counted or key not in self._parameters:
            return 0
        self._counted.add(key)
        return t.numel()


def _known_spec(t: Tensor) -> TensorSpec:
    """The spec of a tensor, taken from the node that made it where that made nothing else."""
    origin = getattr(t, "_pw_node", None)
    if type(origin) is fx.Node:
        outputs = info(origin).outputs
        if len(outputs) == 1:
            return outputs[0]
    return spec_of(t)
