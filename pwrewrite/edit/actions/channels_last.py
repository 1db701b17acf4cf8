"""``channels-last``: 2-D convolutions compute in channels_last, and code takes maps in it (the kind ``code``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from ...core.convolution import ConvSpec
from ...core.plan import Edit, Op
from ...layers import PointwiseActivation
from ..graph_edit import Regraphed, finish
from .bench import Bench, check_spec, not_traced
from .simplify import casts, writes_anywhere, writes_to


@dataclass(frozen=True)
class ChannelsLastSettings:
    """Settings of ``channels-last``: path of a layer to its shape facts."""

    layers: Mapping[str, ConvSpec]


@dataclass(frozen=True)
class ReshapeSettings:
    """Settings of a ``channels-last`` on code: none beside the kind."""

    kind: str


def reshape_views(bench: Bench, op: Op, settings: ReshapeSettings) -> Edit:
    """Carries out a ``channels-last`` op on code: every ``view`` of it becomes a ``reshape``."""
    module = bench.find(op, op.path)
    graph_module = bench.graph(op, module)
    views = [n for n in graph_module.graph.nodes if n.op == "call_method" and n.target == "view" and not casts(n)]
    if not views:
        raise not_traced(op, "nothing in its own code is viewed")
    if any(_written(graph_module, node) for node in views):
        raise not_traced(op, "its own code writes into what it views, of which a reshape may be a copy")
    for node in views:
        node.target = "reshape"
    finish(graph_module)
    aliases = bench.replace(module, graph_module, op.path)
    return Edit(op, "graph", "reshape", exact="both", aliases=aliases, graph_module=op.path)


def _written(graph_module: Regraphed, view: fx.Node) -> bool:
    """Whether code may write into a view, or into what it is of while that has other readers."""
    source = view.args[0]
    if isinstance(source, fx.Node) and len(source.users) > 1 and writes_anywhere(graph_module):
        return True
    for user in view.users:
        reader = graph_module.get_submodule(str(user.target)) if user.op == "call_module" else None
        while isinstance(reader, nn.Sequential) and len(reader):
            reader = reader[0]
        if getattr(reader, "inplace", False) or (reader is None and writes_to(user)):
            return True
    return False


def use_channels_last(bench: Bench, op: Op, settings: ChannelsLastSettings) -> Edit:
    """Carries out a ``channels-last`` op; no layer is changed where one of them must stay as it is."""
    fused, plain = [], []
    for path, spec in settings.layers.items():
        module = bench.find(op, path, "layers")
        if isinstance(module, PointwiseActivation):
            check_spec(op, module.spec, spec, path)
            fused.append(module)
        else:
            plain.append((bench.layer(op, path, spec, "layers"), spec))
    for module in fused:
        module.channels_last = True
    for layer, spec in plain:
        bench.replace(layer, PointwiseActivation.of_layer(layer, spec, "none", channels_last=True))
    return Edit(op, "module", "channels-last", exact="both")
