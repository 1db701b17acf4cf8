"""Kernel layouts: how the weights of every convolution become one tensor, and factors become convolution weights.

All of ``decompose`` works on the *forward layout* ``(out, in/groups, *k)`` with 1 to 3 spatial axes. A transposed
convolution stores ``(in, out/groups, *k)``; its channel axes are permuted within each group, its spatial axes not
flipped, because every form gives each spatial axis to one factor, which is then itself a transposed convolution.

A factorised convolution is a chain of `Stage`. On the spatial axes that a stage owns it has the original's kernel size,
stride, padding, dilation and output padding, on all others size 1, stride 1 and no padding; only the last has the bias.
So the chain at full rank *is* the original for every padding mode: padding (which has no bias to spread) commutes with
a 1×1 convolution and acts on each spatial axis on its own.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from ..core.errors import RefusedError, UsageError

#: How many elements of a float32 tensor are summed in float32.
_NORM_PIECE = 4096


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a kernel is decomposed in, and its factors are returned in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The widest real dtype of the tensor's device: float64, or float32 on a device that has none (mps)."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


def frobenius(tensor: Tensor) -> float:
    """The Frobenius norm: pieces in the tensor's own dtype, their norms in the widest.

    A float32 sum over millions of elements would lose four digits, and float64 throughout would cost a copy.
    """
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // _NORM_PIECE * _NORM_PIECE
    pieces = torch.linalg.vector_norm(flat[:whole].reshape(-1, _NORM_PIECE), dim=-1) if whole else flat[:0]
    rest = torch.linalg.vector_norm(flat[whole:]).reshape(1)
    norm = float(torch.linalg.vector_norm(torch.cat([pieces, rest]).to(wide_dtype(flat))))
    if tensor.dtype == torch.float64 or 1e-15 < norm < 1e15:
        return norm
    return float(torch.linalg.vector_norm(flat, dtype=wide_dtype(flat)))


def to_forward_layout(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """A weight ``(out, in/groups, *k)``, or ``(in, out/groups, *k)`` where transposed, in forward layout.

    ``(g·a, b, *k) -> (g·b, a, *k)``, group by group, which is its own inverse. Raises `UsageError` where the channels
    do not divide into the groups.
    """
    if not transposed:
        return weight
    check_groups(weight, groups)
    rows, columns, *spatial = weight.shape
    grouped = weight.reshape(groups, rows // groups, columns, *spatial)
    return grouped.transpose(1, 2).reshape(groups * columns, rows // groups, *spatial).contiguous()


from_forward_layout = to_forward_layout


def check_groups(weight: Tensor, groups: int) -> None:
    """Raises `UsageError` unless the first axis divides into ``groups``."""
    if groups < 1 or weight.dim() < 2 or weight.shape[0] % groups:
        message = f"a weight of shape {tuple(weight.shape)} does not divide into {groups} groups"
        raise UsageError(message, expected="groups that divide the first axis", got=f"groups={groups}")


def prepare_kernel(kernel: Tensor, groups: int, spatial: tuple[int, int] = (1, 3)) -> Tensor:
    """A kernel in its compute dtype, without a gradient; callers check that it is finite.

    Raises `UsageError` for a wrong dtype, number of axes (``spatial``: fewest and most), groups, or an empty axis.
    """
    low, high = spatial
    if not low <= kernel.dim() - 2 <= high:
        raise UsageError(
            f"a kernel of shape {tuple(kernel.shape)} cannot be decomposed",
            expected=f"(out, in/groups, *k) with {low} to {high} spatial axes",
            got=f"{kernel.dim()} axes",
        )
    if not kernel.dtype.is_floating_point:
        raise UsageError("only real floating kernels can be decomposed", got=str(kernel.dtype))
    if kernel.numel() == 0:
        raise UsageError(f"a kernel of shape {tuple(kernel.shape)} has no elements")
    check_groups(kernel, groups)
    return kernel.detach().to(compute_dtype(kernel.dtype))


def check_finite(norm: float, tensor: Tensor, name: str = "kernel") -> None:
    """Raises `RefusedError` when ``norm``, the norm of ``tensor``, shows that it holds NaN or Inf."""
    if math.isfinite(norm):
        return
    nans, infs = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    message = f"the {name} holds {nans} NaN and {infs} Inf among {tensor.numel()} values: it cannot be decomposed"
    hint = "repair the weights, or exclude this layer"
    raise RefusedError(message, expected="finite values", got=f"{nans} NaN, {infs} Inf", hint=hint)


def check_rank(rank: int, limit: int, name: str = "rank") -> int:
    """A width as a plain integer; raises `UsageError` where it is none from 1 to ``limit``."""
    width = operator.index(rank) if isinstance(rank, SupportsIndex) and not isinstance(rank, bool) else 0
    if not 1 <= width <= limit:
        expected = f"an integer from 1 to {limit} (per group)"
        hint = "resolve_rank turns a ratio such as 0.5 or '50%' into a width"
        raise UsageError(f"{name} {rank!r} is not a width of this kernel", expected=expected, got=repr(rank), hint=hint)
    return width


@dataclass(frozen=True, eq=False)
class Stage:
    """One convolution, ``(out, in/groups, *k)`` or ``(in, out/groups, *k)``, with the spatial axes that it owns."""

    weight: Tensor
    groups: int
    transposed: bool
    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Factors(ABC):
    """What every form has in common."""

    groups: int
    relative_error: float  # ‖W − Ŵ‖ / ‖W‖ of the factors as they are returned; 0 for a zero kernel
    weighted_error: float  # ‖G^½ (W − Ŵ) C^½‖ / ‖G^½ W C^½‖; the same where there are no weights

    @abstractmethod
    def reconstruct(self) -> Tensor:
        """The kernel ``(out, in/groups, *k)`` that the factors stand for."""

    @abstractmethod
    def stages(self, transposed: bool = False) -> tuple[Stage, ...]:
        """The factors as a chain of convolutions, first to last, for an original that is ``transposed`` or not."""


def pointwise_weight(matrix: Tensor, spatial_axes: int) -> Tensor:
    """A matrix ``(out, in/groups)`` as a convolution weight ``(out, in/groups, 1, …)``."""
    return matrix.reshape(*matrix.shape, *(1,) * spatial_axes)


def relative(residual: float, norm: float) -> float:
    """``residual / norm``, and 0 for a zero kernel, which every factorisation meets exactly."""
    return residual / norm if norm else 0.0
