"""Lazy modules learn their shapes from the first input: here on a copy, so that the caller's model stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from ..core.errors import CaptureError
from ..core.nested import Args, Kwargs, map_tensors
from ..core.random_state import keeping_random_state


def _lazy_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if _lazy(module) and isinstance(module, LazyModuleMixin)]


def _lazy(module: nn.Module) -> list[Any]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and is_lazy(t)]


def has_lazy_modules(model: nn.Module) -> bool:
    """Whether a model has modules that do not know their shapes yet."""
    return bool(_lazy_paths(model))


def materialized(model: nn.Module, args: Args, kwargs: Kwargs) -> nn.Module:
    """The model itself, or a copy whose lazy modules have taken their shapes from a run on these inputs.

    New weights are drawn from a fixed seed; random states stay. Inputs on ``meta`` are replaced by random ones.

    Raises:
        CaptureError: If the model cannot be copied, does not run, or does not call one of them.
    """
    lazy = _lazy_paths(model)
    if not lazy:
        return model
    memo = {id(t): type(t)(device=t.device, dtype=t.dtype) for m in model.modules() for t in _lazy(m)}  # torch cannot
    try:
        model = copy.deepcopy(model, memo)
    except Exception as error:
        raise _unshaped(lazy[0], f"the model cannot be copied: {error}") from error
    args, kwargs = map_tensors((args, kwargs), _real)
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad(), keeping_random_state():
        torch.manual_seed(0)
        model.eval()
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise _unshaped(lazy[0], f"the model does not run: {type(error).__name__}: {error}") from error
    for module, training in modes.items():
        module.training = training
    if lazy := _lazy_paths(model):
        raise _unshaped(lazy[0], "the model does not call it on these inputs")
    return model


def _real(tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.randn(tensor.shape, dtype=tensor.dtype, device="cpu")
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


def _unshaped(path: str, reason: str) -> CaptureError:
    hint = "run the model once on real inputs first: model(*example_inputs)"
    return CaptureError("a lazy module has no shapes yet", where=path or "(root)", got=reason, hint=hint)
