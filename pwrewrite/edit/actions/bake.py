"""``bake``: weights that are computed before each call become plain parameters, with their values in evaluation.

Parametrizations (`torch.nn.utils.parametrize`), ``weight_norm`` and ``spectral_norm`` of the older kind, and pruning
masks. Only stock modules of torch do this, and torch itself takes them off again. What they did in training (the power
iterations of ``spectral_norm``) ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ...core.errors import PlanError
from ...core.plan import Edit, Op
from .bench import Bench
from .settings import read


@dataclass(frozen=True)
class BakeSettings:
    """Settings of ``bake``.

    Attributes:
        weights: Names of the parameters that are computed, for the reader.
    """

    weights: tuple[str, ...] = ()


def computed_weights(module: nn.Module) -> dict[str, Callable[[], object]]:
    """Name of each parameter of a module that is computed before its calls, to what makes it a plain one."""
    bakes: dict[str, Callable[[], object]] = {}
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            bakes[name] = partial(parametrize.remove_parametrizations, module, name)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            bakes[hook.name] = partial(remove_weight_norm, module, hook.name)
        elif isinstance(hook, SpectralNorm):
            bakes[hook.name] = partial(remove_spectral_norm, module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            name = str(vars(hook)["_tensor_name"])
            bakes[name] = partial(prune.remove, module, name)
    return bakes


def bake_weights(bench: Bench, op: Op) -> Edit:
    """Carries out a ``bake`` op.

    Raises:
        PlanError: If there is no such module, or it computes no weight.
        Refused: If something else refers to it.
    """
    read(BakeSettings, op)
    module = bench.find(op, op.path)
    computed = computed_weights(module)
    if not computed:
        raise PlanError(
            "the plan bakes a weight that is a plain one here",
            where=op.where("path"),
            expected="a parametrized module, or one with weight_norm or spectral_norm of the older kind",
            got=type(module).__name__,
            hint="the plan was made for another model, or was carried out already",
        )
    bench.check_held(op.path, module)
    before = dict(module.named_parameters())
    training = module.training
    module.eval()
    with torch.no_grad():
        for bake in computed.values():
            bake()
    module.train(training)
    inner = f"{op.path}." if op.path else ""
    after = dict(module.named_parameters())
    renamed = {
        f"{inner}{old}": tuple(f"{inner}{name}" for name in computed if name in old)
        for old in before
        if old not in after
    }
    return Edit(
        op,
        "module",
        "bake",
        params_before=sum(parameter.numel() for parameter in before.values()),
        params_after=sum(parameter.numel() for parameter in after.values()),
        exact="eval",
        renamed=renamed,
        aliases=tuple(name for name in bench.names_of(module) if name != op.path),
    )
