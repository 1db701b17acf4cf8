"""Copies of models: `deep_copy`."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

from .nested import tensors_of

_M = TypeVar("_M", bound=nn.Module)


def deep_copy(model: _M, memo: dict[int, object] | None = None) -> _M:
    """A deep copy of a model, also of one that holds tensors with a gradient history, which ``copy.deepcopy`` refuses.

    Those are what a run left behind, such as what weight norm of the older kind computes; the copy has their values.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        held = [value for name, value in vars(module).items() if name not in ("_parameters", "_modules")]
        for tensor in tensors_of(held):
            if isinstance(tensor, Tensor) and not tensor.is_leaf and id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)
