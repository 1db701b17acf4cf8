"""``merge-branches``: branches of linear layers and their sum become one layer, in the place of one of them.

The code of the module around them becomes a graph, in which that layer's call stands for the sum; the other layers and
norms become identities. What the branches compute is worked out from that code, in float64, and rounded once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...capturing.code_trace import NotTraceable
from ...core.convolution import ConvSpec, spread
from ...core.plan import Edit, Op, SkipReason
from ...decompose.affine import Affine, NotExact
from ...layers.known import drops, hooked, is_identity
from ..graph_edit import Regraphed, drop_identities, drop_reads, finish
from ..swap import names_of, stem
from .bench import Bench, Refused, WeightedModule, layer_like, not_traced, param_count, spec_of_module, train_like
from .code_norm import NormFacts, affine_facts
from .evaluation import code_graph, function_of, numbered
from .merge import fill_layer
from .settings import Offset, wrong

_REVERSED = ("rsub", "__rsub__")
KINDS = {
    **dict.fromkeys(("add", "iadd", "add_", "__add__", "__radd__", "__iadd__", "radd"), "add"),
    **dict.fromkeys(("sub", "isub", "sub_", "__sub__", "__isub__", *_REVERSED), "sub"),
    **dict.fromkeys(("mul", "imul", "mul_", "__mul__", "__rmul__", "__imul__", "rmul"), "mul"),
    **dict.fromkeys(("div", "truediv", "itruediv", "div_", "__truediv__", "__itruediv__", "true_divide"), "div"),
}
"""Names of functions and methods that are linear in one operand or both, and what they do."""

LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers that are merged."""

Call = tuple[str, Offset]
"""A call in some code: the path of a child, or a function's kind and how often the code called that kind before."""


@dataclass(frozen=True)
class BranchSettings:
    """Settings of ``merge-branches``."""

    scope: str  # path of the module whose code makes the sum
    calls: tuple[Call, ...]  # those in this code that become one, in order; children by their path from the scope
    layer: ConvSpec  # shape facts of what they become
    dims: Offset
    channels: Offset  # of what the branches read
    removed: tuple[str, ...] = ()  # paths of the modules with weights that are no longer called

    @property
    def method(self) -> str:
        """What an edit calls it."""
        return "branches" if {"add", "sub"} & {kind for kind, _ in self.calls} else "scale"


def merge_branches(bench: Bench, op: Op, settings: BranchSettings) -> Edit:
    """Carries out a ``merge-branches`` op; a `RefusedError` says that the merged weight does not fit into its dtype."""
    module, path = bench.find(op, settings.scope, "scope"), op.path
    if not path.startswith(stem(settings.scope)) or isinstance(module, LINEAR):
        raise wrong(op, "scope", "the layer is not inside of the scope", f"a module around {path}", settings.scope)
    old = cast("WeightedModule", bench.find(op, path))
    if not isinstance(old, LINEAR):
        raise wrong(op, "path", "the plan merges into what is no layer here", "a convolution or linear module", path)
    removed = {name: bench.find(op, name, "removed") for name in settings.removed}
    for name, each in {path: old, **removed}.items():
        bench.check_removable(op, name, each)
        if other := next((n for n in names_of(bench.model, each) if not n.startswith(stem(settings.scope))), None):
            raise Refused(op.path, SkipReason.SHARED_WEIGHT, f"{name} is also {other}, where it may be called, too")
    graph_module = bench.graph(op, module)
    drop_identities(graph_module)
    nodes = _nodes(op, graph_module, settings.calls)
    source, known = _source(op, nodes), old.weight.is_meta or not bench.fill
    reader = ModuleReader(op, settings.dims, fill=not known)
    like = reader.plain(old.weight)
    try:
        start = Affine.diagonal(like.new_ones(settings.channels), None, settings.dims)
        merged = evaluate(nodes[-1], {source: start}, reader.in_code(graph_module)).symmetric()
    except NotExact as error:
        raise not_traced(op, f"the branches are not one convolution: {error}") from error
    except NotTraceable as error:
        raise not_traced(op, error) from error
    if merged.spec != settings.layer:
        raise wrong(op, "layer", "the branches are others here", str(settings.layer), str(merged.spec))
    new = layer_like(old.weight, path, merged.spec, initialised=False)
    if not known:
        fill_layer(new, merged, path)
    sources = {stem(n) + name: p for n, m in {path: old, **removed}.items() for name, p in m.named_parameters()}
    for name in _join(graph_module, nodes, source, path.removeprefix(stem(settings.scope))):
        gone = graph_module._parameters.pop(name, None)
        graph_module._buffers.pop(name, None)
        sources |= {} if gone is None else {stem(settings.scope) + name: gone}
    for parameter in new.parameters():
        train_like(parameter, *sources.values())
    names = tuple(f"{path}.{name}" for name, _ in new.named_parameters())
    edit = Edit(op, "graph", settings.method, params_before=sum(p.numel() for p in sources.values()), exact="eval")
    bench.replace(module, graph_module)
    aliases = bench.replace(old, new.train(old.training), path)
    for each in removed.values():
        bench.remove(each)
    edit = replace(edit, params_after=param_count(new), aliases=aliases, adapted=tuple(removed))
    return replace(edit, renamed=dict.fromkeys(sources, names), graph_module=settings.scope)


