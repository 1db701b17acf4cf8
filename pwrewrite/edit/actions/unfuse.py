"""`unfuse`: fused layers become plain layers and activations again, for tools and passes that look for those.

Quantizers, exporters and other packages' passes know ``nn.Conv2d``, ``nn.Linear`` and ``nn.ReLU``, not
`pwrewrite.layers.PointwiseActivation`. Folded batch norms stay folded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx, nn

from ...core.nested import deep_copy
from ...core.plan import Edit, Op
from ...layers import PointwiseActivation
from ...layers.unfused import Unfused
from ..swap import replace_module, stem
from .bench import ELSEWHERE, Bench, param_count
from .settings import wrong


def unfuse(model: nn.Module) -> nn.Module:
    """A copy of a model in which every fused layer is a plain layer and its activation again.

    Args:
        model: A model that `pwrewrite.fuse` made; stays as it is.

    Returns:
        The copy, which computes the same up to rounding: in the place of a fused layer it has the layer alone (such as
        an ``nn.Conv2d``), an ``nn.Sequential`` of layer and activation, or a module that also adds a residual.

    >>> import torch, pwrewrite
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU()).eval()
    >>> fused = pwrewrite.fuse(model, torch.randn(1, 3, 8, 8)).model
    >>> [type(module).__name__ for module in pwrewrite.unfuse(fused)[0]]
    ['Conv2d', 'ReLU']
    """
    result = deep_copy(model)
    summed = _adds_residuals(result)
    for fused in [module for module in result.modules() if isinstance(module, PointwiseActivation)]:
        result = replace_module(result, fused, _plain(fused, id(fused) in summed))
    return result


def _adds_residuals(model: nn.Module) -> set[int]:
    """The modules of a model that code calls with more than one argument, by ``id``."""
    return {
        id(code.get_submodule(str(node.target)))
        for code in model.modules()
        if isinstance(code, fx.GraphModule)
        for node in code.graph.nodes
        if node.op == "call_module" and len(node.args) + len(node.kwargs) > 1
    }


def _plain(fused: PointwiseActivation, residual: bool) -> nn.Module:
    """The plain layer and activation of a fused layer, in its mode; ``residual`` where it also adds one."""
    layer, act = fused.unfused()
    plain: nn.Module = layer if act is None else nn.Sequential(layer, act)
    return (Unfused(layer, act) if residual else plain).train(fused.training)


@dataclass(frozen=True)
class UnfuseSettings:
    """Settings of ``unfuse``: none."""


def unfuse_layer(bench: Bench, op: Op, settings: UnfuseSettings) -> Edit:
    """Carries out an ``unfuse`` op."""
    fused = bench.find(op, op.path)
    if not isinstance(fused, PointwiseActivation):
        message = "the plan unfuses a layer that is not fused here"
        raise wrong(op, "path", message, "a fused layer", type(fused).__name__, ELSEWHERE)
    bench.check_held(op.path, fused)
    plain, inner = _plain(fused, id(fused) in _adds_residuals(bench.model)), stem(op.path)
    renamed = {f"{inner}{name.rpartition('.')[2]}": (f"{inner}{name}",) for name, _ in plain.named_parameters()}
    edit = Edit(op, "module", "unfuse", params_before=param_count(fused), params_after=param_count(plain), exact="eval")
    return replace(edit, renamed=renamed, aliases=bench.replace(fused, plain, op.path))
