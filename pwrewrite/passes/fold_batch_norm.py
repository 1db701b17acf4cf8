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
convolution's own weight, worked out anew in each call, goes into that weight.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..capturing.eligibility import module_refusal
from ..capturing.records import Capture, Layer, info
from ..core.convolution import CONV_MODULES
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..edit.actions.code_norm import TENSORS
from ..forms.specs import spec_to_dict
from ..layers.known import hooked
from .base import Pass, Proposal, spec_of
from .patterns import Graph, plain_weight, tensor
from .weight_norms import weight_norms

_ARGUMENTS = ("input", *TENSORS, "training", "momentum", "eps")
"""Of ``F.batch_norm``, in order."""

_ARITHMETIC = {
    *("add", "sub", "rsub", "mul", "div", "neg", "rsqrt", "sqrt", "reciprocal", "pow", "exp", "addcmul", "batch_norm"),
    *("getitem", "view", "reshape", "unsqueeze", "expand", "flatten", "view_as", "expand_as", "contiguous", "clone"),
    *("to", "type", "type_as", "float", "detach", "iadd", "imul", "isub"),
}
"""Operations of which a frozen norm's code may consist."""


class FoldBatchNorm(Pass):
    """Folds batch norms into the layer before them, or the one behind where the padding allows it."""

    name = "fold-batch-norm"
    summary = "conv → batch norm and linear → batch norm become one layer; batch norm → conv where padding allows"
    exact = "eval"

    def propose(self, capture: Capture) -> list[Proposal]:
        """See `Pass.propose`."""
        graph = Graph(capture)
        taken: set[str] = set()
        proposals: list[Proposal] = []
        norms = _norms(graph)
        for norm in norms:
            if not isinstance(norm, Skip) and graph.calls[norm.path] > 1:
                calls = [other for other in norms if isinstance(other, _Norm) and other.path == norm.path]
                if norm is not calls[0]:
                    continue
                found = _fold_repeated(graph, calls)
            else:
                found = norm if isinstance(norm, Skip) else _fold(graph, norm, taken)
            if isinstance(found, Op):
                taken.add(found.settings["layer"])
            proposals.append(found)
        return [*proposals, *weight_norms(graph, self.name)]


