"""`FusePointwiseActivation`: a convolution or linear map and the activation behind it become one module. Exact.

``act(conv(x))`` in one kernel saves writing and reading the whole map once more; ``relu(conv(x) + residual)`` saves it
twice. What is fused: the layer, the identities behind it, an addition where its other operand has the output's shape,
and the activation, each with no other reader. A layer whose output is only added to something is fused with that
addition alone. One that is called several times is fused where the same activation is behind each of its calls.

Where the activation is a module that is called once, it becomes an identity. Where it is a function, or a module that
is called several times (torchvision's residual blocks call one ``self.relu`` three times), and for every addition, the
code of the smallest enclosing module becomes a graph in which the call is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from torch import fx, nn

from ..capturing.eligibility import module_refusal
from ..capturing.records import Capture, Layer, info
from ..core.convolution import ConvSpec
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..core.records import Json
from ..edit.actions.bench import spec_of_module
from ..edit.actions.evaluation import function_of
from ..forms.specs import spec_to_dict
from ..layers.kernels import LOSES_NAN
from ..layers.known import Found, hooked
from .base import Pass, Proposal, spec_of
from .patterns import UNFUSED, Graph, passes_on

_CACHED = 5 * 2**20
"""Bytes of a map that is still in a cache when an activation runs behind the kernel that made it. Measured on one core:
ResNet-50, MobileNet, GoogLeNet and RegNet at 224² take 0.95-1.01 times as long, with maps of 25 MB up to 1.08 times."""


class FusePointwiseActivation(Pass):
    """Fuses layers with the activations and residual additions behind them.

    Args:
        residual: Whether additions are fused too.
        keep_nan: Whether NaN stays NaN behind activations whose fused kernel returns a number for it (ReLU, ReLU6,
            hardtanh, hardsigmoid), which then run behind the kernel; where left out, where that costs less than 2% of
            the time: where their maps of the example inputs have at most 5 MiB, and so are in a cache.
    """

    name = "fuse-activation"
    summary = "a convolution or linear map and its activation, with a residual addition between, become one kernel"
    exact = "both"

    def __init__(self, residual: bool = True, keep_nan: bool | None = None) -> None:
        self.residual, self.keep_nan = residual, keep_nan

    def propose(self, capture: Capture) -> list[Proposal]:
        graph, fused = Graph(capture), set[fx.Node]()
        calls = [(graph.layers[node.name], node) for node in graph.nodes if node.name in graph.layers]
        firsts = [layer for layer, node in calls if node.name == layer.calls[0].node]
        proposals = [proposal for layer in firsts if (proposal := self._layer(graph, layer, fused))]
        done = {p.path for p in proposals}
        for skip in (_left(graph, node) for node in graph.nodes if node not in fused):
            if skip is not None and skip.path not in done:
                done.add(skip.path)
                proposals.append(skip)
        return self._keeping_nan(graph, proposals)

    def _keeping_nan(self, graph: Graph, proposals: list[Proposal]) -> list[Proposal]:
        """The proposals, with what keeps NaN where that is wanted or costs little."""
        losing = {p.path for p in proposals if isinstance(p, Op) and p.settings["activation"] in LOSES_NAN}
        calls = [graph.named[name] for name, layer in graph.layers.items() if layer.path in losing]
        cached = all(spec.nbytes <= _CACHED for call in calls for spec in info(call).outputs)
        if not (cached if self.keep_nan is None else self.keep_nan):
            return proposals
        return [
            replace(p, settings={**p.settings, "keep_nan": True}) if isinstance(p, Op) and p.path in losing else p
            for p in proposals
        ]

    def _layer(self, graph: Graph, layer: Layer, fused: set[fx.Node]) -> Proposal | None:
        """What to do with a layer; one that is called several times needs the same activation behind each call."""
        calls = [graph.named[call.node] for call in layer.calls]
        ends = [graph.onward(call, dropouts=False) for call in calls]
        readers = [reader for end in ends if (reader := graph.sole_reader(end)) is not None]
        acts = [graph.activation(reader) for reader in readers]
        act, settings = next(iter(acts), None), None
        if len(calls) == 1 and not readers:
            if len(ends[0].users) > 1 and any(map(graph.activation, ends[0].users)):
                return Skip(layer.path, SkipReason.SEVERAL_READERS, "its output is also read before the activation")
        elif len(calls) > 1 and any(acts):
            alike = len(readers) == len(calls) and all(each == act for each in acts)
            if not alike or len({_scope(graph, reader) for reader in readers}) > 1 or fused & set(readers):
                detail = f"called {len(calls)} times; not every call has this activation behind it"
                return Skip(layer.path, SkipReason.CALLED_TWICE, detail)
        if act is not None:
            settings = self._activation(graph, layer, readers, act, fused)
        elif self.residual and len(calls) == len(readers) == 1 and info(readers[0]).op in ("add", "iadd"):
            settings = self._addition(graph, layer, calls[0], ends[0], readers[0], fused)
        if settings is None:
            return None
        nodes: set[fx.Node] = settings.pop("nodes")
        in_order = [*calls, *sorted(nodes, key=graph.order.__getitem__)]
        for before, behind in zip(calls, readers) if len(calls) > 1 else pairwise(in_order):
            if why := graph.unfixed(before, behind, only="remove" in settings):
                return Skip(layer.path, SkipReason.DATA_DEPENDENT, why)
        if pads_itself(graph, layer):
            settings["same"] = True
        elif refusal := _refused(graph, layer):
            return refusal
        fused |= nodes
        settings["layer"] = spec_to_dict(spec_of(layer))
        estimate = Estimate(layer.params, layer.params, layer.macs, layer.macs)
        return Op("fuse", layer.path, self.name, settings, estimate)

    def _activation(
        self, graph: Graph, layer: Layer, behind: list[fx.Node], act: tuple[Found, str], fused: set[fx.Node]
    ) -> dict[str, Json] | None:
        """Settings for an activation behind each call of a layer."""
        (name, numbers), path = act
        if fused & set(behind) or (path and hooked(graph.modules[path])):
            return None
        settings: dict[str, Json] = {"activation": name, "scalars": list(numbers), "nodes": set(behind)}
        if path and graph.calls_of(path) == len(behind) and _held_by_callers(graph, path, behind):
            return settings | {"remove": path}
        if path and (item := _item(graph, path, behind)) is not None:
            return settings | {"remove": item, "called": path, "alias": True}
        scope = _scope(graph, behind[0])
        outside = scope and not f"{layer.path}.".startswith(f"{scope}.")
        if not path and outside and sum(graph.activation(n) == act for n in graph.code.get(scope, ())) == 1:
            settings["head"] = True
        return settings | {"scope": scope, "called": path}

    def _addition(
        self, graph: Graph, layer: Layer, node: fx.Node, last: fx.Node, add: fx.Node, fused: set[fx.Node]
    ) -> dict[str, Json] | None:
        """Settings for an addition behind a layer, and the ReLU behind that where there is one."""
        operands = [a for a in add.args[:2] if isinstance(a, fx.Node)]
        if add in fused or layer.spec is None or layer.spec.dims != 2 or len(operands) != 2:
            return None
        if add.kwargs.get("alpha", 1) != 1 or add.kwargs.get("out") is not None:
            return None
        other = operands[0] if operands[1] is last else operands[1]
        in_place = function_of(add) in ("add_", "iadd", "__iadd__")
        if other is last or (in_place and operands[0] is not last and not graph.private(other)):
            return None
        ours, theirs = info(last).outputs[0], info(other).outputs
        if theirs != (ours,) or len(ours.shape) != 4 or other.op == "get_attr":
            return None
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or graph.written(other, other, add) or graph.written(source, node, add):
            return None
        scope = _scope(graph, add)
        if scope and not f"{layer.path}.".startswith(f"{scope}."):
            return None  # other code makes the addition, perhaps with a layer of its own
        settings = {"residual": True, "activation": "none", "scalars": [], "scope": scope, "nodes": {add}}
        end = graph.onward(add, dropouts=False)
        reader = graph.sole_reader(end)
        act = graph.activation(reader) if reader is not None else None
        if reader is None or act is None or act[0][0] != "relu" or reader in fused:
            return settings
        path = act[1]
        if path and hooked(graph.modules[path]):
            return settings
        relu = settings | {"activation": "relu", "nodes": {add, reader}}
        if path and graph.calls_of(path) == 1 and _held_by_callers(graph, path, [node]):
            return relu | {"remove": path}
        return relu | {"called": path} if end is add and _scope(graph, reader) == scope else settings


def _refused(graph: Graph, layer: Layer) -> Skip | None:
    """Why a layer cannot be fused, though an activation follows it."""
    if layer.spec is not None and layer.spec.transposed:
        return Skip(layer.path, SkipReason.NO_KERNEL, "no fused kernel for transposed convolutions")
    return graph.unfusable(layer)


def pads_itself(graph: Graph, layer: Layer) -> bool:
    """Whether a layer may be a convolution that pads as TensorFlow does, by its own code; the action tries it out."""
    module = graph.modules.get(layer.path)
    if not isinstance(module, nn.Conv2d) or not layer.functional or len(layer.calls) != 1:
        return False
    if info(graph.named[layer.calls[0].node]).path != layer.path or any(map(any, ConvSpec.of_module(module).padding)):
        return False
    if spec_of_module(module) != layer.spec:  # its code does not call what its attributes say
        return False
    refusal = module_refusal(layer.path, module, graph.owners.holders)
    return refusal is not None and refusal.reason is SkipReason.OVERRIDDEN_FORWARD


def _held_by_callers(graph: Graph, path: str, calls: Sequence[fx.Node]) -> bool:
    """Whether no module but those that make the calls holds an activation: one that did not run now may run later."""
    holders = {id(graph.modules[name.rpartition(".")[0]]) for name in graph.names_of(graph.modules[path])}
    return all(holders <= {id(graph.modules.get(place)) for place in ("", *info(call).callers)} for call in calls)


def _scope(graph: Graph, node: fx.Node) -> str:
    """The module whose code makes a call, where that is a container the nearest that runs it and is none."""
    act = graph.activation(node)
    if node.op != "call_module" and (act is None or not act[1]):
        return info(node).path
    callers = _callers(node)
    while callers and isinstance(graph.modules.get(callers[-1]), (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        callers.pop()
    return callers[-1] if callers else ""


def _callers(node: fx.Node) -> list[str]:
    """Paths of the modules that run an activation, outermost first; not that of a module that only wraps a function."""
    callers = list(info(node).callers)
    return callers if node.op == "call_module" else callers[:-1]


def _item(graph: Graph, path: str, calls: Sequence[fx.Node]) -> str | None:
    """The item of a ``Sequential`` that may become an identity, for an activation that others share, of these calls."""
    owners = {tuple(_callers(node)[-1:]) for node in calls}
    owner = owners.pop()
    container = graph.modules.get(owner[0]) if owner else None
    if owners or type(container) is not nn.Sequential:
        return None
    names = [name for name, child in container._modules.items() if child is graph.modules[path]]
    same = [n for n in graph.nodes if graph.is_call_of(n, path) and tuple(_callers(n)[-1:]) == owner]
    if not names or len(same) % len(names) or len(set(graph.names_of(container))) != 1:
        return None
    same.sort(key=graph.order.__getitem__)  # each time the container calls its items in a row
    places = [name for i, name in enumerate(names) if set(same[i :: len(names)]) == set(calls)]
    return f"{owner[0]}.{places[0]}".removeprefix(".") if places else None


def _left(graph: Graph, node: fx.Node) -> Skip | None:
    op, act = info(node).op, graph.activation(node)
    if act is None:
        return Skip(graph.where(node), SkipReason.NO_KERNEL, f"no fused kernel for {op}") if op in UNFUSED else None
    path = act[1] or graph.where(node)
    before = graph.back(node.args[0]) if node.args else None
    if isinstance(before, fx.Node) and before.name in graph.layers:
        detail = f"behind {graph.layers[before.name].path}, which was left; see there"
        return Skip(path, SkipReason.NOT_BEHIND_LAYER, detail)
    what = info(before).op if isinstance(before, fx.Node) and not passes_on(before) else "what is read elsewhere, too"
    what = "a weight or constant" if what == "get_attr" else what
    return Skip(path, SkipReason.NOT_BEHIND_LAYER, f"it follows {what}, not a convolution or linear map")
