"""`FoldBatchNorm`: a batch norm goes into the convolution or linear map beside it. Exact in evaluation.

With fixed statistics a batch norm is ``γ (y - μ) / √(σ² + ε) + β``, one scale and one shift per channel, and so part of
any linear layer before it: ``W'_o = s_o W_o``, ``b'_o = s_o (b_o - μ_o) + β_o`` with ``s = γ / √(σ² + ε)``. Behind it
(BN → conv) the scale goes to the input channels, and the shift, carried through the kernel, to the bias: ``b' = b +
Σ W_{oik} t_i``. That holds only where the convolution pads with values that the norm has seen (no padding, or reflect,
replicate, circular), since a zero behind the norm is not a zero before it.

A norm is known by what it is: torch's modules, subclasses that run ``F.batch_norm`` and then their own children (timm's
``BatchNormAct2d``), and frozen ones that hold statistics as buffers (torchvision's ``FrozenBatchNorm2d``), which are
tried out before they are trusted. ``F.batch_norm`` in the code of any other module folds too, where nothing else reads
its statistics; that module then becomes a graph without the call. A norm that is called several times, as in the
encoder of a Siamese network, folds where each of its calls is behind a call of the same layer. A norm of a
convolution's own weight, worked out anew in each call, goes into that weight (`pwrewrite.passes.own_weights`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..capturing.eligibility import module_refusal
from ..capturing.records import Capture, Layer, info
from ..core.convolution import CONV_MODULES
from ..core.numbers import plural
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..core.records import Json
from ..edit.actions.code_norm import TENSORS
from ..forms.specs import spec_to_dict
from ..layers.known import hooked
from .base import Pass, Proposal, spec_of
from .own_weights import own_weights
from .patterns import Graph, tensor_of

_ARITHMETIC = {
    *("add", "sub", "rsub", "mul", "div", "neg", "rsqrt", "sqrt", "reciprocal", "pow", "exp", "addcmul", "batch_norm"),
    *("getitem", "view", "reshape", "unsqueeze", "expand", "flatten", "view_as", "expand_as", "contiguous", "clone"),
    *("to", "type", "type_as", "float", "detach", "iadd", "imul", "isub"),
}
"""Operations of which a frozen norm's code may consist."""

_LAYERS = (*CONV_MODULES, nn.Linear)


class FoldBatchNorm(Pass):
    """Folds batch norms into the layer before them, or the one behind where the padding allows it."""

    name = "fold-batch-norm"
    summary = "conv → batch norm and linear → batch norm become one layer; batch norm → conv where padding allows"
    exact = "eval"

    def propose(self, capture: Capture) -> list[Proposal]:
        graph, taken = Graph(capture), set[str]()
        proposals: list[Proposal] = []
        norms = list(_norms(graph))
        for norm in norms:
            if isinstance(norm, Skip):
                proposals.append(norm)
                continue
            calls = [n for n in norms if isinstance(n, _Norm) and n.path == norm.path and graph.calls[n.path] > 1]
            if norm is (calls or [norm])[0]:
                proposals.append(_fold(graph, calls or [norm], taken))
                taken |= {p.settings["layer"] for p in proposals[-1:] if isinstance(p, Op)}
        own = list(own_weights(graph, self.name))
        first = {each.path for each in own if isinstance(each, Op)}  # plain before a norm goes into them
        later = [p for p in proposals if not (isinstance(p, Op) and p.settings["layer"] in first)]
        return [*later, *own]


@dataclass(frozen=True)
class _Norm:
    path: str  # that of its mean where it is a function call
    source: object  # what it reads
    last: fx.Node  # what makes its output
    tensors: Sequence[object]  # its running mean and variance, and what else it computes with
    keep: tuple[str, ...] = ()  # names of its children that run behind the norm
    code: dict[str, Json] = field(default_factory=dict)  # further settings: of a function call, or ``affine``

    @property
    def channels(self) -> int:
        """How many channels it normalises; 0 where it has no running statistics."""
        mean, var, *_ = self.tensors
        return mean.numel() if isinstance(mean, Tensor) and isinstance(var, Tensor) else 0