class _Norm:
    """One call of a norm.

    Attributes:
        path: Its path; that of its mean where it is a function call.
        source: What it reads.
        last: The node that makes its output, up to the norm itself.
        keep: Names of its children that run behind the norm.
        code: Settings of a function call: ``tensors``, ``eps`` and ``scope``; of a norm written out: ``affine``.
    """

    def __init__(
        self, path: str, source: Any, last: fx.Node, keep: tuple[str, ...] = (), code: dict[str, Any] | None = None
    ) -> None:
        self.path, self.source, self.last, self.keep, self.code = path, source, last, keep, code or {}

    def tensors(self, graph: Graph) -> Any:
        """What has its statistics, and scale and shift where it has them, as attributes."""
        if self.code.get("affine"):
            module = graph.modules[self.path]
            first = next(t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
            return SimpleNamespace(running_mean=first, running_var=first)
        if not self.code:
            return graph.modules[self.path]
        names = self.code["tensors"].items()
        return SimpleNamespace(**{key: None if name is None else tensor(graph, name) for key, name in names})


def _norms(graph: Graph) -> list[_Norm | Skip]:
    """Every batch norm of the graph."""
    found: list[_Norm | Skip] = []
    written_out: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and info(node).op == "batch_norm":
            found.append(_Norm(str(node.target), node.args[0] if node.args else None, node))
        elif node.op in ("call_function", "call_method") and _is_affine(graph.modules.get(info(node).path)):
            written_out.setdefault(info(node).path, []).append(node)
        elif node.op == "call_function" and info(node).op == "batch_norm":
            if _is_layer(graph.modules.get(info(node).path)):
                continue  # a layer that normalises its weight, not an activation
            found.append(_functional(graph, node))
    affine = (_written_out(graph, path, nodes) for path, nodes in written_out.items())
    return [*found, *(norm for norm in affine if norm is not None)]


def _functional(graph: Graph, node: fx.Node) -> _Norm | Skip:
    """A norm module with a forward of its own, or a call in other code."""
    path = info(node).path
    module = graph.modules.get(path)
    if not isinstance(module, _BatchNorm):
        return _in_code(graph, node)
    if any(argument is True for argument in (node.kwargs.get("training"), *node.args[5:6])):
        return Skip(path, SkipReason.NO_STATISTICS, "it normalises with the statistics of each batch")
    if graph.inside[path] != 1:
        return Skip(
            path, SkipReason.NOT_TRACED, "its code runs other operations beside the norm, or it is called twice"
        )
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
    return _Norm(path, node.args[0], node, tuple(keep))


def _in_code(graph: Graph, node: fx.Node) -> _Norm | Skip:
    """A call of ``F.batch_norm`` in the code of a module that is no norm."""
    where = graph.where(node)
    if node.target is not F.batch_norm:
        return Skip(where, SkipReason.FUNCTIONAL, "a batch norm by another function than F.batch_norm; use that")
    given = dict(zip(_ARGUMENTS, node.args)) | node.kwargs
    if given.get("training", False) is not False or given.get("running_mean") is None:
        return Skip(where, SkipReason.NO_STATISTICS, "it normalises with the statistics of each batch")
    names: dict[str, str | None] = {}
    for key in TENSORS:
        read = given.get(key)
        name = str(read.target) if isinstance(read, fx.Node) and read.op == "get_attr" else None
        held = None if name is None else tensor(graph, name)
        if read is not None and held is None:
            return Skip(where, SkipReason.FUNCTIONAL, f"its {key} is computed by the code; keep it as a buffer")
        names[key] = name
        if held is None or name is None:
            continue
        users = [user for n in graph.owners.reads[name] for user in n.users]
        if len(users) > 1 or graph.calls[name.rpartition(".")[0]] or len(graph.owners.holders.get(id(held), ())) > 1:
            return Skip(where, SkipReason.SHARED_WEIGHT, f"its {key}, {name}, is also used elsewhere")
    eps = given.get("eps", 1e-5)
    code = {"tensors": names, "eps": eps, "scope": info(node).path}
    return _Norm(str(names["running_mean"]), given.get("input"), node, code=code)


def _is_affine(module: nn.Module | None) -> bool:
    """Whether a module may be a scale and a shift per channel: it holds one number per channel, once or more."""
    if module is None or isinstance(module, _BatchNorm) or _is_layer(module) or any(True for _ in module.children()):
        return False
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return bool(tensors) and all(t.numel() == tensors[0].numel() == max(t.shape, default=0) for t in tensors)


def _written_out(graph: Graph, path: str, nodes: list[fx.Node]) -> _Norm | Skip | None:
    """A norm whose code computes scale and shift from its tensors; None for something else."""
    own = set(nodes)
    if any(info(n).op not in _ARITHMETIC for n in nodes):
        return None
    reads = [n for n in nodes for a in n.all_input_nodes if a not in own and a.op != "get_attr"]
    outs = [n for n in nodes if any(user not in own for user in n.users)]
    sources = {a for n in reads for a in n.all_input_nodes if a not in own and a.op != "get_attr"}
    if len(sources) != 1 or len(outs) != 1:
        return Skip(path, SkipReason.CALLED_TWICE, "a norm that is called more than once")
    return _Norm(path, sources.pop(), outs[0], code={"affine": True})


def _fold(graph: Graph, norm: _Norm, taken: set[str]) -> Proposal:
    """The op for one norm, or why there is none."""
    mean = _mean(graph, norm)
    if isinstance(mean, Skip):
        return mean
    path = norm.path
    before = _before(graph, norm, mean.numel())
    if isinstance(before, Layer) and before.path not in taken:
        return _op(graph, norm, before, "behind")
    after = _behind(graph, norm, mean.numel())
    if isinstance(after, Layer) and after.path not in taken:
        return _op(graph, norm, after, "before")
    if isinstance(after, Skip) and (isinstance(before, Layer) or before.reason is SkipReason.NOT_BEHIND_LAYER):
        return after if after.reason is not SkipReason.NOT_BEHIND_LAYER or isinstance(before, Layer) else before
    return before if isinstance(before, Skip) else _far(path, "a layer that another norm was folded into")


def _fold_repeated(graph: Graph, calls: list[_Norm]) -> Proposal:
    """The op for a norm that is called several times: always behind the same layer, which is called as often."""
    path = calls[0].path
    mean = _mean(graph, calls[0])
    if isinstance(mean, Skip):
        return mean
    copies = f"called {graph.calls[path]} times, not each time behind the same layer; folding would need copies of it"
    if len(calls) != graph.calls[path]:
        return Skip(path, SkipReason.CALLED_TWICE, copies)
    found: list[Layer] = []
    for norm in calls:
        before = _before(graph, norm, mean.numel(), calls=len(calls))
        if isinstance(before, Skip):
            elsewhere = before.reason is SkipReason.NOT_BEHIND_LAYER
            return Skip(path, SkipReason.CALLED_TWICE, copies) if elsewhere else before
        found.append(before)
    if any(layer is not found[0] for layer in found):
        return Skip(path, SkipReason.CALLED_TWICE, copies)
    return _op(graph, calls[0], found[0], "behind")


def _mean(graph: Graph, norm: _Norm) -> Tensor | Skip:
    """A norm's running mean, or why it cannot be folded into anything."""
    path, module = norm.path, norm.tensors(graph)
    if hooked(graph.modules[path] if norm.code.get("affine") else module):
        return Skip(path, SkipReason.HOOKS, "has a hook, which would no longer see the norm's output; remove it")
    mean = getattr(module, "running_mean", None)
    if not isinstance(mean, Tensor) or not isinstance(getattr(module, "running_var", None), Tensor):
        detail = "no running statistics, so it normalises each batch by itself"
        return Skip(path, SkipReason.NO_STATISTICS, detail)
    return mean


def _far(path: str, what: str) -> Skip:
    return Skip(path, SkipReason.NOT_BEHIND_LAYER, f"reads {what}, into which nothing can be folded")


def _before(graph: Graph, norm: _Norm, channels: int, calls: int = 1) -> Layer | Skip:
    """The layer whose only reader is the norm, in the one of its ``calls`` that the norm reads."""
    source = graph.back(norm.source)
    if not isinstance(source, fx.Node):
        return _far(norm.path, "no single tensor")
    layer = graph.layers.get(source.name)
    if layer is None:
        return _far(norm.path, f"the output of {info(source).op}")
    if isinstance(norm.source, fx.Node) and (len(source.users) != 1 or len(norm.source.users) != 1):
        return Skip(norm.path, SkipReason.SEVERAL_READERS, f"the output of {layer.path} is read elsewhere, too")
    facts = info(source)
    if layer.spec is None and len(facts.outputs[0].shape) != 2:
        return _far(norm.path, "a linear map over an axis that it does not normalise")
    if layer.out_channels != channels or (layer.spec is not None and len(facts.outputs[0].shape) < layer.spec.dims + 2):
        return _far(norm.path, "an unbatched convolution")
    refusal = _usable(graph, norm, layer, calls)
    if refusal is None and isinstance(norm.source, fx.Node):
        why = graph.unfixed(source, next(iter(norm.source.users)))
        refusal = None if why is None else Skip(norm.path, SkipReason.DATA_DEPENDENT, why)
    return refusal or layer


def _behind(graph: Graph, norm: _Norm, channels: int) -> Layer | Skip:
    """The layer that is the norm's only reader and pads with nothing that the norm has not seen."""
    nothing = _far(norm.path, "nothing linear")
    if any(type(graph.modules[f"{norm.path}.{name}"]) is not nn.Identity for name in norm.keep):
        return nothing
    last = graph.onward(norm.last)
    reader = graph.sole_reader(last)
    layer = graph.layers.get(reader.name) if reader is not None else None
    if layer is None or reader is None or not reader.args or reader.args[0] is not last:
        return nothing
    spec = layer.spec
    if layer.in_channels != channels or (spec is not None and len(info(reader).inputs[0].shape) < spec.dims + 2):
        return nothing
    if spec is None:
        if len(info(reader).inputs[0].shape) != 2:
            return nothing
    elif spec.transposed or (spec.padding_mode == "zeros" and any(map(any, spec.padding))) or layer.functional:
        detail = f"{layer.path} pads with zeros, which the norm's shift would not reach"
        return Skip(norm.path, SkipReason.PADDING, detail)
    held = norm.source
    if not isinstance(held, fx.Node) or graph.written(held, norm.last, reader):
        return Skip(norm.path, SkipReason.WRITTEN, f"what it reads is written into before {layer.path} runs")
    if (why := graph.unfixed(norm.last, reader)) is not None:
        return Skip(norm.path, SkipReason.DATA_DEPENDENT, why)
    return _usable(graph, norm, layer) or layer


def _usable(graph: Graph, norm: _Norm, layer: Layer, calls: int = 1) -> Skip | None:
    """Why a layer's weights may not be changed; None where they may."""
    module: Any = graph.modules.get(layer.path)
    path = norm.path
    if len(layer.calls) != calls:
        several = "only one of them is" if calls == 1 else f"{calls} of them are"
        detail = f"{layer.path} is called {len(layer.calls)} times, and {several} normalised by this"
        return Skip(path, SkipReason.CALLED_TWICE, detail)
    if not _is_layer(module):
        return Skip(path, SkipReason.FUNCTIONAL, f"{layer.path} is a functional call; make it a module")
    refusal = module_refusal(layer.path, module, graph.owners.holders)
    if refusal is not None and refusal.reason is not SkipReason.OVERRIDDEN_FORWARD:
        return Skip(path, refusal.reason, f"{layer.path} {refusal.detail}")
    called = {call.node for call in layer.calls}
    own = not layer.functional or any(n.name in called and info(n).path == layer.path for n in graph.nodes)
    prefix = f"{layer.path}." if layer.path else ""
    reads = [u for name in ("weight", "bias") for n in graph.owners.reads.get(prefix + name, []) for u in n.users]
    if not own or any(u.name not in called for u in reads):
        return Skip(path, SkipReason.WEIGHT_READ, f"the weight of {layer.path} is read by other code")
    holders = graph.owners.holders
    if not plain_weight(module._parameters.get("weight")) or any(
        p is not None and len(holders.get(id(p), [])) > 1 for p in module._parameters.values()
    ):
        return Skip(path, SkipReason.SHARED_WEIGHT, f"the weight of {layer.path} is shared or no plain parameter")
    return None


def _is_layer(module: Any) -> bool:
    return isinstance(module, (*CONV_MODULES, nn.Linear))


def _op(graph: Graph, norm: _Norm, layer: Layer, side: str) -> Op:
    held = norm.tensors(graph)
    own = [getattr(held, name, None) for name in ("weight", "bias")]
    if norm.code.get("affine"):
        own = list(graph.modules[norm.path].parameters())
    params = layer.params + sum(p.numel() for p in own if isinstance(p, nn.Parameter))
    has_bias = spec_of(layer).bias
    after = layer.params + (0 if has_bias else layer.out_channels)
    settings: dict[str, Any] = {
        "layer": layer.path,
        "side": side,
        "channels": layer.out_channels if side == "behind" else layer.in_channels,
        "spec": spec_to_dict(spec_of(layer)),
    }
    if norm.keep:
        settings["keep"] = list(norm.keep)
    settings |= norm.code
    return Op("fold", norm.path, FoldBatchNorm.name, settings, Estimate(params, after, layer.macs, layer.macs))
