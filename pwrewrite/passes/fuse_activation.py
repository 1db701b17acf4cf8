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
from typing import Any

from torch import fx, nn

from ..capturing.eligibility import eligible, module_refusal
from ..capturing.records import Capture, Layer, info
from ..core.convolution import ConvSpec
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..edit.actions.bench import spec_of_module
from ..forms.specs import spec_to_dict
from ..layers.kernels import LOSES_NAN
from ..layers.known import hooked
from .base import Pass, Proposal, spec_of
from .patterns import UNFUSED, Graph, passes_on

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CACHED = 5 * 2**20
"""Bytes of a map that is still in a cache when an activation runs behind the kernel that made it. Measured on one core:
ResNet-50, MobileNet, GoogLeNet and RegNet at 224² take 0.95-1.01 times as long, with maps of 25 MB up to 1.08 times."""
_IN_PLACE_ADDS = frozenset({"add_", "iadd", "__iadd__"})


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
        """See `Pass.propose`."""
        graph = Graph(capture)
        fused: set[fx.Node] = set()
        proposals: list[Proposal] = []
        for node in graph.nodes:
            layer = graph.layers.get(node.name)
            if layer is None:
                continue
            found = self._one(capture, graph, layer, node, fused)
            if found is not None:
                proposals.append(found)
        done = {p.path for p in proposals}
        for node in graph.nodes:
            skip = None if node in fused else _left(graph, node)
            if skip is not None and skip.path not in done:
                done.add(skip.path)
                proposals.append(skip)
        return self._keeping_nan(graph, proposals)

    def _keeping_nan(self, graph: Graph, proposals: list[Proposal]) -> list[Proposal]:
        """The proposals, with what keeps NaN where that is wanted or costs little."""
        losing = {p.path for p in proposals if isinstance(p, Op) and p.settings["activation"] in LOSES_NAN}
        keep = self.keep_nan
        if keep is None:
            calls = [graph.named[name] for name, layer in graph.layers.items() if layer.path in losing]
            keep = all(spec.nbytes <= _CACHED for call in calls for spec in info(call).outputs)
        if not keep:
            return proposals
        return [
            replace(p, settings={**p.settings, "keep_nan": True}) if isinstance(p, Op) and p.path in losing else p
            for p in proposals
        ]

    def _one(self, capture: Capture, graph: Graph, layer: Layer, node: fx.Node, fused: set[fx.Node]) -> Proposal | None:
        if len(layer.calls) > 1:
            return self._repeated(capture, graph, layer, node, fused)
        last = graph.onward(node, dropouts=False)
        reader = graph.sole_reader(last)
        if reader is None:
            after = [graph.activation(user) for user in last.users]
            if any(found is not None for found in after) and len(last.users) > 1:
                return Skip(layer.path, SkipReason.SEVERAL_READERS, "its output is also read before the activation")
            return None
        settings: dict[str, Any] | None = None
        act = graph.activation(reader)
        if act is not None:
            settings = self._activation(graph, layer, reader, act, fused)
        elif self.residual and _is_add(reader):
            settings = self._addition(graph, layer, node, last, reader, fused)
        if settings is None:
            return None
        steps = [node, *sorted(settings["nodes"], key=graph.order.__getitem__)]
        for before, behind in pairwise(steps):
            why = graph.unfixed(before, behind, only="remove" in settings)
            if why is not None:
                return Skip(layer.path, SkipReason.DATA_DEPENDENT, why)
        if pads_itself(graph, layer, node):
            settings["same"] = True
        else:
            refusal = self._refused(capture, graph, layer)
            if refusal is not None:
                return refusal
        return self._op(layer, settings, fused)

    def _op(self, layer: Layer, settings: dict[str, Any], fused: set[fx.Node]) -> Op:
        fused.update(settings.pop("nodes"))
        settings["layer"] = spec_to_dict(spec_of(layer))
        estimate = Estimate(layer.params, layer.params, layer.macs, layer.macs)
        return Op("fuse", layer.path, self.name, settings, estimate)

    def _repeated(
        self, capture: Capture, graph: Graph, layer: Layer, node: fx.Node, fused: set[fx.Node]
    ) -> Proposal | None:
        """A layer that is called several times: fused where the same code has the same activation behind each call."""
        calls = [graph.named[call.node] for call in layer.calls]
        readers = [graph.sole_reader(graph.onward(call, dropouts=False)) for call in calls]
        acts = [graph.activation(reader) if reader is not None else None for reader in readers]
        if node is not calls[0] or not any(acts):
            return None
        behind = [reader for reader in readers if reader is not None]
        scopes = {_scope(graph, reader) for reader in behind}
        if acts[0] is None or any(act != acts[0] for act in acts) or len(scopes) > 1 or fused & set(behind):
            detail = f"called {len(layer.calls)} times; not every call has this activation behind it"
            return Skip(layer.path, SkipReason.CALLED_TWICE, detail)
        refusal = self._refused(capture, graph, layer)
        if refusal is not None:
            return refusal
        (name, numbers), path = acts[0]
        only = bool(path) and graph.calls_of(path) == len(behind)
        for call, reader in zip(calls, behind):
            if (why := graph.unfixed(call, reader, only=only)) is not None:
                return Skip(layer.path, SkipReason.DATA_DEPENDENT, why)
        if path and hooked(graph.modules[path]):
            return None
        settings: dict[str, Any] = {"activation": name, "scalars": list(numbers), "nodes": set(behind)}
        if path and graph.calls_of(path) == len(behind) and _held_by_callers(graph, path, behind):
            return self._op(layer, settings | {"remove": path}, fused)
        if path and (item := _item(graph, path, behind)) is not None:
            return self._op(layer, settings | {"remove": item, "called": path, "alias": True}, fused)
        return self._op(layer, settings | {"scope": scopes.pop(), "called": path}, fused)

    def _activation(
        self, graph: Graph, layer: Layer, node: fx.Node, act: tuple[Any, str], fused: set[fx.Node]
    ) -> dict[str, Any] | None:
        """Settings for an activation behind a layer."""
        (name, numbers), path = act
        if node in fused or (path and hooked(graph.modules[path])):
            return None
        settings: dict[str, Any] = {"activation": name, "scalars": list(numbers), "nodes": {node}}
        if path and graph.calls_of(path) == 1 and _held_by_callers(graph, path, [node]):
            return settings | {"remove": path}
        if path and (item := _item(graph, path, [node])) is not None:
            return settings | {"remove": item, "called": path, "alias": True}
        scope = _scope(graph, node)
        outside = scope and not f"{layer.path}.".startswith(f"{scope}.")
        if not path and outside and sum(graph.activation(n) == act for n in graph.code.get(scope, ())) == 1:
            settings["head"] = True
        return settings | {"scope": scope, "called": path}

    def _addition(
        self, graph: Graph, layer: Layer, node: fx.Node, last: fx.Node, add: fx.Node, fused: set[fx.Node]
    ) -> dict[str, Any] | None:
        """Settings for an addition behind a layer, and the ReLU behind that where there is one."""
        spec = layer.spec
        if add in fused or spec is None or spec.dims != 2 or len(layer.calls) != 1:
            return None
        operands = [a for a in add.args[:2] if isinstance(a, fx.Node)]
        alpha = add.kwargs.get("alpha", 1)
        if len(operands) != 2 or alpha != 1 or add.kwargs.get("out") is not None:
            return None
        other = operands[0] if operands[1] is last else operands[1]
        name = add.target if isinstance(add.target, str) else getattr(add.target, "__name__", "")
        if other is last or (name in _IN_PLACE_ADDS and operands[0] is not last and not graph.private(other)):
            return None
        ours, theirs = info(last).outputs[0], info(other).outputs
        if len(theirs) != 1 or theirs[0] != ours or len(ours.shape) != 4 or other.op == "get_attr":
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
        settings |= {"activation": "relu", "nodes": {add, reader}}
        if path and graph.calls_of(path) == 1 and _held_by_callers(graph, path, [node]):
            return settings | {"remove": path}
        if end is add and _scope(graph, reader) == settings["scope"]:
            return settings | {"called": path}
        return settings | {"activation": "none", "nodes": {add}}

    def _refused(self, capture: Capture, graph: Graph, layer: Layer) -> Skip | None:
        """Why a layer cannot be fused, though an activation follows it."""
        if layer.spec is not None and layer.spec.transposed:
            return Skip(layer.path, SkipReason.NO_KERNEL, "no fused kernel for transposed convolutions")
        if layer.functional:
            return Skip(layer.path, SkipReason.FUNCTIONAL, "a functional call; make it a module")
        return eligible(capture, layer, graph.owners)


