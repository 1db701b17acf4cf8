"""The shape facts of one convolution, read from a module or from a functional call.

A `ConvSpec` says everything about a convolution except its numbers: output shape, cost and the conditions under which a
rewrite is exact follow from it alone. Output size (Dumoulin & Visin 2016, *A guide to convolution arithmetic*,
relationships 6, 14 and 15)::

    ordinary     (n + p_left + p_right - d (k - 1) - 1) // s + 1
    transposed   (n - 1) s - p_left - p_right + d (k - 1) + output_padding + 1

MACs count one multiply-accumulate per weight and output position (for a transposed convolution per weight and input
position), as ``torch.utils.flop_counter`` does with 2 FLOPs each; a bias adds none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from typing import Any, cast

from torch import nn
from torch.nn.modules.conv import _ConvNd

_ORDINARY = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_MODULES: tuple[type[_ConvNd], ...] = (*_ORDINARY, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Sizes = int | Sequence[int]
"""One integer for every spatial dim, or one for each."""


def spread(value: Sizes, dims: int) -> tuple[int, ...]:
    """One integer for every spatial dim, from an int or a sequence (a sequence of one is spread too)."""
    values = tuple(int(v) for v in value) if isinstance(value, Sequence) else (int(value),)
    return values * dims if len(values) == 1 else values


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """One convolution without its weights; sizes are per spatial dim, padding is ``(left, right)`` each."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of_module(cls, module: nn.Module) -> ConvSpec:
        """Reads a stock convolution module (``nn.Conv1d`` … ``nn.ConvTranspose3d`` or a subclass).

        Its sizes may be what torch takes for such: integers of NumPy, and lists or single ones that code has set.

        >>> from torch import nn
        >>> spec = ConvSpec.of_module(nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False))
        >>> spec.params, spec.output_shape((1, 64, 56, 56)), spec.macs((1, 64, 56, 56), (1, 128, 28, 28))
        (73728, (1, 128, 28, 28), 57802752)
        """
        m = cast(_ConvNd, module)
        dims = len(m.kernel_size)
        kernel, stride, dilation = (spread(sizes, dims) for sizes in (m.kernel_size, m.stride, m.dilation))
        sides = _padding(m.padding if isinstance(m.padding, str) else spread(m.padding, dims), kernel, dilation)
        how = int(m.groups), m.bias is not None, m.padding_mode, m.transposed, spread(m.output_padding, dims)
        return cls(int(m.in_channels), int(m.out_channels), kernel, stride, sides, dilation, *how)

    @classmethod
    def of_call(
        cls,
        weight_shape: Sequence[int],
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        *,
        bias: bool = True,
        transposed: bool = False,
        output_padding: Sizes = 0,
    ) -> ConvSpec:
        """Reads a call of ``torch.nn.functional.conv2d`` and its like from its weight's shape and its arguments.

        ``weight_shape`` is ``(out, in/groups, *k)``, or ``(in, out/groups, *k)`` where transposed.
        """
        kernel = tuple(int(k) for k in weight_shape[2:])
        dims = len(kernel)
        dilations = spread(dilation, dims)
        first, second = int(weight_shape[0]), int(weight_shape[1]) * groups
        channels = (first, second) if transposed else (second, first)
        sides = _padding(padding if isinstance(padding, str) else spread(padding, dims), kernel, dilations)
        extra = spread(output_padding, dims) if transposed else (0,) * dims
        return cls(*channels, kernel, spread(stride, dims), sides, dilations, groups, bias, "zeros", transposed, extra)

    @property
    def dims(self) -> int:
        """Number of spatial dims."""
        return len(self.kernel_size)

    @property
    def op(self) -> str:
        """Name as in ``torch.nn.functional``: ``conv2d``, ``conv_transpose1d``, …."""
        return f"conv_transpose{self.dims}d" if self.transposed else f"conv{self.dims}d"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(out, in/groups, *k)``, or ``(in, out/groups, *k)`` where transposed."""
        first, second = (self.out_channels, self.in_channels)[:: -1 if self.transposed else 1]
        return (first, second // self.groups, *self.kernel_size)

    @property
    def params(self) -> int:
        """Elements of weight and bias."""
        return prod(self.weight_shape) + self.out_channels * self.bias

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1 in every dim, so that it mixes channels at one position only."""
        return all(k == 1 for k in self.kernel_size)

    @property
    def pads_copy(self) -> bool:
        """Whether the input is padded as a tensor of its own, which autograd then keeps in the input's place."""
        return self.padding_mode != "zeros" or any(left != right for left, right in self.padding)

    @property
    def is_depthwise(self) -> bool:
        """Whether each input channel is filtered on its own: one input channel per group, more than one group."""
        return self.groups == self.in_channels and self.groups > 1

    @property
    def is_dense_spatial(self) -> bool:
        """Whether it is a k×k convolution that mixes channels: what a bottleneck can replace."""
        return not self.is_pointwise and not self.is_depthwise

    def output_size(self, size: Sequence[int], wanted: Sequence[int] | None = None) -> tuple[int, ...]:
        """Spatial output size, below 1 where the input is too small; ``wanted`` is what a transposed call asks for."""
        out = []
        for i, n in enumerate(size):
            (left, right), reach = self.padding[i], self.dilation[i] * (self.kernel_size[i] - 1)
            if self.transposed:
                smallest = (n - 1) * self.stride[i] - left - right + reach + 1
                out.append(wanted[i] if wanted is not None else smallest + self.output_padding[i])
            else:
                out.append((n + left + right - reach - 1) // self.stride[i] + 1)
        return tuple(out)

    def output_shape(self, shape: Sequence[int], wanted: Sequence[int] | None = None) -> tuple[int, ...]:
        """Output shape for ``(N, in, *size)`` or, unbatched, ``(in, *size)``; raises `ValueError` for any other."""
        lead = len(shape) - self.dims - 1
        if lead not in (0, 1):
            raise ValueError(f"{self.op} takes {self.dims + 1} or {self.dims + 2} dims, got shape {tuple(shape)}")
        if shape[lead] != self.in_channels:
            raise ValueError(f"{self.op} takes {self.in_channels} channels, got {shape[lead]} in shape {tuple(shape)}")
        before = tuple(shape[lead + 1 :])
        size = self.output_size(before, None if wanted is None else tuple(int(w) for w in wanted)[-self.dims :])
        if any(n < (0 if self.transposed else 1) for n in size):
            raise ValueError(f"{self.op} with kernel {self.kernel_size} does not fit an input of size {before}")
        most = {"reflect": 0, "circular": 1}.get(self.padding_mode)  # beyond an input's size less one
        if most is not None and any(max(pads) >= n + most for pads, n in zip(self.padding, before)):
            raise ValueError(f"{self.op} cannot pad an input of size {before} by {self.padding} ({self.padding_mode})")
        return (*shape[:lead], self.out_channels, *size)

    def macs(self, input_shape: Sequence[int], output_shape: Sequence[int]) -> int:
        """Multiply-accumulates of one call, from its input and output shapes (batched or not, or of a linear map)."""
        each = prod(input_shape) // self.in_channels if self.transposed else prod(output_shape) // self.out_channels
        return prod(self.weight_shape) * each


def _of_spec(name: str) -> Any:
    return property(attrgetter(f"spec.{name}"), doc=f"``{name}`` of the layer it stands for.")


class StandsForLayer:
    """What stands for a layer reads like it: a mixin for modules that keep the layer's shape facts in ``spec``."""

    spec: ConvSpec

    in_channels: int = _of_spec("in_channels")
    out_channels: int = _of_spec("out_channels")
    kernel_size: tuple[int, ...] = _of_spec("kernel_size")
    stride: tuple[int, ...] = _of_spec("stride")
    dilation: tuple[int, ...] = _of_spec("dilation")
    groups: int = _of_spec("groups")
    padding_mode: str = _of_spec("padding_mode")
    output_padding: tuple[int, ...] = _of_spec("output_padding")
    transposed: bool = _of_spec("transposed")

    @property
    def padding(self) -> tuple[int, ...] | str:
        """Padding of the layer it stands for, ``same`` where it is not symmetric."""
        if all(left == right for left, right in self.spec.padding):
            return tuple(left for left, _ in self.spec.padding)
        return "same"


def _padding(
    padding: Sequence[int] | str, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    if not isinstance(padding, str):
        return tuple((p, p) for p in padding)
    total = [0 if padding == "valid" else d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return tuple((t // 2, t - t // 2) for t in total)


def stock_convolution(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution whose forward is torch's own: replaced neither on it nor by its class."""
    base = next((base for base in CONV_MODULES if isinstance(module, base)), None)
    if base is None or "forward" in module.__dict__ or isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return False
    return all(getattr(type(module), name, 0) is getattr(base, name, 0) for name in ("forward", "_conv_forward"))
