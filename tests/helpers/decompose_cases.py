"""Random convolutions, the reference that they are compared with, and the forms at full rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from pwrewrite import decompose
from pwrewrite.decompose import Factors, Stage

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Convolution:
    """Everything that a convolution has beside its weight."""

    groups: int
    in_group: int
    out_group: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    padding_mode: str
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    size: tuple[int, ...]
    bias: bool
    seed: int

    @property
    def dims(self) -> int:
        return len(self.kernel)

    @property
    def contraction(self) -> int:
        """All products summed into one output by any of the stages or the original."""
        return 3 * self.in_group * math.prod(self.kernel) * self.groups + self.out_group * self.groups

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight in the convolution's own layout, input, bias."""
        generator = torch.Generator().manual_seed(self.seed)
        rows, columns = (self.in_group, self.out_group) if self.transposed else (self.out_group, self.in_group)
        weight = torch.randn(self.groups * rows, columns, *self.kernel, generator=generator, dtype=torch.float64)
        x = torch.randn(2, self.groups * self.in_group, *self.size, generator=generator, dtype=torch.float64)
        bias = torch.randn(self.groups * self.out_group, generator=generator, dtype=torch.float64)
        return weight.to(dtype), x.to(dtype), bias.to(dtype) if self.bias else None

    def run(self, x: Tensor, stage: Stage, bias: Tensor | None) -> Tensor:
        """One stage on its axes; the whole convolution is the stage with all axes."""
        own = stage.axes

        def pick(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(value if axis in own else other for axis, value in enumerate(values))

        stride, dilation = pick(self.stride, 1), pick(self.dilation, 1)
        if stage.transposed:
            padding, output_padding = pick(self.padding, 0), pick(self.output_padding, 0)
            transpose = CONV_TRANSPOSE[self.dims]
            return transpose(x, stage.weight, bias, stride, padding, output_padding, stage.groups, dilation)
        if self.padding_mode == "zeros" and isinstance(self.padding, str):
            # torch's own handling of 'same' and 'valid', on a kernel of size 1 off the stage's axes
            return CONV[self.dims](x, stage.weight, bias, stride, self.padding, dilation, stage.groups)
        pads = [self.pads(axis) if axis in own else (0, 0) for axis in range(self.dims)]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(x, list(itertools.chain.from_iterable(reversed(pads))), mode=mode)
        return CONV[self.dims](x, stage.weight, bias, stride, 0, dilation, stage.groups)

    def pads(self, axis: int) -> tuple[int, int]:
        """Padding before and behind one axis, as `torch.nn` computes it for 'same'."""
        if self.padding == "same":
            total = self.dilation[axis] * (self.kernel[axis] - 1)
            return total // 2, total - total // 2
        if self.padding == "valid":
            return 0, 0
        return self.padding[axis], self.padding[axis]

    def whole(self, weight: Tensor) -> Stage:
        return Stage(weight, self.groups, self.transposed, tuple(range(self.dims)))

    def run_chain(self, x: Tensor, factors: Factors, bias: Tensor | None) -> Tensor:
        stages = factors.stages(self.transposed)
        for stage in stages[:-1]:
            x = self.run(x, stage, None)
        return self.run(x, stages[-1], bias)


@st.composite
def convolutions(draw: st.DrawFn, pointwise: bool = False, max_dims: int = 3, min_dims: int = 1) -> Convolution:
    """Random shapes; the input is at least as large as the dilated kernel."""
    dims = draw(st.integers(min_dims, max_dims))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel = (1,) * dims if pointwise else each(1, 3)
    stride, dilation = each(1, 3), each(1, 2)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    transposed = draw(st.booleans())
    output_padding, padding_mode = (0,) * dims, "zeros"
    padding: tuple[int, ...] | str
    if transposed:
        padding = tuple(draw(st.integers(0, (r + 1) // 2)) for r in reach)
        output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
        size = each(2, 4)
    else:
        padding = draw(st.sampled_from(["same", "valid", "tuple"]))
        padding_mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if padding == "same":
            stride = (1,) * dims
        elif padding == "tuple":
            padding = each(0, 2)
        size = tuple(r + draw(st.integers(3, 4)) for r in reach)
    return Convolution(
        groups=draw(st.integers(1, 3)),
        in_group=draw(st.integers(1, 4)),
        out_group=draw(st.integers(1, 4)),
        kernel=kernel,
        stride=stride,
        padding=padding,
        padding_mode=padding_mode,
        dilation=dilation,
        output_padding=output_padding,
        transposed=transposed,
        size=size,
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


@st.composite
def kernels(
    draw: st.DrawFn, min_dims: int = 1, max_dims: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, int]:
    """A kernel in forward layout with a decaying spectrum on both channel axes, and its groups."""
    dims = draw(st.integers(min_dims, max_dims))
    groups, out, inner = draw(st.integers(1, 2)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    spatial = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return decaying(groups * out, inner, spatial, draw(st.floats(0, 2)), generator).to(dtype), groups


def decaying(out: int, inner: int, spatial: tuple[int, ...], power: float, generator: torch.Generator) -> Tensor:
    """A float64 kernel whose singular values fall about as ``rank ** -power`` on both channel axes."""
    kernel = torch.randn(out, inner, math.prod(spatial), generator=generator, dtype=torch.float64)
    kernel *= torch.arange(1, out + 1).double()[:, None, None] ** -power
    kernel *= torch.arange(1, inner + 1).double()[:, None] ** -power
    left = torch.linalg.qr(torch.randn(out, out, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(inner, inner, generator=generator, dtype=torch.float64))[0]
    return torch.einsum("ao,oik,ib->abk", left, kernel, right).reshape(out, inner, *spatial).contiguous()


def moment(size: int, rank: int, generator: torch.Generator, groups: int = 1) -> Tensor:
    """A stack of positive semi-definite matrices of some rank."""
    samples = torch.randn(groups, size, rank, generator=generator, dtype=torch.float64)
    return samples @ samples.mT / rank


def full_rank(form: str, kernel: Tensor, groups: int, **weights: Tensor | None) -> Factors:
    """A form at the rank at which it is exact."""
    out, inner = kernel.shape[0] // groups, kernel.shape[1]
    if form in ("hooi", "hosvd"):
        return decompose.tucker2(kernel, rank_in=inner, rank_out=out, groups=groups, method=form, **weights)
    spectrum = SPECTRA[form](kernel, groups=groups, **weights)
    return spectrum.truncate(spectrum.max_rank)


def _split(axes: Callable[[int], object]) -> Callable[..., decompose.Spectrum]:
    """The spectrum of a split, its first axes by the number of spatial axes."""

    def spectrum(kernel: Tensor, **options: object) -> decompose.Spectrum:
        return decompose.split_spectrum(kernel, first_axes=axes(kernel.dim() - 2), **options)

    return spectrum


SPECTRA: dict[str, Callable[..., decompose.Spectrum]] = {
    "reduction": _split(lambda dims: ()),
    "expansion": _split(range),
    "spatial": _split(lambda dims: (0,)),
    "spatial-last": _split(lambda dims: range(1, dims)),
    "depthwise": decompose.depthwise_spectrum,
    "low_rank": _split(range),
}
"""Every form with one rank."""


def least_dims(form: str) -> int:
    """The fewest spatial axes of a form."""
    return 2 if form.startswith("spatial") else 1


def cut_rank(form: str, kernel: Tensor, groups: int, draw_rank: Callable[[int], int]) -> Factors:
    """A form at some rank."""
    if form in ("hooi", "hosvd"):
        rank_in, rank_out = draw_rank(kernel.shape[1]), draw_rank(kernel.shape[0] // groups)
        return decompose.tucker2(kernel, rank_in=rank_in, rank_out=rank_out, groups=groups, method=form)
    spectrum = SPECTRA[form](kernel, groups=groups)
    return spectrum.truncate(draw_rank(spectrum.max_rank))


def kernel_loss(delta: Tensor, inputs: Tensor | None, outputs: Tensor | None, groups: int = 1) -> float:
    """``tr(G Δ C Δᵀ)`` of a change of a kernel; ``C`` over patches or channels, ``G`` over outputs; written out."""
    rows = delta.double().reshape(groups, delta.shape[0] // groups, -1)
    patch, out = rows.shape[2], rows.shape[1]
    c = (
        torch.eye(patch).double().expand(groups, -1, -1)
        if inputs is None
        else inputs.double().reshape(groups, *inputs.shape[-2:])
    )
    g = (
        torch.eye(out).double().expand(groups, -1, -1)
        if outputs is None
        else outputs.double().reshape(groups, *outputs.shape[-2:])
    )
    if c.shape[-1] < patch:
        c = torch.stack([torch.kron(each, torch.eye(patch // c.shape[-1]).double()) for each in c])
    return float(torch.einsum("gop,gpq,gmq,gmo->", rows, c, rows, g))