def _nodes(op: Op, graph_module: Regraphed, calls: Sequence[Call]) -> list[fx.Node]:
    places = numbered(
        graph_module.graph, lambda n: str(n.target) if n.op == "call_module" else KINDS.get(function_of(n), "")
    )
    if any(call not in places for call in calls) or not calls:
        raise not_traced(op, "the code as a graph has other calls")
    return [places[call] for call in calls]


def _source(op: Op, nodes: list[fx.Node]) -> fx.Node:
    """The one value that some calls read from outside; nothing else may read what they make, the last one apart."""
    inside = set(nodes)
    sources = {n for node in nodes for n in node.all_input_nodes if n not in inside and n.op != "get_attr"}
    if len(sources) != 1 or any(user not in inside for node in nodes[:-1] for user in node.users):
        raise not_traced(op, "what the branches make is also read elsewhere in this code")
    return sources.pop()


def _join(graph_module: Regraphed, nodes: list[fx.Node], source: fx.Node, target: str) -> list[str]:
    """Puts one call in the place of others; names of the module's own tensors that nothing reads any more."""
    graph, last = graph_module.graph, nodes[-1]
    with graph.inserting_before(last):
        joined = graph.call_module(target, (source,))
    last.replace_all_uses_with(joined)
    constants = dict.fromkeys(str(n.target) for node in nodes for n in node.all_input_nodes if n.op == "get_attr")
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in sorted(nodes, key=order.__getitem__, reverse=True):
        graph.erase_node(node)
    unread = drop_reads(graph_module, *constants)
    finish(graph_module)
    return unread


Known = dict[fx.Node, Affine]
Operand = Callable[[fx.Node, Affine | None], Affine | Tensor]
"""What a call of a module makes of its input, and what a node without an input (``get_attr``) is."""


def evaluate(node: fx.Node, known: Known, operand: Operand) -> Affine:
    """What a node is of the one node whose value is known: a sum, a multiple, or what a module makes of its input.

    Raises:
        NotExact: If that is no convolution.
    """
    if node in known:
        return known[node]
    alone = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    source = node.args[0] if node.args else None
    if (alone or function_of(node) == "batch_norm") and isinstance(source, fx.Node):  # of a module's own code
        result = operand(node, evaluate(source, known, operand))
        assert isinstance(result, Affine)
    else:
        result = _function(node, known, operand)
    known[node] = result
    return result


def _function(node: fx.Node, known: Known, operand: Operand) -> Affine:
    kind = KINDS.get(function_of(node), "")
    if not kind or len(node.args) != 2 or node.kwargs:
        raise NotExact(f"{function_of(node) or node.op} is not linear")
    values = [_value(arg, known, operand) for arg in node.args]
    first, second = values[::-1] if function_of(node) in _REVERSED else values
    if kind == "sub":
        second = second.scaled(-1) if isinstance(second, Affine) else -second
    elif kind == "div" and not isinstance(second, Affine):
        second = 1 / second
    if isinstance(second, Affine) and kind != "div" and not isinstance(first, Affine):
        first, second = second, first
    if isinstance(first, Affine) and isinstance(second, Affine) and kind in ("add", "sub"):
        return first.plus(second)
    if not isinstance(first, Affine) or isinstance(second, Affine):
        raise NotExact(f"{kind} of these operands is not linear")
    constant = _constant(second, first)
    if kind in ("add", "sub"):
        return first.shifted(constant)
    return first.then(Affine.diagonal(first.weight.new_ones(first.spec.out_channels) * constant, None, first.spec.dims))