def pads_itself(graph: Graph, layer: Layer, node: fx.Node) -> bool:
    """Whether a layer may be a convolution that pads as TensorFlow does, by its own code; the action tries it out."""
    module = graph.modules.get(layer.path)
    if not isinstance(module, nn.Conv2d) or not layer.functional or len(layer.calls) != 1:
        return False
    if info(node).path != layer.path or ConvSpec.of_module(module) != layer.spec or any(map(any, layer.spec.padding)):
        return False
    if spec_of_module(module) != layer.spec:  # its code does not call what its attributes say
        return False
    refusal = module_refusal(layer.path, module, graph.owners.holders)
    return refusal is not None and refusal.reason is SkipReason.OVERRIDDEN_FORWARD


def _is_add(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and info(node).op in ("add", "iadd")


def _held_by_callers(graph: Graph, path: str, calls: Sequence[fx.Node]) -> bool:
    """Whether no module but those that make the calls holds an activation: one that did not run now may run later."""
    names = graph.names_of(graph.modules[path])
    holders = {id(graph.modules[name.rpartition(".")[0]]) for name in names}
    return all(holders <= {id(graph.modules.get(place)) for place in ("", *info(call).callers)} for call in calls)


def _scope(graph: Graph, node: fx.Node) -> str:
    """The module whose code makes a call, where that is a container the nearest that runs it and is none."""
    found = graph.activation(node)
    if node.op != "call_module" and not (found is not None and found[1]):
        return info(node).path
    callers = _callers(node)
    while callers and isinstance(graph.modules.get(callers[-1]), _CONTAINERS):
        callers.pop()
    return callers[-1] if callers else ""


def _callers(node: fx.Node) -> list[str]:
    """Paths of the modules that run an activation, outermost first; not that of a module that only wraps a function."""
    callers = list(info(node).callers)
    return callers if node.op == "call_module" else callers[:-1]


def _item(graph: Graph, path: str, calls: Sequence[fx.Node]) -> str | None:
    """The name under which a ``Sequential`` holds an activation that others share, where these are all its calls of it.

    That item may become an identity while the others keep the activation.
    """
    owners = {callers[-1] if (callers := _callers(node)) else None for node in calls}
    owner = owners.pop()
    container = None if owner is None else graph.modules.get(owner)
    if owners or type(container) is not nn.Sequential:
        return None
    names = [name for name, child in container._modules.items() if child is graph.modules[path]]
    made = [n for n in graph.nodes if graph.is_call_of(n, path) and _callers(n)[-1:] == [owner]]
    if len(names) != 1 or set(made) != set(calls) or len(set(graph.names_of(container))) != 1:
        return None
    return f"{owner}.{names[0]}" if owner else names[0]


def _left(graph: Graph, node: fx.Node) -> Skip | None:
    """Why an activation is left, for one that is."""
    op = info(node).op
    found = graph.activation(node)
    if found is None and op not in UNFUSED:
        return None
    path = found[1] if found is not None and found[1] else graph.where(node)
    if found is None:
        return Skip(path, SkipReason.NO_KERNEL, f"no fused kernel for {op}")
    before = graph.back(node.args[0]) if node.args else None
    what = info(before).op if isinstance(before, fx.Node) and not passes_on(before) else "what is read elsewhere, too"
    if isinstance(before, fx.Node) and before.name in graph.layers:
        layer = graph.layers[before.name]
        return Skip(path, SkipReason.NOT_BEHIND_LAYER, f"behind {layer.path}, which was left; see there")
    return Skip(path, SkipReason.NOT_BEHIND_LAYER, f"it follows {what}, not a convolution or linear map")
