"""What is fitted in a rewritten model, and in which order: from a capture and a plan to the steps of `refit`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import cast

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


def fit_steps(
    captured: Capture,
    rewritten: nn.Module,
    plan: Plan,
    specs: Mapping[str, ConvSpec],
    statistics: Statistics | None,
    *,
    factors: bool = True,
) -> list[Target | str]:
    """The layers to fit, which a plan replaced and which are called once, and the norms behind the first of them.

    Args:
        captured: The original.
        rewritten: The model with the plan carried out.
        plan: The plan.
        specs: Shape facts of the layers that may be fitted.
        statistics: Where the gradients are; None for none.
        factors: Whether the factors are fitted, or the biases and norms only.

    Returns:
        Layers and paths of norms in the order in which they run; empty where there is no layer to fit.
    """
    once = {layer.path for layer in captured.layers if len(layer.calls) == 1}
    planned = [op.path for op in plan.ops if op.action == "factorize" and op.path in specs and op.path in once]
    paths = [path for path in planned if isinstance(_module(rewritten, path), Factorized)]
    sums, targets = residuals(captured, paths), dict[str, Target]()
    for path in paths:
        weight = cast(Tensor, captured.model.get_submodule(path).weight).detach()
        gradients = None if statistics is None else statistics.layers[path].gradient_moment()
        targets[path] = Target(path, specs[path], weight, gradients, sums.get(path), factors)
    order: list[str] = []
    for node in captured.graph.nodes:
        facts = info(node)
        path = str(node.target) if node.op == "call_module" else facts.path
        if (node.op == "call_module" and path in targets) or facts.op == "batch_norm":
            order.append(path)
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


def shift_biases(
    original: nn.Module,
    rewritten: nn.Module,
    paths: Iterable[str],
    specs: Mapping[str, ConvSpec],
    statistics: Statistics | None,
) -> None:
    """Makes up for what a change of the weights does to the mean of the outputs: ``b += (W − Ŵ) E[x]``, in place.

    For layers that are called several times. A forward that stands still at one call cannot be fitted to all of them,
    but the mean over all of them is known. Those without a bias, and transposed ones, stay.
    """
    for path in paths:
        sums = statistics.layers.get(path) if statistics is not None else None
        spec, module = specs[path], _module(rewritten, path)
        if sums is None or not sums.weight or spec.transposed or not isinstance(module, Factorized):
            continue
        if module.bias is None:
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