def _norms(graph: Graph) -> Iterator[_Norm | Skip]:
    written_out: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        op, path, module = info(node).op, info(node).path, graph.modules.get(info(node).path)
        if node.op == "call_module" and op == "batch_norm":
            yield _of_module(str(node.target), graph.modules[str(node.target)], node, node)
        elif node.op in ("call_function", "call_method") and _is_affine(module):
            written_out.setdefault(path, []).append(node)
        elif node.op == "call_function" and op == "batch_norm" and isinstance(module, _BatchNorm):
            yield _subclass(graph, path, module, node)
        elif node.op == "call_function" and op == "batch_norm" and not isinstance(module, _LAYERS):
            yield _in_code(graph, node)
    for path, nodes in written_out.items():
        if all(info(node).op in _ARITHMETIC for node in nodes):
            yield _written_out(graph, path, nodes)


def _of_module(path: str, module: nn.Module, node: fx.Node, last: fx.Node, keep: Sequence[str] = ()) -> _Norm:
    tensors = [getattr(module, name, None) for name in TENSORS]
    return _Norm(path, node.args[0] if node.args else None, last, tensors, tuple(keep))


def _subclass(graph: Graph, path: str, module: nn.Module, node: fx.Node) -> _Norm | Skip:
    """A norm module with a forward of its own."""
    if any(argument is True for argument in (node.kwargs.get("training"), *node.args[5:6])):
        return Skip(path, SkipReason.NO_STATISTICS, "it normalises with the statistics of each batch")
    if len(graph.code[path]) != 1:
        detail = "its code runs other operations beside the norm, or it is called twice"
        return Skip(path, SkipReason.NOT_TRACED, detail)
    keep: list[str] = []
    last = node
    while (reader := graph.sole_reader(last)) is not None:
        child = str(reader.target) if reader.op == "call_module" else info(reader).path
        inside = child.startswith(f"{path}.") and "." not in child[len(path) + 1 :]
        if not inside or graph.calls_of(child) != 1 or (reader.op != "call_module" and not graph.wraps(child)):
            break
        keep.append(child[len(path) + 1 :])
        last = reader
    ours = [n for n in graph.nodes if n.op != "get_attr" and info(n).path.startswith(f"{path}.")]
    if len(ours) != len(keep):
        return Skip(path, SkipReason.NOT_TRACED, "its code does more than run its children behind the norm")
    return _of_module(path, module, node, last, keep)


def _in_code(graph: Graph, node: fx.Node) -> _Norm | Skip:
    """A call of ``F.batch_norm`` in the code of a module that is no norm."""
    where = graph.where(node)
    if node.target is not F.batch_norm:
        return Skip(where, SkipReason.FUNCTIONAL, "a batch norm by another function than F.batch_norm; use that")
    given = dict(zip(("input", *TENSORS, "training", "momentum", "eps"), node.args)) | node.kwargs
    if given.get("training", False) is not False or given.get("running_mean") is None:
        return Skip(where, SkipReason.NO_STATISTICS, "it normalises with the statistics of each batch")
    names: dict[str, str | None] = {}
    tensors: list[Tensor | None] = []
    for key in TENSORS:
        read = given.get(key)
        name = names[key] = str(read.target) if isinstance(read, fx.Node) and read.op == "get_attr" else None
        tensors.append(held := None if name is None else tensor_of(graph.owners, name))
        if read is not None and held is None:
            return Skip(where, SkipReason.FUNCTIONAL, f"its {key} is computed by the code; keep it as a buffer")
        if name is None:
            continue
        path, _, attribute = name.rpartition(".")
        several = len(graph.readers(path, attribute)) > 1 or len(graph.owners.holders.get(id(held), ())) > 1
        if several or graph.calls[path]:
            return Skip(where, SkipReason.SHARED_WEIGHT, f"its {key}, {name}, is also used elsewhere")
    code = {"tensors": names, "eps": given.get("eps", 1e-5), "scope": info(node).path}
    return _Norm(str(names["running_mean"]), given.get("input"), node, tensors, code=code)