def _value(arg: object, known: Known, operand: Operand) -> Affine | Tensor | float:
    if isinstance(arg, fx.Node):
        return operand(arg, None) if arg.op == "get_attr" else evaluate(arg, known, operand)
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        return arg
    raise NotExact("an operand is no number")


def _constant(value: Tensor | float, of: Affine) -> Tensor | float:
    """A number, or one for each channel."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value.reshape(()) if isinstance(value, Tensor) else value
    axis = value.dim() - 1 - of.spec.dims
    if axis not in (0, 1) or value.shape[axis] != value.numel() or value.numel() != of.spec.out_channels:
        raise NotExact("an operand has more than one number for each channel")
    return value.flatten()


class ModuleReader:
    """What modules make of their input; with ``fill`` in float64, else on meta."""

    def __init__(self, op: Op, dims: int, *, fill: bool) -> None:
        self.op, self.dims, self.fill = op, dims, fill

    def plain(self, tensor: Tensor) -> Tensor:
        """A tensor to compute with."""
        return tensor.detach().double() if self.fill else torch.empty_like(tensor, device="meta", dtype=torch.float64)

    def in_code(self, graph_module: fx.GraphModule) -> Operand:
        """What the calls in some code make of their input."""

        def operand(node: fx.Node, x: Affine | None) -> Affine | Tensor:
            if x is None:
                return self.plain(cast("Tensor", operator.attrgetter(str(node.target))(graph_module)))
            if node.op != "call_module":
                raise NotExact(f"{function_of(node)} in this code is not linear")
            return self.module(graph_module.get_submodule(str(node.target)), x)

        return operand

    def module(self, module: nn.Module, x: Affine) -> Affine:
        """What a module makes of what it is given."""
        if is_identity(module) or drops(module):
            return x
        if isinstance(module, LINEAR):
            return x.then(self.layer(module))
        if type(module) in POOLS:
            return x.then(Affine.pool(x.weight, x.spec.out_channels, pool_spec(module)))
        if hooked(module):
            raise NotTraceable(f"{type(module).__name__} has a hook, which would no longer be called")
        if not isinstance(module, _BatchNorm):
            return self._code(module, x)
        facts = NormFacts.of(module) if type(module).forward is _BatchNorm.forward else None
        if facts is None:  # with a forward of its own
            facts = affine_facts(self.op, module, x.spec.out_channels, self.dims, fill=self.fill)
        return x.then(self.norm(facts))

    def norm(self, facts: NormFacts) -> Affine:
        """A norm as a scale and a shift."""
        scale, shift = facts.scale_and_shift()
        return Affine.diagonal(self.plain(scale), self.plain(shift), self.dims)

    def layer(self, module: nn.Module) -> Affine:
        """A convolution or linear map."""
        layer, facts = cast("WeightedModule", module), spec_of_module(module)
        assert facts is not None
        if facts.padding_mode != "zeros" and any(map(any, facts.padding)):
            raise NotExact(f"it pads by {facts.padding_mode}", padding=True)
        bias = None if layer.bias is None else self.plain(layer.bias)
        return Affine(replace(facts, padding_mode="zeros"), self.plain(layer.weight), bias)

    def _code(self, module: nn.Module, x: Affine) -> Affine:
        graph_module = code_graph(module)
        inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        output = next(n for n in graph_module.graph.nodes if n.op == "output").args[0]
        if len(inputs) != 1 or not isinstance(output, fx.Node):
            raise NotTraceable(f"{type(module).__name__} takes or returns more than one tensor")
        return evaluate(output, {inputs[0]: x}, self.in_code(graph_module))


POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def pool_spec(module: nn.Module) -> ConvSpec:
    """The window of an average pool as that of a convolution of one channel; `NotExact` where it is none."""
    dims = POOLS.index(type(module)) + 1
    kernel, stride, padding = (spread(getattr(module, name), dims) for name in ("kernel_size", "stride", "padding"))
    odd = getattr(module, "ceil_mode", False) or getattr(module, "divisor_override", None) is not None
    if odd or (any(padding) and not getattr(module, "count_include_pad", True)):
        raise NotExact("an average pool that does not count what it pads, or counts otherwise", padding=True)
    sides = tuple((p, p) for p in padding)
    return ConvSpec(1, 1, kernel, stride, sides, (1,) * dims, 1, False, output_padding=(0,) * dims)
