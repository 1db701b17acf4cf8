"""Weights of the norm that a decomposition minimises, and their roots.

The forms minimise ``‖G^½ (W − Ŵ) C^½‖_F`` where ``G (out, out)`` and ``C (in·k, in·k)`` are second moments of the
gradient at the convolution's output and of its input patches: to second order the change of the loss (Hassibi & Stork
1993; the Kronecker form is that of Martens & Grosse 2015). Without weights both are the identity.

Axes are flattened channel first, as `torch.nn.functional.unfold` does. For each side of a matricisation with axes
``(channels, *rest)`` a weight is over all of it, or over the channels only and then stands for ``weight ⊗ identity``.
Grouped, it is a stack ``(groups, d, d)``, or one matrix over all groups, of which the diagonal blocks are taken.

Weights may be singular: a root floors the eigenvalues at `EIGENVALUE_FLOOR` times the largest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import UsageError
from .eigen import symmetric_eigen
from .layout import check_finite, frobenius, wide_dtype

#: Eigenvalues of a weight below this share of the largest count as this share: the root then has a condition number
#: of at most 1e4, which float64 carries to about 1e-12.
EIGENVALUE_FLOOR = 1e-8


@dataclass(frozen=True, eq=False)
class SideWeight:
    """A weight on one side of a stack of matrices: ``matrix (groups, d, d) ⊗ identity(repeat)``, symmetric."""

    matrix: Tensor
    repeat: int

    def multiply(self, rows: Tensor) -> Tensor:
        """The weight times ``rows (groups, d·repeat, columns)``."""
        return kronecker_multiply(self.matrix, rows)

    def roots(self) -> tuple[Tensor, Tensor]:
        """The symmetric root and its inverse, eigenvalues floored; `UsageError` where one is clearly negative."""
        values, vectors = symmetric_eigen(self.matrix)
        top = values[..., -1:]
        if bool((values[..., :1] < -1e-4 * top.abs() - torch.finfo(torch.float32).tiny).any()):
            got = f"smallest eigenvalue {float(values.min()):.3g}, largest {float(values.max()):.3g}"
            raise UsageError("a weight is not positive semi-definite", expected="a matrix of second moments", got=got)
        floor = torch.where(top > 0, top * EIGENVALUE_FLOOR, torch.ones_like(top))
        root = torch.maximum(values, floor).sqrt()
        return (vectors * root.unsqueeze(-2)) @ vectors.mT, (vectors / root.unsqueeze(-2)) @ vectors.mT


@dataclass(frozen=True, eq=False)
class ProductWeight(SideWeight):
    """A weight ``matrix ⊗ inner``, kept as its two parts; ``inner`` is ``(groups, repeat, repeat)``."""

    inner: Tensor

    def multiply(self, rows: Tensor) -> Tensor:
        groups, size, columns = rows.shape
        inside = self.inner[:, None] @ rows.reshape(groups, -1, self.repeat, columns)
        return kronecker_multiply(self.matrix, inside.reshape(groups, size, columns))

    def roots(self) -> tuple[Tensor, Tensor]:
        outer, inner = SideWeight(self.matrix, 1).roots(), SideWeight(self.inner, 1).roots()
        first, second = (torch.stack([torch.kron(a, b) for a, b in zip(*pair)]) for pair in zip(outer, inner))
        return first, second


@dataclass(frozen=True, eq=False)
class RepeatedWeight(SideWeight):
    """A weight of which every matrix is that of ``times`` matrices of the stack in turn."""

    times: int

    def multiply(self, rows: Tensor) -> Tensor:
        stack, size, columns = rows.shape
        apart = rows.reshape(stack // self.times, self.times, size, columns).transpose(1, 2)
        return SideWeight.multiply(self, apart.flatten(2)).reshape(apart.shape).transpose(1, 2).reshape(rows.shape)

    def roots(self) -> tuple[Tensor, Tensor]:
        root, inverse = SideWeight.roots(self)
        return root.repeat_interleave(self.times, 0), inverse.repeat_interleave(self.times, 0)


def kronecker_multiply(matrix: Tensor, rows: Tensor) -> Tensor:
    """``(matrix ⊗ identity) @ rows`` without forming it; ``rows (groups, side, n)``."""
    *batch, size, columns = rows.shape
    inner = matrix.shape[-1]
    return (matrix @ rows.reshape(*batch, inner, size // inner * columns)).reshape(*batch, size, columns)


Weight = Tensor | SideWeight | tuple[Tensor, Tensor]
"""A weight of a side, one that was checked before, or ``(A, B)`` for ``A ⊗ B`` over its channels and the rest."""


def side_weight(
    weight: Weight | None, groups: int, channels: int, rest: int, like: Tensor, name: str
) -> SideWeight | None:
    """Checks the weight ``name`` and brings it to a stack in the widest dtype, on the device of ``like``.

    It is ``(d, d)`` over the channels of all groups, or ``(groups, d, d)``; a pair of stacks over the channels and the
    rest for their product; None for the identity. There are so many ``channels`` per group on this side, and ``rest``
    is the product of its other axes.
    """
    if weight is None or isinstance(weight, SideWeight):
        return weight
    if isinstance(weight, tuple):
        outer = side_weight(weight[0], groups, channels, 1, like, name)
        inner = side_weight(weight[1], groups, rest, 1, like, name)
        assert outer is not None and inner is not None  # noqa: PT018
        return ProductWeight(outer.matrix, rest, inner.matrix)
    weight = weight.detach().to(device=like.device, dtype=wide_dtype(like))
    sizes = (channels, channels * rest)
    stacked = weight
    if weight.dim() == 2 and weight.shape[0] == weight.shape[1] and weight.shape[0] % groups == 0:
        size = weight.shape[0] // groups
        stacked = weight.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    if tuple(stacked.shape) not in [(groups, size, size) for size in sizes]:
        shapes = " or ".join(str((groups * size, groups * size)) for size in dict.fromkeys(sizes))
        stacks = " or ".join(str((groups, size, size)) for size in dict.fromkeys(sizes))
        shape = tuple(weight.shape)
        expected = f"{shapes}, or a stack {stacks}"
        raise UsageError(f"{name} of shape {shape} does not fit the kernel", expected=expected, got=str(shape))
    check_finite(frobenius(stacked), stacked, name)
    return SideWeight((stacked + stacked.mT) / 2, channels * rest // stacked.shape[1])


def split_moment(moment: Tensor, channels: int, spatial: Sequence[int], axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The Kronecker approximation of an input moment over the axes that stay near the input and those that do not.

    Both parts are partial traces, ``A = tr_B(C)`` and ``B = tr_A(C) / tr(C)``, so ``A ⊗ B`` has the trace of ``C``. For
    `split_spectrum` with the same ``axes``, ``A`` is the ``input_weight`` and ``(G, B)`` the ``output_weight``.

    Args:
        moment: ``(in·k, in·k)`` or a stack ``(groups, in/groups·k, in/groups·k)``, channel first.
        channels: Channels per matrix (per group for a stack).
        spatial: The spatial sizes ``k``.
        axes: The spatial axes that stay with the channels.
    """
    size = channels * math.prod(spatial)
    if moment.shape[-2:] != (size, size):
        over = f"{channels} channels and {tuple(spatial)}"
        raise UsageError(f"a moment of shape {tuple(moment.shape)} is not over {over}")
    batch = moment.shape[:-2]
    near = [0] + [1 + axis for axis in axes]
    far = [1 + axis for axis in range(len(spatial)) if axis not in axes]
    shape = (channels, *spatial)
    stack = moment.reshape(-1, *shape, *shape)
    a, b = math.prod(shape[axis] for axis in near), math.prod(shape[axis] for axis in far)
    near_part = _traced(stack, far, len(shape)).reshape(-1, a, a)
    far_part = _traced(stack, near, len(shape)).reshape(-1, b, b)
    trace = near_part.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    far_part = torch.where(trace > 0, far_part / trace, torch.eye(b, dtype=moment.dtype, device=moment.device) / b)
    return near_part.reshape(*batch, a, a), far_part.reshape(*batch, b, b)


def _traced(stack: Tensor, axes: Sequence[int], dims: int) -> Tensor:
    """The trace over some of the axes of both sides of ``(groups, *shape, *shape)``, the last of them first."""
    for axis in sorted(axes, reverse=True):
        stack = stack.diagonal(dim1=1 + axis, dim2=1 + dims + axis).sum(-1)
        dims -= 1
    return stack
