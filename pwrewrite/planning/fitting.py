"""What is fitted in a rewritten model, and in which order: from a capture and a plan to the terms of `refit`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..capturing.records import Capture, info
from ..core.convolution import ConvSpec
from ..core.plan import Plan
from ..layers.factorized import Factorized
from .refit import Target
from .residuals import residuals
from .statistics import Statistics


def fit_targets(
    captured: Capture, rewritten: nn.Module, plan: Plan, specs: Mapping[str, ConvSpec], statistics: Statistics | None
) -> list[Target]:
    """The layers to fit: those that a plan replaced and that are called once.

    Args:
        captured: The original.
        rewritten: The model with the plan carried out.
        plan: The plan.
        specs: Shape facts of the layers that may be fitted.
        statistics: Where the gradients are; None for none.
    """
    calls = {layer.path: len(layer.calls) for layer in captured.layers}
    paths = []
    for op in plan.ops:
        once = calls.get(op.path) == 1 and op.path in specs and op.action == "factorize"
        if once and isinstance(_module(rewritten, op.path), Factorized):
            paths.append(op.path)
    where = residuals(captured, paths)
    found = []
    for path in paths:
        one = statistics.layers.get(path) if statistics is not None else None
        weight: Any = captured.model.get_submodule(path).weight
        gradients = one.gradient_moment() if one is not None else None
        found.append(Target(path, specs[path], weight.detach(), gradients, where.get(path)))
    return found


def shift_biases(
    original: nn.Module,
    rewritten: nn.Module,
    paths: Iterable[str],
    specs: Mapping[str, ConvSpec],
    statistics: Statistics | None,
) -> None:
    """Makes up for what a change of the weights does to the mean of the outputs: ``b += (W − Ŵ) E[x]``, in place.

    For layers that are called several times. A forward that stands still at one call cannot be fitted to all of them,
    but the mean over all of them is known.

    Args:
        original: The original.
        rewritten: The rewritten model.
        paths: The layers; those without a bias, and transposed ones, stay.
        specs: Shape facts of the layers.
        statistics: Of the original; nothing is done where None.
    """
    for path in paths:
        one = statistics.layers.get(path) if statistics is not None else None
        spec, module = specs[path], _module(rewritten, path)
        if one is None or not one.weight or spec.transposed or not isinstance(module, Factorized):
            continue
        if module.bias is None:
            continue
        mean = _mean_input(one.means / one.weight, spec).to(module.bias)
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
    found = patch.new_zeros(1, spec.in_channels, *sizes)
    found[(slice(None), slice(None), *places)] = patch
    return found


def fit_order(captured: Capture, paths: set[str]) -> tuple[list[str], list[str]]:
    """Layers to fit and the batch norms behind the first of them, as they run; and the norms alone.

    Args:
        captured: The original.
        paths: Paths of the layers.
    """
    called: dict[str, int] = {}
    order: list[str] = []
    for node in captured.graph.nodes:
        facts = info(node)
        path = str(node.target) if node.op == "call_module" else facts.path
        if (node.op == "call_module" and path in paths) or facts.op == "batch_norm":
            called[path] = called.get(path, 0) + 1
            order.append(path)
    first = next((i for i, path in enumerate(order) if path in paths), len(order))
    found, norms = [], []
    for path in order[first:]:
        if path not in paths:
            module = _module(captured.model, path)
            if called[path] > 1 or not isinstance(module, _BatchNorm) or module.running_mean is None:
                continue
            norms.append(path)
        found.append(path)
    return found, norms


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
