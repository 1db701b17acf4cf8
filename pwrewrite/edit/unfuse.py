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
    summed = {
        id(code.get_submodule(str(node.target)))
        for code in result.modules()
        if isinstance(code, fx.GraphModule)
        for node in code.graph.nodes
        if node.op == "call_module" and len(node.args) + len(node.kwargs) > 1
    }
    for fused in [module for module in result.modules() if isinstance(module, PointwiseActivation)]:
        layer, act = fused.unfused()
        plain: nn.Module = layer if act is None else nn.Sequential(layer, act)
        plain = Unfused(layer, act) if id(fused) in summed else plain
        result = replace_module(result, fused, plain.train(fused.training))
    return result
