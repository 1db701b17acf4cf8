"""Which layers may be replaced by several convolutions, and why the others may not.

A replacement is right only if the layer is *nothing but* its weight and its shape facts: no forward of its own, no
weight made on the fly, no hook that would vanish, no second owner of the weight, no element type that the algebra does
not cover. Whether it would *pay* is another question (`pwrewrite.analysis.hotspots`).

Limits: references to a module held outside the module tree (in a list, a closure, a bound method) are not seen here;
the applier looks for them. A hook registered globally for all modules is not taken for a hook on the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import Parameter, is_lazy
from torch.nn.utils import parametrize

from ..core.convolution import CONV_MODULES, stock_convolution
from ..core.plan import Skip, SkipReason
from ..core.text import few
from ..layers import PointwiseActivation
from .functions import argument
from .records import Capture, Layer

_LAYERS = (*CONV_MODULES, nn.Linear)

_HOOKS = {
    name: " ".join(name[1:-1].replace("pre_", "pre-").replace("post_", "post-").rsplit("_", 1))
    for name in vars(nn.Module())
    if name.endswith("_hooks")
}
"""Attributes of a module that hold its hooks, and what they are called."""


class Owners:
    """Who holds and who reads the parameters of a captured model; made once and asked for every layer.

    Attributes:
        modules: Path to module, every alias included.
        holders: Identity of a parameter to the paths of the distinct modules that hold it, in module order.
        reads: Full name of a parameter or buffer to the graph nodes that read it directly (``get_attr``).
    """

    def __init__(self, capture: Capture) -> None:
        self.modules: dict[str, nn.Module] = dict(capture.model.named_modules(remove_duplicate=False))
        self.holders = find_holders(self.modules)
        self.reads: dict[str, list[fx.Node]] = {}
        for node in capture.graph.nodes:
            if node.op == "get_attr":
                self.reads.setdefault(str(node.target), []).append(node)


def eligible(capture: Capture, layer: Layer, owners: Owners | None = None) -> Skip | None:
    """None where a layer of a capture may be replaced, else why not; ``owners`` is made anew where left out."""
    if not layer.called:
        return _read_without_call(layer, owners or Owners(capture)) or _not_called(capture, layer)
    owners = owners or Owners(capture)
    module = owners.modules.get(layer.path)
    if isinstance(module, PointwiseActivation):
        why = "fused already; rewrite the model before fuse, or what pwrewrite.unfuse(model) makes of it"
        return Skip(layer.path, SkipReason.ALREADY_FUSED, why)
    if module is not None and (isinstance(module, _LAYERS) or not layer.functional):
        refused = module_refusal(layer.path, module, owners.holders) or _read_directly(layer, owners)
        if refused and refused.reason is SkipReason.OVERRIDDEN_FORWARD and computes_weight(layer, owners):
            remedy = "fold-batch-norm, or bake in a budget, makes it a plain one"
            why = f"{type(module).__qualname__} computes its weight in each call; {remedy}"
            return Skip(layer.path, SkipReason.PARAMETRIZED, why)
        if refused and refused.reason is SkipReason.OVERRIDDEN_FORWARD and (parts := _part(layer, module)):
            why = f"{type(module).__qualname__} uses parts of its weight ({parts}); make each a layer of its own"
            return Skip(layer.path, SkipReason.OVERRIDDEN_FORWARD, why)
        return refused or (_functional(layer, owners) if layer.functional else None)
    return _functional(layer, owners)


def module_refusal(path: str, module: nn.Module, holders: Mapping[int, list[str]]) -> Skip | None:
    """None where a module may be replaced, as far as can be seen without a capture, else why not."""
    if isinstance(module, LazyModuleMixin):
        return Skip(path, SkipReason.LAZY, "a lazy module; run the model once so that it takes its final shape")
    if parametrize.is_parametrized(module):
        names = ", ".join(sorted(getattr(module, "parametrizations", {})))
        why = f"{names} is parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it an ordinary one"
        return Skip(path, SkipReason.PARAMETRIZED, why)
    weight = module._parameters.get("weight")
    if weight is None and isinstance(getattr(module, "weight", None), Tensor):
        how = "weight_norm, spectral_norm or pruning of the older kind"
        undo = "remove_weight_norm, remove_spectral_norm or prune.remove makes it an ordinary parameter"
        why = f"its weight is computed from other tensors before each call ({how}); {undo}"
        return Skip(path, SkipReason.PARAMETRIZED, why)
    if hooks := sorted({name for attribute, name in _HOOKS.items() if getattr(module, attribute, None)}):
        why = f"has a {' and a '.join(hooks)}, which would be lost; remove it and put it back"
        return Skip(path, SkipReason.HOOKS, why)
    if not _stock(module):
        why = f"{type(module).__qualname__} has a forward of its own, which a replacement would not run"
        return Skip(path, SkipReason.OVERRIDDEN_FORWARD, why)
    refused = _weight(path, weight, type(module).__qualname__)
    return refused or _shared(path, path, weight, module._parameters.get("bias"), holders)


def computes_weight(layer: Layer, owners: Owners) -> bool:
    """Whether a 2-D convolution's own code, and no module or buffer of it, makes another tensor of its weight first."""
    module = owners.modules.get(layer.path)
    if not layer.functional or not isinstance(module, nn.Conv2d) or [*module.children(), *module.buffers()]:
        return False
    if _part(layer, module):
        return False
    users = {user.name for read in owners.reads.get(layer.weight, ()) for user in read.users}
    return bool(users) and users.isdisjoint(call.node for call in layer.calls)


