"""A layer as a compiled partition of oneDNN's graph interface, which costs less to call than its convolution.

A call of ``torch.ops.mkldnn`` describes the convolution to oneDNN anew each time, 30 to 60 µs on top of the kernel: on
small maps as much as the kernel itself. A partition is described once, for one shape, and its call costs a fourth of
that. It is taken only where the fuser of `tracing` took all of the layer and the values on random input are those of
the plain layer. It holds its own packed copy of the weight (`packing`), and is made, in about 10 ms, after a few calls
with the same shape that are short enough to notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import tracing
from .kernels import FORMATS, Geometry
from .packing import Compiled

CALLS = 3  # calls with one shape, after which a partition is made for it
_MACS = 400_000_000  # MACs above which the call's own cost is below a hundredth of the kernel's time
_TOLERANCE = 1e-5
"""Relative distance to the plain layer, on random input, above which a partition computes something else (the fuser
takes the tanh approximation of GELU for GELU itself, at 1e-4)."""


def worthwhile(x: Tensor, out: Tensor, weight: Tensor) -> bool:
    """Whether a call is one that a partition makes faster: on float32, short, and not itself a part of tracing."""
    possible = tracing.FUSER and x.dtype is torch.float32 and not tracing.tracing()
    return possible and out.numel() * weight[0].numel() <= _MACS


def compiled(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, how: Geometry, act: Callable[[Tensor], Tensor]
) -> Compiled | None:
    """The layer as one partition for inputs of these shapes; None where the fuser does not take all of it.

    They are the input and, where the layer adds one, the residual, in channels_last; the weight is as the layer has it.
    """
    settings = (weight.detach(), None if bias is None else bias.detach(), how.stride, how.padding, how.dilation)

    def plain(t: Tensor, other: Tensor | None = None) -> Tensor:
        out = torch.conv2d(t, *settings, how.groups)
        return act(out if other is None else out + other)

    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(0)
        drawn = [
            torch.randn(t.shape, generator=generator, device="cpu").contiguous(memory_format=FORMATS[4]) for t in inputs
        ]
        result = tracing.traced(plain, drawn, _TOLERANCE)
    if isinstance(result, str) or not result.whole() or not result.outputs[0].is_contiguous(memory_format=FORMATS[4]):
        return None
    return Compiled(result.run, torch.get_num_threads(), weight.nbytes)
