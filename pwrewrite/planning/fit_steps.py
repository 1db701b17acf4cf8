"""What is fitted in a rewritten model, and in which order: from a capture and a plan to the steps of `refit`.

A layer before a residual sum can put right, too, what has gone wrong on the other side of the sum so far, where that
can be read: `residuals` finds layers whose output goes through nothing but a batch norm to a sum whose other side is
also the first input of a module, or the output of one, that has run before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..capturing.records import Capture, info
from ..core.convolution import ConvSpec
from ..core.plan import Plan
from ..forms.expand import FORM as EXPAND
from ..forms.specs import spec_from_dict
from ..layers.factorized import Factorized
from .refit import Residual, Target
from .statistics import Statistics

_IDENTITIES = frozenset({"identity", "dropout"})
"""What passes its input on in eval mode."""


def fit_steps(
    captured: Capture,
    rewritten: nn.Module,
    plan: Plan,
    specs: Mapping[str, ConvSpec],
    statistics: Statistics | None,
    *,
    factors: bool = True,
) -> list[Target | str]:
    """The layers to fit, which a plan replaced, narrowed or put in and which run once, and the norms behind the first.

    Args:
        specs: Shape facts of the layers that may be fitted.
        statistics: Where the gradients are; None for none.
        factors: Whether the factors are fitted, or the biases and norms only.

    Returns:
        Layers and paths of norms in the order in which they run; empty where there is no layer to fit.
    """
    once = {layer.path for layer in captured.layers if len(layer.calls) == 1}
    less = [op for op in plan.ops if op.action in ("narrow", "share-reduction")]
    readers = {each["path"] for op in less for each in op.settings["readers"]}
    planned = {op.path for op in plan.ops if op.action == "factorize"} - readers | readers
    fitted: dict[str, tuple[ConvSpec, Tensor]] = {}
    for path in sorted(planned & once & specs.keys()):
        module, spec = _module(rewritten, path), specs[path]
        if path not in readers and isinstance(module, Factorized):
            fitted[path] = spec, cast(Tensor, captured.model.get_submodule(path).weight).detach()
        elif path in readers and isinstance(module, Factorized) and module.form is EXPAND:
            fitted[path] = module.spec, _kernel(module)
        elif path in readers and not isinstance(module, Factorized):
            weight = cast(Tensor, cast(nn.Module, module).weight).detach()
            narrower = replace(spec, in_channels=weight.shape[0 if spec.transposed else 1])
            if weight.shape == narrower.weight_shape:  # as wide on the other side as it was
                fitted[path] = narrower, weight.clone()
    whole, parts = {op.path: op for op in plan.ops if op.action == "substitute"}, dict[str, str]()
    for path, op in whole.items():
        if not op.settings["drop"]:
            parts[path] = "0" if op.settings.get("activation") else ""
            module = rewritten.get_submodule(f"{path}.0" if parts[path] else path)
            weight = cast(Tensor, module.weight).detach().clone()
            fitted[path] = spec_from_dict(op.settings["layer"], op.where("layer")), weight
    sums = residuals(captured, fitted, changed_places(captured, readers, whole))
    unseen, targets = off_mean(captured), dict[str, Target]()
    for path, (spec, weight) in fitted.items():
        gradients = None if statistics is None else statistics.layers[path].gradient_moment()
        centred = spec.bias or path in unseen
        targets[path] = Target(path, spec, weight, gradients, sums.get(path), factors, centred, parts.get(path, ""))
    order: list[str] = []
    # A module that was replaced as a whole gives what it gives behind the last of its nodes.
    ends = {path: node for node in captured.graph.nodes for path in whole.keys() & set(info(node).callers)}
    for node in captured.graph.nodes:
        facts = info(node)
        path = str(node.target) if node.op == "call_module" else facts.path
        inside = whole.keys() & set(facts.callers)
        if ((node.op == "call_module" and path in targets) or facts.op == "batch_norm") and not inside:
            order.append(path)
        order += [path for path in inside if ends[path] is node and path in targets]
    calls = Counter(order)
    steps: list[Target | str] = []
    for path in order:
        if path in targets:
            steps.append(targets[path])
        elif steps and calls[path] == 1:
            norm = _module(captured.model, path)
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
                steps.append(path)
    return steps


def _kernel(core: Factorized) -> Tensor:
    """The kernel that a core and the 1×1 behind it stand for."""
    first, second = (core.get_parameter(f"{name}.weight").detach() for name in core.stage_names)
    return torch.einsum("or,ri...->oi...", second.flatten(1), first)


def kept_channels(plan: Plan) -> dict[str, Sequence[int]]:
    """Path of a norm that was narrowed to the channels that it still has."""
    return {path: op.settings["keep"] for op in plan.ops if op.action == "narrow" for path in op.settings["norms"]}


def off_mean(capture: Capture) -> set[str]:
    """Paths of modules of whose output nothing sees a shift of the mean: all of it goes, sums included, to norms.

    These are batch norms whose running mean can follow, and instance norms. A group norm takes off the mean of a group,
    and a shift of one channel against another shows.
    """
    modules = dict(capture.model.named_modules())
    calls = Counter(info(node).path for node in capture.graph.nodes if info(node).op == "batch_norm")
    unseen: set[fx.Node] = set()
    for node in reversed(capture.graph.nodes):
        for user in node.users:
            facts = info(user)
            norm = modules.get(facts.path) if facts.op == "batch_norm" and calls[facts.path] == 1 else None
            follows = isinstance(norm, _BatchNorm) and norm.running_mean is not None
            passes = facts.op == "add" or facts.op in _IDENTITIES
            if not (follows or facts.op == "instance_norm" or (passes and user in unseen)):
                break
        else:
            unseen.add(node)
    layers = [node for node in capture.graph.nodes if node.op == "call_module"]
    return {str(node.target) for node in layers} - {str(node.target) for node in layers if node not in unseen}


def shift_biases(
    original: nn.Module,
    rewritten: nn.Module,
    paths: Iterable[str],
    specs: Mapping[str, ConvSpec],
    statistics: Statistics,
) -> None:
    """Makes up for what a change of the weights does to the mean of the outputs: ``b += (W − Ŵ) E[x]``, in place.

    For layers that are called several times: no forward stands still at all calls, but the mean over them is known.
    Those without a bias, and transposed ones, stay.
    """
    for path in paths:
        sums, spec, module = statistics.layers[path], specs[path], _module(rewritten, path)
        if not sums.weight or spec.transposed or not isinstance(module, Factorized) or module.bias is None:
            continue
        mean = _mean_input(sums.means / sums.weight, spec).to(module.bias)
        at = (0, slice(None), *(-(-left // step) for (left, _), step in zip(spec.padding, spec.stride)))
        with torch.no_grad():
            module.bias.add_((original.get_submodule(path)(mean) - module(mean))[at])


def _mean_input(mean: Tensor, spec: ConvSpec) -> Tensor:
    """The smallest input in which one position of the output sees a mean patch ``(groups, d)``, and no padding."""
    patch = mean.reshape(1, spec.in_channels, *spec.kernel_size)
    sizes, places = [], list[slice]()
    for k, step, dilation, (left, _) in zip(spec.kernel_size, spec.stride, spec.dilation, spec.padding):
        start = -(-left // step) * step - left
        sizes.append(start + dilation * (k - 1) + 1)
        places.append(slice(start, None, dilation))
    x = patch.new_zeros(1, spec.in_channels, *sizes)
    x[(slice(None), slice(None), *places)] = patch
    return x


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def changed_places(capture: Capture, readers: Iterable[str], whole: Collection[str]) -> set[tuple[str, str]]:
    """Inputs of layers that read fewer channels now, and what is inside of modules that were replaced as a whole."""
    calls = [node for node in capture.graph.nodes if node.op == "call_module"]
    gone = {str(node.target) for node in calls if any(caller in whole for caller in info(node).callers)}
    return {(path, "input") for path in readers} | {(path, side) for path in gone for side in ("input", "output")}


def residuals(
    capture: Capture, paths: Collection[str], changed: Collection[tuple[str, str]] = ()
) -> dict[str, Residual]:
    """Path to the residual sum that a layer writes into, of those layers that do; they are modules called once.

    ``changed``: places that have another tensor in the rewritten model, or are not there.
    """
    place = {node: i for i, node in enumerate(capture.graph.nodes)}
    calls = Counter(info(node).path for node in place if node.op == "call_module" or _is_norm(node))
    same: dict[fx.Node, list[fx.Node]] = {}
    for node in place:
        same.setdefault(_source(node), []).append(node)
    sums = {}
    for node in place:
        path = str(node.target)
        if node.op != "call_module" or path not in paths or calls[path] != 1:
            continue
        norm, end = _through_norm(node, calls)
        add = _only_user(end)
        if add is None or info(add).op != "add" or add.kwargs or len(add.args) != 2:
            continue
        others = [arg for arg in add.args if arg is not end]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            continue
        own, there = info(end).outputs, info(others[0]).outputs
        if not own or not there or own[0] != there[0]:
            continue
        anchor = _anchor(same[_source(others[0])], place, place[node], calls, changed)
        if anchor is not None:
            sums[path] = Residual(norm, anchor)
    return sums


def _is_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and info(node).op == "batch_norm"


def _source(node: fx.Node) -> fx.Node:
    """The node whose value an identity passes on."""
    while node.op == "call_module" and info(node).op in _IDENTITIES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _through_norm(node: fx.Node, calls: Counter[str]) -> tuple[str, fx.Node]:
    """Past what reads a layer's output alone: identities and one batch norm."""
    norm = ""
    while (user := _only_user(node)) is not None and user.args and user.args[0] is node:
        facts = info(user)
        if facts.op == "batch_norm" and not norm and calls[facts.path] == 1:
            norm = facts.path
        elif facts.op not in _IDENTITIES:
            break
        node = user
    return norm, node


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _anchor(
    nodes: list[fx.Node],
    place: dict[fx.Node, int],
    before: int,
    calls: Counter[str],
    changed: Collection[tuple[str, str]],
) -> tuple[str, str] | None:
    """A module at which a tensor, under any of its nodes, can be read before a moment."""
    for node in nodes:
        for each in (node, *node.users):
            if each.op != "call_module" or calls[str(each.target)] != 1:
                continue
            where = str(each.target), "output" if each is node else "input"
            passed = place[each] < before if each is node else each.args[:1] == (node,) and place[each] <= before
            if passed and where not in changed:
                return where
    return None