def _part(layer: Layer, module: nn.Module) -> str:
    """The channels of a weight that the calls of a convolution read, where those are not all of them."""
    spec, weight = layer.spec, module._parameters.get("weight")
    if spec is None or weight is None or spec.weight_shape == tuple(weight.shape):
        return ""
    used = spec.weight_shape
    return f"{used[0]}×{used[1]} of {weight.shape[0]}×{weight.shape[1]} channels" if prod(used) < weight.numel() else ""


def find_holders(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Identity of a parameter to the paths of the distinct modules that hold it."""
    holders: dict[int, list[str]] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        if id(module) in seen:
            continue
        seen.add(id(module))
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(path)
    return holders


def _read_without_call(layer: Layer, owners: Owners) -> Skip | None:
    """Whether code takes the weight of a layer that it does not call, as attention does with its projections."""
    prefix = f"{layer.path}." if layer.path else ""
    readers = [user.name for node in owners.reads.get(f"{prefix}weight", []) for user in node.users]
    if not readers:
        return None
    why = f"it is not called: its weight is read directly, by {few(list(dict.fromkeys(readers)))}"
    return Skip(layer.path, SkipReason.WEIGHT_READ, why)


def _not_called(capture: Capture, layer: Layer) -> Skip:
    if capture.coverage.capture == "whole":
        why = "not called for these inputs in this mode; it may be used only in training"
        return Skip(layer.path, SkipReason.NOT_CALLED, why)
    why = "not in the graph: the model does not trace whole; capture the submodule that holds it"
    return Skip(layer.path, SkipReason.NOT_TRACED, why)


def _stock(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    return not isinstance(module, CONV_MODULES) or stock_convolution(module)


def _weight(path: str, weight: Tensor | None, kind: str) -> Skip | None:
    """Checks on the weight itself, for modules and functional calls alike."""
    if weight is None:
        return Skip(path, SkipReason.QUANTIZED, f"{kind} has no plain weight tensor")
    if is_lazy(weight):
        return Skip(path, SkipReason.LAZY, "its weight has no shape yet; run the model once")
    if weight.dtype.is_complex:
        return Skip(path, SkipReason.COMPLEX, f"its weight is {weight.dtype}; the decompositions are of real weights")
    if type(weight) not in (Parameter, Tensor) or weight.is_quantized or not weight.dtype.is_floating_point:
        why = f"its weight is a {type(weight).__name__} of {weight.dtype}; rewrite the model before it is quantized"
        return Skip(path, SkipReason.QUANTIZED, why)
    return None


def _shared(
    path: str, holder: str, weight: Tensor | None, bias: Tensor | None, holders: Mapping[int, list[str]]
) -> Skip | None:
    """Whether other modules hold the same weight or bias."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        held_by = holders.get(id(tensor), [])
        others = [other for other in held_by if other not in (path, holder)]
        if tensor is not None and len(held_by) > 1:
            why = f"its {name} is also that of {few(others)}, which would keep the old one"
            return Skip(path, SkipReason.SHARED_WEIGHT, why)
    return None


def _read_directly(layer: Layer, owners: Owners) -> Skip | None:
    """Whether the graph reads the weight or bias of a module other than by the layer's own calls."""
    calls = {call.node for call in layer.calls} if layer.functional else set()
    prefix = f"{layer.path}." if layer.path else ""
    for name in ("weight", "bias"):
        users = (user.name for node in owners.reads.get(f"{prefix}{name}", []) for user in node.users)
        readers = [user for user in dict.fromkeys(users) if user not in calls]
        if readers:
            why = f"its {name} is also read directly, by {few(readers)}, which would see the old one"
            return Skip(layer.path, SkipReason.WEIGHT_READ, why)
    return None


def _functional(layer: Layer, owners: Owners) -> Skip | None:
    if not layer.weight and _outside(layer, owners):
        why = "its weight is outside model.parameters(); hold its module in an nn.ModuleList, or as an attribute"
        return Skip(layer.path, SkipReason.FUNCTIONAL, why)
    if not layer.weight:
        why = "its weight is computed in the graph, so there is no parameter to decompose; store it as one"
        return Skip(layer.path, SkipReason.PARAMETRIZED, why)
    path, _, name = layer.weight.rpartition(".")
    holder = owners.modules.get(path)
    if holder is not None and parametrize.is_parametrized(holder, name):
        why = f"{layer.weight} is parametrized; remove_parametrizations makes it an ordinary parameter"
        return Skip(layer.path, SkipReason.PARAMETRIZED, why)
    weight = getattr(holder, name, None)
    if not isinstance(weight, Tensor):
        return Skip(layer.path, SkipReason.FUNCTIONAL, f"no parameter is found under {layer.weight}")
    calls = {call.node for call in layer.calls}
    reads = owners.reads.get(layer.weight, [])
    bias_name, bias_reads = _bias(reads, calls, owners)
    users = {user.name for node in (*reads, *bias_reads) for user in node.users}
    if others := sorted(users - calls):
        why = f"its weight or bias is also read by {few(others)}, which would see the old one"
        return Skip(layer.path, SkipReason.WEIGHT_READ, why)
    if len(calls) > 1:
        why = f"one weight in {len(calls)} functional calls, which may differ in stride or padding; make it one module"
        return Skip(layer.path, SkipReason.FUNCTIONAL, why)
    owner, _, attribute = bias_name.rpartition(".")
    bias = getattr(owners.modules.get(owner), attribute, None) if attribute else None
    refused = _weight(layer.path, weight, "the function")
    return refused or _shared(layer.path, path, weight, bias, owners.holders)


def _outside(layer: Layer, owners: Owners) -> bool:
    """Whether a weight is a tensor of the user's code that no module holds."""
    calls = {call.node for call in layer.calls}
    reads = [node for name, nodes in owners.reads.items() if name.startswith("_constant") for node in nodes]
    return any(user.name in calls and user.args[1:2] == (node,) for node in reads for user in node.users)


def _bias(reads: list[fx.Node], calls: set[str], owners: Owners) -> tuple[str, list[fx.Node]]:
    """Name and graph reads of the bias that goes with a functional call's weight; ``""`` where none is stored."""
    for read in reads:
        for user in read.users:
            bias = argument(user, 2, "bias")
            if user.name in calls and isinstance(bias, fx.Node) and bias.op == "get_attr":
                return str(bias.target), owners.reads.get(str(bias.target), [])
    return "", []
