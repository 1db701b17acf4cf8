"""`unfuse`: fused layers become plain layers and activations again, for tools that look for those.

Quantizers, exporters and other packages' passes know ``nn.Conv2d``, ``nn.Linear`` and ``nn.ReLU``, not
`pwrewrite.layers.PointwiseActivation`. Folded batch norms stay folded.
"""

from __future__ import annotations

from torch import fx, nn

from ..core.copies import deep_copy
from ..layers import PointwiseActivation
from ..layers.unfused import Unfused
from .swap import replace_module


def unfuse(model: nn.Module) -> nn.Module:
    """A copy of a model in which every fused layer is a plain layer and its activation again.

    Args:
        model: A model that `pwrewrite.fuse` made; stays as it is.

    Returns:
        The copy. In the place of a fused layer it has an ``nn.Conv2d`` (or whatever the layer was) where nothing was
        fused with it, an ``nn.Sequential`` of layer and activation, or a module that also adds a residual. It computes
        the same up to rounding.

    >>> import torch, pwrewrite
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU()).eval()
    >>> fused = pwrewrite.fuse(model, torch.randn(1, 3, 8, 8)).model
    >>> [type(module).__name__ for module in pwrewrite.unfuse(fused)[0]]
    ['Conv2d', 'ReLU']
    """
    result = deep_copy(model)
    summed = adds_residuals(result)
    for fused in [module for module in result.modules() if isinstance(module, PointwiseActivation)]:
        result = replace_module(result, fused, plain_modules(fused, id(fused) in summed))
    return result


def adds_residuals(model: nn.Module) -> set[int]:
    """The modules of a model that code calls with more than one argument, by ``id``."""
    return {
        id(code.get_submodule(str(node.target)))
        for code in model.modules()
        if isinstance(code, fx.GraphModule)
        for node in code.graph.nodes
        if node.op == "call_module" and len(node.args) + len(node.kwargs) > 1
    }


def plain_modules(fused: PointwiseActivation, residual: bool) -> nn.Module:
    """The plain layer and activation of a fused layer, in its mode; ``residual`` where it also adds one."""
    layer, act = fused.unfused()
    plain: nn.Module = layer if act is None else nn.Sequential(layer, act)
    return (Unfused(layer, act) if residual else plain).train(fused.training)
