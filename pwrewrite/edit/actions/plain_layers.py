"""``bake`` and ``unfuse``: layers that other passes and tools cannot take become plain ones.

``bake``: weights that are computed before each call become plain parameters, with their values in evaluation. These are
parametrizations (`torch.nn.utils.parametrize`), ``weight_norm`` and ``spectral_norm`` of the older kind, and pruning
masks. What they did in training (the power iterations of ``spectral_norm``) ends.

``unfuse``: fused layers become plain layers and activations again. Quantizers, exporters and other packages' passes
know ``nn.Conv2d``, ``nn.Linear`` and ``nn.ReLU``, not `pwrewrite.layers.PointwiseActivation`. Folded batch norms stay
folded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ...core.plan import Edit, Op
from ...core.subjects import check_model
from ...layers import PointwiseActivation
from ...layers.unfused import Unfused
from ..swap import copy_of, replace_module, stem
from .bench import ELSEWHERE, Bench, param_count
from .settings import wrong


@dataclass(frozen=True)
class BakeSettings:
    """Settings of ``bake``: names of the parameters that are computed, for the reader."""

    weights: tuple[str, ...] = ()


_Undo = Callable[[nn.Module, str], object]
_HOOKS: tuple[tuple[type, str, _Undo], ...] = (
    (WeightNorm, "name", remove_weight_norm),
    (SpectralNorm, "name", remove_spectral_norm),
    (prune.BasePruningMethod, "_tensor_name", prune.remove),
)
"""Hooks that compute a weight: where they keep its name, and how they are removed."""


def _hooks(module: nn.Module) -> list[tuple[str, _Undo]]:
    hooks = module._forward_pre_hooks.values()
    return [(getattr(hook, key), undo) for hook in hooks for kind, key, undo in _HOOKS if isinstance(hook, kind)]


def computed_weights(module: nn.Module) -> list[str]:
    """Names of the parameters of a module that are computed before its calls."""
    parametrized = parametrize.is_parametrized(module)
    names = [name for name, _ in module.get_submodule("parametrizations").named_children()] if parametrized else []
    return names + [name for name, _ in _hooks(module)]


def _baked(module: nn.Module) -> nn.Module:
    """The same module with plain parameters; itself where no parametrization has given it a class of its own."""
    for name, undo in _hooks(module):
        undo(module, name)
    for key, wrapped in list(module._load_state_dict_pre_hooks.items()):  # for files of earlier versions of the norms
        if getattr(getattr(wrapped, "hook", wrapped), "__module__", "").startswith("torch.nn.utils."):
            del module._load_state_dict_pre_hooks[key]
    if not parametrize.is_parametrized(module):
        return module
    # torch's own removal would change the class, which the user's model shares with the copy.
    kind = parametrize.type_before_parametrizations(module)
    plain: nn.Module = object.__new__(kind)
    vars(plain).update({name: dict(value) if type(value) is dict else value for name, value in vars(module).items()})
    del plain._modules["parametrizations"]
    for name, computing in module.get_submodule("parametrizations").named_children():
        trained = any(parameter.requires_grad for parameter in computing.parameters())
        plain._parameters[name] = nn.Parameter(getattr(module, name).clone(), requires_grad=trained)
    return plain


def bake_weights(bench: Bench, op: Op, settings: BakeSettings) -> Edit:
    """Carries out a ``bake`` op."""
    module = bench.find(op, op.path)
    computed = computed_weights(module)
    if not computed:
        expected = "a parametrized module, or one with weight_norm or spectral_norm of the older kind"
        message = "the plan bakes a weight that is a plain one here"
        raise wrong(op, "path", message, expected, type(module).__name__, ELSEWHERE)
    bench.check_held(op.path, module)
    before, params, training = list(dict(module.named_parameters())), param_count(module), module.training
    module.eval()
    with torch.no_grad():
        plain = _baked(module)
    plain.train(training)
    edit = Edit(op, "module", "bake", params_before=params, params_after=param_count(plain), exact="eval")
    inner, after = stem(op.path), dict(plain.named_parameters())
    renamed = {
        inner + old: tuple(inner + name for name in computed if name in old) for old in before if old not in after
    }
    return replace(edit, renamed=renamed, aliases=bench.replace(module, plain, op.path))


def unfuse(model: nn.Module) -> nn.Module:
    """A copy of a model in which every fused layer is a plain layer and its activation again.

    Args:
        model: A model that `pwrewrite.fuse` made; stays as it is.

    Returns:
        The copy, which computes the same up to rounding: in the place of a fused layer it has the layer alone (such as
        an ``nn.Conv2d``), an ``nn.Sequential`` of layer and activation, or a module that also adds a residual.

    Raises:
        RefusedError: If the model cannot be copied.

    >>> import torch, pwrewrite
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU()).eval()
    >>> fused = pwrewrite.fuse(model, torch.randn(1, 3, 8, 8)).model
    >>> [type(module).__name__ for module in pwrewrite.unfuse(fused)[0]]
    ['Conv2d', 'ReLU']
    """
    check_model(model)
    result = copy_of(model)
    summed = _adds_residuals(result)
    for fused in [module for module in result.modules() if isinstance(module, PointwiseActivation)]:
        result = replace_module(result, fused, _unfused(fused, id(fused) in summed))
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


def _unfused(fused: PointwiseActivation, residual: bool) -> nn.Module:
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
    plain, inner = _unfused(fused, id(fused) in _adds_residuals(bench.model)), stem(op.path)
    renamed = {f"{inner}{name.rpartition('.')[2]}": (f"{inner}{name}",) for name, _ in plain.named_parameters()}
    edit = Edit(op, "module", "unfuse", params_before=param_count(fused), params_after=param_count(plain), exact="eval")
    return replace(edit, renamed=renamed, aliases=bench.replace(fused, plain, op.path))
