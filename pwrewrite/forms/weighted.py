"""One layer in the norm of its statistics, and pairs of factors at every rank in that norm.

The norm is ``positions · ½ · tr(G Δ C Δᵀ)``: ``C`` over whole input patches, ``G`` over outputs
(`pwrewrite.planning.statistics`). A pair whose last factor is 1×1 is solved exactly at every rank by one factorisation.
Of any other the first factor comes from a Kronecker approximation of ``C`` (`pwrewrite.decompose.split_moment`), and
the last one is exact (`pwrewrite.decompose.last_factor`), so every loss is one of the full norm.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from math import prod
from typing import TypeVar, cast

import torch
from torch import Tensor

from .. import decompose
from ..core.convolution import ConvSpec
from ..decompose import Nested, PairFactors, Spectrum, solve_last
from ..decompose.eigen import root_of
from ..decompose.weighting import Weight

_T = TypeVar("_T")


class WeightedLayer:
    """A layer's kernel in the norm of its statistics.

    Args:
        weight: The layer's weight, in the module's own layout.
        spec: The layer.
        inputs: ``C (groups, d, d)`` over patches (over channels where transposed); the identity where None, in which
            norm every form is factorised exactly, up to HOOI.
        gradients: ``G (groups, o, o)``; the identity where None.
        positions: Positions per sample.
        multiple: What ranks are rounded to; None for 8 where the channels are 64 or more.
    """

    scale: float
    """The loss of an all-zero kernel."""

    def __init__(
        self,
        weight: Tensor,
        spec: ConvSpec,
        inputs: Tensor | None,
        gradients: Tensor | None,
        positions: float = 1.0,
        multiple: int | None = None,
    ) -> None:
        self.spec, self.multiple = spec, multiple
        wide = torch.float32 if weight.device.type == "mps" else torch.float64
        self.kernel = decompose.to_forward_layout(weight.detach(), spec.groups, spec.transposed).to(wide)
        self.spatial = tuple(self.kernel.shape[2:])
        self.rows = self.kernel.reshape(spec.groups, self.kernel.shape[0] // spec.groups, -1)  # (g, out/g, patch)
        taps, device = prod(self.spatial), self.kernel.device
        if inputs is not None and taps > 1 and inputs.shape[-1] * taps == self.rows.shape[2]:
            eye = torch.eye(taps, dtype=wide, device=device)  # transposed: the same moment under every tap
            inputs = torch.stack([torch.kron(moment.to(wide), eye) for moment in inputs])
        self.inputs = None if inputs is None else inputs.to(device=device, dtype=wide)
        self.gradients = None if gradients is None else gradients.to(device=device, dtype=wide)
        self.factor = positions / 2
        self._take(self.rows)
        self._cache: dict[Hashable, object] = {}

    def normalise(self, scale: float) -> None:
        """Changes the unit of the loss, so that an all-zero kernel loses ``scale``."""
        if self.scale > 0:
            self.factor *= scale / self.scale
            self.scale = scale

    def with_kernel(self, rows: Tensor) -> WeightedLayer:
        """The same norm of another kernel ``(groups, out/groups, patch)``."""
        other = self.bare()
        other.kernel = rows.reshape(self.kernel.shape)
        other._take(rows)
        return other

    def _take(self, rows: Tensor) -> None:
        self.rows = rows
        self.moved = self._moved(rows)  # W C
        self.scale = max(self._inner(self.moved, rows) * self.factor, 0.0)

    def bare(self) -> WeightedLayer:
        """The same layer without what forms have made of it."""
        other = copy(self)
        other._cache = {}
        return other

    def once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What a form makes of this layer, made when it is first asked for."""
        if key not in self._cache:
            self._cache[key] = make()
        return cast(_T, self._cache[key])

    def error(self, loss: float) -> float:
        """A loss as a relative error in the norm."""
        return (max(loss, 0.0) / self.scale) ** 0.5 if self.scale > 0 else 0.0

    def loss_of(self, delta: Tensor) -> float:
        """The loss of a change of the kernel, in forward layout."""
        rows = delta.reshape(self.rows.shape).to(self.rows)
        return max(self._inner(self._moved(rows), rows) * self.factor, 0.0)

    def _moved(self, rows: Tensor) -> Tensor:
        return rows if self.inputs is None else rows @ self.inputs

    def _inner(self, first: Tensor, second: Tensor) -> float:
        """``tr(G A Bᵀ)`` over the groups, for two of ``(groups, out/groups, patch)``."""
        return float(((first if self.gradients is None else self.gradients @ first) * second).sum())

    def gradient_root(self) -> Tensor | None:
        """Some ``R`` with ``G = R Rᵀ``; None where ``G`` is the identity."""
        if self.gradients is None:
            return None
        return root_of(self.gradients)

    def sides(self, axes: Sequence[int]) -> tuple[Tensor | None, Weight | None, bool]:
        """The weights of the channels with some axes, and of the outputs with the others; and whether that is exact."""
        if self.inputs is None:
            return None, self.gradients, True
        if all(axis in axes or size == 1 for axis, size in enumerate(self.spatial)):
            return self.inputs, self.gradients, True
        near, far = decompose.split_moment(self.inputs, self.kernel.shape[1], self.spatial, axes)
        if self.gradients is not None:
            return near, (self.gradients, far), False
        eye = torch.eye(self.rows.shape[1], dtype=far.dtype, device=far.device)
        return near, (eye.expand(len(far), -1, -1), far), False


