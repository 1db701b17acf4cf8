"""What a layer reads and writes, position by position: rows of input patches and of outputs.

A convolution is a matrix ``(out, in·k)`` applied to the patch under each output position, channel first, as
`torch.nn.functional.unfold` lays patches out; a linear map is one without spatial axes, whose positions are all of its
leading dims. A transposed convolution applies one matrix ``(out, in)`` per tap to the channels at each *input*
position, so there a row is the input's channels, and what holds for rows of inputs holds for each tap.
"""

from __future__ import annotations

from math import ceil, prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.convolution import ConvSpec

_LEAST_POSITIONS = 64


def row_size(spec: ConvSpec) -> int:
    """Size of an input row, per group."""
    channels = spec.in_channels // spec.groups
    return channels if spec.transposed else channels * prod(spec.kernel_size)


def batched(x: Tensor, spec: ConvSpec) -> Tensor:
    """A layer's input or output as ``(N, channels, *size)``, or ``(rows, features)`` for a linear map."""
    if not spec.dims:
        return x.reshape(-1, x.shape[-1])
    return x if x.dim() == spec.dims + 2 else x.unsqueeze(0)


def input_rows(x: Tensor, spec: ConvSpec, positions: Tensor | None = None) -> Tensor:
    """Input rows of a call ``(groups, rows, row_size)``, in float32 at least, of an input from `batched`.

    They are those at flat positions of the output, of the input where transposed, of all rows for a linear map; all of
    them where None.
    """
    if not spec.dims or spec.transposed:
        return output_rows(x, spec, positions)
    size = spec.output_size(x.shape[2:])
    if any(side != (0, 0) for side in spec.padding):
        sides = [n for side in reversed(spec.padding) for n in side]
        x = F.pad(x, sides, mode="constant" if spec.padding_mode == "zeros" else spec.padding_mode)
    index = _indices(x.shape[2:], size, spec, positions).to(x.device)
    rows = x.flatten(2)[:, :, index.flatten()].reshape(*x.shape[:2], *index.shape)  # (N, in, positions, taps)
    count, channels = rows.shape[0] * rows.shape[2], spec.in_channels // spec.groups
    return _wide(rows.transpose(1, 2).reshape(count, spec.groups, channels * index.shape[1]).transpose(0, 1))


def output_rows(y: Tensor, spec: ConvSpec, positions: Tensor | None = None) -> Tensor:
    """Rows of an output (or of the gradient there) from `batched`: ``(groups, rows, out/groups)``; as `input_rows`."""
    if not spec.dims:
        return _wide((y if positions is None else y[positions])[None])
    flat = y.flatten(2) if positions is None else y.flatten(2)[..., positions]
    return _wide(flat.transpose(1, 2).reshape(-1, spec.groups, flat.shape[1] // spec.groups).transpose(0, 1))


def position_count(x: Tensor, spec: ConvSpec, size: tuple[int, ...]) -> int:
    """Flat positions that `input_rows` may take, per sample or of all rows for a linear map; ``size``: the output's."""
    return prod((x.shape[2:] if spec.transposed else size) if spec.dims else x.shape[:1])


def sampled(count: int, spec: ConvSpec, per_sample: float, samples: int, generator: torch.Generator) -> Tensor | None:
    """Flat positions of a call, drawn at random of ``count``; None for all, where not many more than wanted."""
    limit = max(_LEAST_POSITIONS, ceil(per_sample)) * (1 if spec.dims else samples)
    if count <= limit + limit // 4:
        return None
    return torch.randperm(count, generator=generator, device="cpu")[:limit].sort().values


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype.itemsize >= 4 else rows.float()


def _indices(padded: torch.Size, size: tuple[int, ...], spec: ConvSpec, positions: Tensor | None) -> Tensor:
    """Flat input index of every tap of every position taken: ``(positions, taps)``."""
    flat = torch.arange(prod(size), device="cpu") if positions is None else positions.cpu()
    index = torch.zeros(len(flat), 1, dtype=torch.long, device="cpu")
    for axis, start in enumerate(torch.unravel_index(flat, size)):
        taps = torch.arange(spec.kernel_size[axis], device="cpu") * spec.dilation[axis]
        along = start[:, None] * spec.stride[axis] + taps
        index = (index[:, :, None] * padded[axis] + along[:, None, :]).flatten(1)
    return index
