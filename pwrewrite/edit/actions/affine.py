"""A module that is one scale and one shift per channel, found by trying it: `affine_facts`.

Frozen batch norms and channel-wise scales are written in many ways, from buffers and arithmetic. What they compute is
read off their outputs, ``shift = f(0)`` and ``scale = f(1) - f(0)`` in float64, and checked on random numbers of two
sizes, with gradients wanted and not, since such code often has a branch for either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.copies import deep_copy
from ...core.plan import Op, Skip, SkipReason
from .bench import Refused
from .code_norm import NormFacts

_SIZES = ((2, 3), (5, 1))
"""Batch size and extent of what is tried."""

_TOLERANCE = 1e-4
"""Of the largest value: code that computes in float32 inside rounds to 6e-8 a few times."""


def affine_facts(op: Op, module: nn.Module, channels: int, dims: int, *, fill: bool) -> NormFacts:
    """A channel-wise affine map as a batch norm of mean 0 and variance 1.

    Args:
        op: The op that takes it for one.
        module: The module, in evaluation mode.
        channels: Channels of its input.
        dims: Spatial dims of its input.
        fill: Whether the values matter; otherwise only shapes do.

    Raises:
        Refused: If it is something else.
    """
    zeros = torch.zeros(channels, dtype=torch.float64)
    if not fill or any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return NormFacts(zeros, zeros + 1, zeros, zeros, 0.0)
    device = next(iter((*module.parameters(), *module.buffers()))).device
    trial = deep_copy(module).double()
    shape = (1, channels, *(1,) * dims)

    def run(x: Tensor, gradient: bool = False) -> Tensor:
        with torch.set_grad_enabled(gradient):
            out = trial(x.to(device).requires_grad_(gradient))
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise ValueError("not a map of the same shape")
        return out.detach().double().cpu()

    try:
        shift = run(zeros.view(shape).clone()).flatten()
        scale = run(zeros.view(shape) + 1).flatten() - shift
        generator = torch.Generator().manual_seed(0)
        for batch, extent in _SIZES:
            x = torch.randn(batch, channels, *(extent,) * dims, generator=generator, dtype=torch.float64)
            expected = x * scale.view(shape) + shift.view(shape)
            limit = _TOLERANCE * float(expected.abs().max())
            if any(not torch.allclose(run(x.clone(), gradient), expected, 0.0, limit) for gradient in (False, True)):
                raise ValueError("something else")
    except Exception as error:
        detail = f"{type(module).__name__} is more than a scale and a shift per channel"
        raise Refused(Skip(op.path, SkipReason.OVERRIDDEN_FORWARD, detail)) from error
    return NormFacts(zeros, zeros + 1, scale, shift, 0.0)