class Cuts:
    """Pairs of factors of a layer at every rank up to ``max_rank``, in the norm of its statistics.

    ``exact`` says that the norm of the spectrum is that of the layer, so that its factors are the best.
    """

    def __init__(self, layer: WeightedLayer, spectrum: Spectrum[PairFactors], exact: bool) -> None:
        # A layer holds its cuts: if they held it too, its moments would wait for the garbage collector.
        self._layer, self._spectrum, self._exact = layer.bare(), spectrum, exact
        self._nested: Nested | None = None
        self.truncate = spectrum.truncate
        self.max_rank = spectrum.max_rank

    def losses(self, ranks: Sequence[int]) -> list[float]:
        """The loss at some ranks."""
        layer = self._layer
        if self._exact:
            return [float(self._spectrum.losses[rank]) * layer.factor for rank in ranks]
        below = [rank for rank in ranks if rank < self.max_rank]
        explained = self.nested(max(below)).explained(layer.gradients) if below else layer.rows.new_zeros(0)
        return [
            layer.scale - float(explained[rank]) * layer.factor if rank < min(len(explained), self.max_rank) else 0.0
            for rank in ranks
        ]

    def factors(self, rank: int) -> PairFactors:
        """The factors of one rank, the last one exact."""
        factors = self._spectrum.truncate(rank)
        if self._exact or self._layer.scale == 0:
            return factors
        return self.solved(factors)[0]

    def solved(self, factors: PairFactors) -> tuple[PairFactors, Tensor]:
        """Factors with the best last one for their first, and the moment of what it reads."""
        layer = self._layer
        assert layer.inputs is not None
        normal, cross = factors.normal(layer.inputs, layer.spatial), factors.inner(layer.moved.mT, layer.spatial)
        return factors.with_last(solve_last(normal, cross.mT, towards=factors.last_matrix())), normal

    def nested(self, rank: int) -> Nested:
        """The pairs at every rank up to one in the layer's norm."""
        layer = self._layer
        assert layer.inputs is not None
        if self._nested is None or self._nested.rank < rank:
            first = self._spectrum.right_basis(rank)
            factors = self._spectrum.with_right(first)
            self._nested = Nested(factors, first.shape[1], layer.moved, layer.inputs, layer.spatial)
        return self._nested
