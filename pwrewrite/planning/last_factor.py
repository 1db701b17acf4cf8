"""The last factor of a chain, solved exactly in the norm of the whole patch.

Every form is a chain ``Ŵ = F · M``: ``M (inner, patch)`` is all stages but the last, ``F (out, inner)`` the last one as
a matrix over what it reads at one output position. Given ``M``, a second moment ``C`` of the patches and the kernel
``W``, the best ``F`` is linear least squares,

    F = W C Mᵀ (M C Mᵀ)⁻¹,

whatever the weight of the outputs, since ``F`` has rows of its own for each output. `pwrewrite.decompose` finds all
factors in a Kronecker approximation of ``C`` where a form needs one; this takes the last of them to the full norm.

Of the forms::

    expand, pair    M = core (rank, in·k)                F = expand (out, rank)
    bottleneck      M = core · reduce (rank_out, in·k)   F = expand (out, rank_out)
    reduce          M = reduce ⊗ 1 (rank·k, in·k)        F = core (out, rank·k)
    spatial         M = first ⊗ 1 (rank·b, in·a·b)       F = second (out, rank·b)
    depthwise       M = filters (in·terms, in·k)         F = pointwise (out, in·terms)

All of it per group, with a leading group axis. The rows of ``M`` are channel first, as patches are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..decompose import Depthwise, Expansion, Factors, LowRank, Reduction, Spatial, Tucker2

RIDGE = 1e-9
"""What is added to the diagonal of a normal matrix, as a share of its mean diagonal, before it is solved."""


class Inner:
    """All stages of a chain but the last, as a linear map of patches.

    Args:
        factors: The chain.
        spatial: The kernel's spatial sizes.

    Attributes:
        size: Rows of the map, per group.
    """

    def __init__(self, factors: Factors, spatial: tuple[int, ...]) -> None:
        self.factors, self.spatial, self.groups = factors, spatial, factors.groups
        self._multiply, self.size = self._map()

    def multiply(self, patches: Tensor) -> Tensor:
        """``M · patches``.

        Args:
            patches: ``(groups, patch, columns)``.

        Returns:
            ``(groups, size, columns)``.
        """
        return self._multiply(patches)

    def normal(self, moment: Tensor) -> tuple[Tensor, Tensor]:
        """``M C`` and ``M C Mᵀ``.

        Args:
            moment: ``C (groups, patch, patch)``, symmetric.
        """
        half = self.multiply(moment)
        whole = self.multiply(half.mT)
        return half, (whole + whole.mT) / 2

    def _map(self) -> tuple[Callable[[Tensor], Tensor], int]:
        factors, groups = self.factors, self.groups
        taps = prod(self.spatial)
        if isinstance(factors, (Expansion, LowRank)):
            first = factors.core if isinstance(factors, Expansion) else factors.reduce
            dense = first.reshape(groups, factors.rank, -1)
            return lambda x: dense.to(x) @ x, factors.rank
        if isinstance(factors, Tucker2):
            core = factors.core.reshape(groups, factors.rank_out, factors.rank_in, taps)
            reduce = factors.reduce.reshape(groups, factors.rank_in, -1)
            dense = torch.einsum("gait,gij->gajt", core, reduce).reshape(groups, factors.rank_out, -1)
            return lambda x: dense.to(x) @ x, factors.rank_out
        if isinstance(factors, Reduction):
            reduce = factors.reduce.reshape(groups, factors.rank, -1)

            def reduced(x: Tensor) -> Tensor:
                columns = x.shape[-1]
                return (reduce.to(x) @ x.reshape(groups, -1, taps * columns)).reshape(groups, -1, columns)

            return reduced, factors.rank * taps
        if isinstance(factors, Spatial):
            return self._spatial(factors)
        assert isinstance(factors, Depthwise)
        return self._depthwise(factors)

    def _spatial(self, factors: Spatial) -> tuple[Callable[[Tensor], Tensor], int]:
        groups, rank, dims = self.groups, factors.rank, len(self.spatial)
        first = factors.first.reshape(groups, rank, -1)
        own, others = factors.first_axes, factors.second_axes
        apart = prod(self.spatial[axis] for axis in others)

        def separated(x: Tensor) -> Tensor:
            columns = x.shape[-1]
            cube = x.reshape(groups, -1, *self.spatial, columns)
            order = [0, 1, *(2 + a for a in own), *(2 + a for a in others), 2 + dims]
            rows = cube.permute(order).reshape(groups, first.shape[2], apart * columns)
            return (first.to(x) @ rows).reshape(groups, rank * apart, columns)

        return separated, rank * apart

    def _depthwise(self, factors: Depthwise) -> tuple[Callable[[Tensor], Tensor], int]:
        groups, taps = self.groups, prod(self.spatial)
        filters = factors.depthwise.reshape(-1, factors.terms, taps)  # (in, terms, taps)
        channels = filters.shape[0] // groups

        def filtered(x: Tensor) -> Tensor:
            columns = x.shape[-1]
            rows = filters.to(x) @ x.reshape(groups * channels, taps, columns)
            return rows.reshape(groups, channels * factors.terms, columns)

        return filtered, channels * factors.terms


def last_matrix(factors: Factors) -> Tensor:
    """The last stage as ``(groups, out/groups, inner)``."""
    name = _last_name(factors)
    weight: Tensor = getattr(factors, name)
    return weight.reshape(factors.groups, weight.shape[0] // factors.groups, -1)


def with_last(factors: Factors, matrix: Tensor) -> Factors:
    """The chain with another last stage ``(groups, out/groups, inner)``; its errors are no longer known."""
    name = _last_name(factors)
    weight: Tensor = getattr(factors, name)
    changed: dict[str, Any] = {name: matrix.reshape(weight.shape).to(weight)}
    return replace(factors, **changed, relative_error=float("nan"), weighted_error=float("nan"))


def solve_last(normal: Tensor, cross: Tensor, *, ridge: float = RIDGE, towards: Tensor | None = None) -> Tensor:
    """The least-squares last factor.

    Args:
        normal: ``M C Mᵀ (groups, inner, inner)``.
        cross: ``W C Mᵀ (groups, out, inner)``, or the measured cross moment of outputs and inner values.
        ridge: Regularisation, as a share of the mean diagonal of ``normal``.
        towards: What the solution is drawn to, ``(groups, out, inner)``; to zero where None.

    Returns:
        ``F (groups, out, inner)``.
    """
    level = normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-300)[:, None, None] * ridge
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    right = cross if towards is None else cross + level * towards
    factor, bad = torch.linalg.cholesky_ex(normal + level * eye)
    if not bool(bad.any()):
        return torch.cholesky_solve(right.mT, factor).mT
    values, vectors = torch.linalg.eigh(normal)
    floor = values[..., -1:].clamp(min=0) * max(ridge, 1e-10)
    inverse = torch.where(values > floor, 1 / values, torch.zeros_like(values))
    solved: Tensor = ((right @ vectors) * inverse[..., None, :]) @ vectors.mT
    return solved


def _last_name(factors: Factors) -> str:
    if isinstance(factors, (Expansion, LowRank, Tucker2)):
        return "expand"
    if isinstance(factors, Reduction):
        return "core"
    return "second" if isinstance(factors, Spatial) else "pointwise"