def _is_affine(module: nn.Module | None) -> bool:
    """Whether a module may be a scale and a shift per channel: it holds one number per channel, once or more."""
    if module is None or isinstance(module, (_BatchNorm, *_LAYERS)) or list(module.children()):
        return False
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return bool(tensors) and all(t.numel() == tensors[0].numel() == max(t.shape, default=0) for t in tensors)


def _written_out(graph: Graph, path: str, nodes: list[fx.Node]) -> _Norm | Skip:
    """A norm whose code computes scale and shift from its tensors."""
    sources = {a for n in nodes for a in n.all_input_nodes if a not in nodes and a.op != "get_attr"}
    outs = [n for n in nodes if any(user not in nodes for user in n.users)]
    if len(sources) != 1 or len(outs) != 1:
        return Skip(path, SkipReason.CALLED_TWICE, "a norm that is called more than once")
    module = graph.modules[path]
    first = next(t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return _Norm(path, sources.pop(), outs[0], (first, first, *module.parameters()), code={"affine": True})


def _fold(graph: Graph, calls: Sequence[_Norm], taken: set[str]) -> Proposal:
    norm, path = calls[0], calls[0].path
    if path in graph.modules and hooked(graph.modules[path]):
        return Skip(path, SkipReason.HOOKS, "has a hook, which would no longer see the norm's output; remove it")
    if not norm.channels:
        detail = "no running statistics, so it normalises each batch by itself"
        return Skip(path, SkipReason.NO_STATISTICS, detail)
    if len(calls) > 1:
        return _fold_repeated(graph, calls)
    before = _before(graph, norm)
    if isinstance(before, Layer) and before.path not in taken:
        return _op(norm, before, "behind")
    after = _behind(graph, norm)
    if isinstance(after, Layer) and after.path not in taken:
        return _op(norm, after, "before")
    if isinstance(after, Skip) and (isinstance(before, Layer) or before.reason is SkipReason.NOT_BEHIND_LAYER):
        return after if after.reason is not SkipReason.NOT_BEHIND_LAYER or isinstance(before, Layer) else before
    return before if isinstance(before, Skip) else _far(path, "a layer that another norm was folded into")


def _fold_repeated(graph: Graph, calls: Sequence[_Norm]) -> Proposal:
    """The op for a norm that is called several times: always behind the same layer, which is called as often."""
    layers = [_before(graph, norm, len(calls)) for norm in calls]
    skip = next((each for each in layers if isinstance(each, Skip)), None)
    if skip is not None and skip.reason is not SkipReason.NOT_BEHIND_LAYER:
        return skip
    first = layers[0]
    if isinstance(first, Skip) or any(layer is not first for layer in layers):
        detail = f"called {len(calls)} times, not each time behind the same layer; folding would need copies of it"
        return Skip(calls[0].path, SkipReason.CALLED_TWICE, detail)
    return _op(calls[0], first, "behind")


def _far(path: str, what: str) -> Skip:
    return Skip(path, SkipReason.NOT_BEHIND_LAYER, f"reads {what}, into which nothing can be folded")


def _before(graph: Graph, norm: _Norm, calls: int = 1) -> Layer | Skip:
    """The layer whose only reader is the norm, in the one of its ``calls`` that the norm reads."""
    source = graph.back(norm.source)
    if not isinstance(source, fx.Node) or not isinstance(norm.source, fx.Node):
        return _far(norm.path, "no single tensor")
    layer = graph.layers.get(source.name)
    if layer is None:
        return _far(norm.path, f"the output of {info(source).op}")
    if len(source.users) != 1 or len(norm.source.users) != 1:
        return Skip(norm.path, SkipReason.SEVERAL_READERS, f"the output of {layer.path} is read elsewhere, too")
    axes = len(info(source).outputs[0].shape)
    if layer.spec is None and axes != 2:
        return _far(norm.path, "a linear map over an axis that it does not normalise")
    if layer.out_channels != norm.channels or (layer.spec is not None and axes < layer.spec.dims + 2):
        return _far(norm.path, "an unbatched convolution")
    if refusal := _unusable(graph, norm, layer, calls):
        return refusal
    why = graph.unfixed(source, next(iter(norm.source.users)))
    return Skip(norm.path, SkipReason.DATA_DEPENDENT, why) if why else layer


def _behind(graph: Graph, norm: _Norm) -> Layer | Skip:
    """The layer that is the norm's only reader and pads with nothing that the norm has not seen."""
    last = graph.onward(norm.last)
    reader = graph.sole_reader(last)
    layer = graph.layers.get(reader.name) if reader is not None else None
    alone = all(type(graph.modules[f"{norm.path}.{name}"]) is nn.Identity for name in norm.keep)
    if not alone or layer is None or reader is None or not reader.args or reader.args[0] is not last:
        return _far(norm.path, "nothing linear")
    spec, axes = layer.spec, len(info(reader).inputs[0].shape)
    if layer.in_channels != norm.channels or (axes != 2 if spec is None else axes < spec.dims + 2):
        return _far(norm.path, "nothing linear")
    zeros = spec is not None and spec.padding_mode == "zeros" and any(map(any, spec.padding))
    if spec is not None and (spec.transposed or zeros or layer.functional):
        detail = f"{layer.path} pads with zeros, which the norm's shift would not reach"
        return Skip(norm.path, SkipReason.PADDING, detail)
    if not isinstance(norm.source, fx.Node) or graph.written(norm.source, norm.last, reader):
        return Skip(norm.path, SkipReason.WRITTEN, f"what it reads is written into before {layer.path} runs")
    if why := graph.unfixed(norm.last, reader):
        return Skip(norm.path, SkipReason.DATA_DEPENDENT, why)
    return _unusable(graph, norm, layer) or layer


def _unusable(graph: Graph, norm: _Norm, layer: Layer, calls: int = 1) -> Skip | None:
    """Why a layer's weights may not be changed; None where they may."""
    module, path = graph.modules.get(layer.path), norm.path
    if len(layer.calls) != calls:
        detail = f"{layer.path} is called {plural(len(layer.calls), 'time')}, and this norm {plural(calls, 'time')}"
        return Skip(path, SkipReason.CALLED_TWICE, detail)
    if module is None or not isinstance(module, _LAYERS):
        return Skip(path, SkipReason.FUNCTIONAL, f"{layer.path} is a functional call; make it a module")
    refusal = module_refusal(layer.path, module, graph.owners.holders)
    if refusal is not None and refusal.reason is not SkipReason.OVERRIDDEN_FORWARD:
        return Skip(path, refusal.reason, f"{layer.path} {refusal.detail}")
    called = {call.node for call in layer.calls}
    own = not layer.functional or any(info(graph.named[name]).path == layer.path for name in called)
    if not own or any(user.name not in called for user in graph.readers(layer.path, "weight", "bias")):
        return Skip(path, SkipReason.WEIGHT_READ, f"the weight of {layer.path} is read by other code")
    weight = module._parameters.get("weight")
    plain = weight is not None and type(weight) in (nn.Parameter, Tensor) and not weight.is_quantized
    if weight is None or not plain or not weight.is_floating_point() or graph.shares(module, recurse=False):
        return Skip(path, SkipReason.SHARED_WEIGHT, f"the weight of {layer.path} is shared or no plain parameter")
    return None


def _op(norm: _Norm, layer: Layer, side: str) -> Op:
    params = layer.params + sum(p.numel() for p in norm.tensors[2:] if isinstance(p, nn.Parameter))
    after = layer.params + (0 if spec_of(layer).bias else layer.out_channels)
    settings: dict[str, Json] = {
        "layer": layer.path,
        "side": side,
        "channels": norm.channels,
        "spec": spec_to_dict(spec_of(layer)),
        **({"keep": list(norm.keep)} if norm.keep else {}),
        **norm.code,
    }
    return Op("fold", norm.path, FoldBatchNorm.name, settings, Estimate(params, after, layer.macs, layer.macs))
