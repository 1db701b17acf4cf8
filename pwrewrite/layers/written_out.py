"""Activations that a module writes out in its own code, such as ``x * torch.sigmoid(x)``: `written_out`.

Such a module is known by what it computes, whatever its code or its name: it holds no tensors, treats every number by
itself, and its values and gradients on some thousand numbers, near zero and far from it, are those of an activation
that kernels know (`pwrewrite.layers.known`). One that reads other tensors, draws numbers, does something else in
training, has gradients of its own making (a straight-through estimator) or constants of few digits is none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from inspect import Parameter, signature

import torch
from torch import Tensor, nn

from ..core.random_state import keeping_random_state
from .known import ACTIVATIONS, Found, activation_module, hooked, module_activation

_CLOSE = 1e-9
"""Relative difference to an activation: a sixtieth of what float32 rounds."""
_GRADIENTS, _OVERFLOWS = 1e-6, 80.0
"""Difference of the gradients, at numbers whose exponential float32 can hold."""
_CORNERS = torch.tensor([0.0, 1.0, -1.0, 3.0, -3.0, 6.0, -6.0], dtype=torch.float64, device="cpu")
"""Where activations may have a corner, and whose gradient there is a matter of taste."""


def written_out(module: nn.Module) -> tuple[Found, bool] | None:
    """The activation that a module's own code writes out, and whether it writes into its input; None for any other.

    The module stays as it is; a copy is run.
    """
    known = type(module).__module__.partition(".")[0] == "torch" or module_activation(module) is not None
    if known or any(map(hooked, module.modules())) or [*module.parameters(), *module.buffers()]:
        return None
    try:
        taken = signature(module.forward).parameters.values()
        if len(taken) != 1 or next(iter(taken)).kind is Parameter.VAR_KEYWORD:
            return None
        with keeping_random_state(), torch.inference_mode(False), torch.device("cpu"):
            return _recognised(copy.deepcopy(module))
    except Exception:  # code that takes something else, or cannot be copied
        return None


def _recognised(module: nn.Module) -> tuple[Found, bool] | None:
    x = _numbers()
    given = x.clone()
    with torch.no_grad():
        y = module.eval()(given)
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            return None
        in_place = not _same(given, x)
        if in_place and y.data_ptr() != given.data_ptr():
            return None
        for found in _candidates(y, x):
            other = activation_module(*found)
            if not _close(y, other(x), x, _CLOSE) or (in_place and not hasattr(other, "inplace")):
                continue
            return (found, in_place) if _alike_everywhere(module, other, x, y) else None
    return None


def _numbers() -> Tensor:
    """Numbers of both signs from 1e-12 to 1e12, most of them between 0.01 and 10, ``(2, 4, 16, 16)`` in float64."""
    generator = torch.Generator().manual_seed(0)
    near = torch.rand(1500, generator=generator, dtype=torch.float64, device="cpu") * 24 - 12
    far = 10 ** (torch.rand(540, generator=generator, dtype=torch.float64, device="cpu") * 24 - 12)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64, device="cpu").repeat(270)
    numbers = torch.cat([near, far * signs, _CORNERS, torch.tensor([0.5], dtype=torch.float64, device="cpu")])
    return numbers[torch.randperm(2048, generator=generator, device="cpu")].reshape(2, 4, 16, 16)


def _candidates(y: Tensor, x: Tensor) -> Iterator[Found]:
    """Activations that have the lowest and highest value, and the value at -1, of what is looked for."""
    least, most, at = float(y.min()), float(y.max()), float(y[x == -1][0])
    for name, row in ACTIVATIONS.items():
        if row.count == 0 and name != "none":
            yield name, ()
    if -1 < at < 0:
        yield "leaky_relu", (-at,)
    if least < most < 1e9:
        yield "hardtanh", (least, most)


def _alike_everywhere(module: nn.Module, other: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether a module treats every number by itself, in both modes and in float32, with an activation's gradients."""
    with torch.no_grad():
        order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(1), device="cpu")
        flat, values = x.flatten()[order], y.flatten()[order]
        small = flat.abs() < 6
        parts = (flat.view(8, 256), values.view(8, 256)), (flat[small][None], values[small][None])
        if not all(_close(module(part.clone()), value, part, _CLOSE) for part, value in parts):
            return False
        if not _same(module.train()(x.clone()), y):
            return False
        single = module.eval()(x.float())
        if single.dtype is not torch.float32 or not _close(single.double(), y, x, 1e-4):
            return False
        if not bool(module(torch.full((1, 1, 1, 1), torch.nan, device="cpu")).isnan().all()):
            return False
    with torch.enable_grad():
        gradients = list[Tensor]()
        for each in (module, other):
            leaf = x.clone().requires_grad_()
            gradients += torch.autograd.grad(each(leaf.clone()).sum(), leaf)
    smooth = ~torch.isin(x, _CORNERS) & (x.abs() < _OVERFLOWS)
    ours, theirs = (each[smooth] for each in gradients)
    return _close(ours, theirs, torch.ones_like(ours), _GRADIENTS)


def _close(a: Tensor, b: Tensor, x: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance * (b.abs() + x.abs().clamp(max=1))).all())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
