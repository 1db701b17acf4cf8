"""One 1×1 reduction for several layers that read the same map, in the norm of their statistics: `SharedCuts`.

``W_j (out·k, in)`` is a reader's kernel, unfolded, ``H`` the second moment of the map's channels, ``G_j`` that of the
gradients at its outputs, ``B_j`` that of its taps. Where its patches have the moment ``H ⊗ B_j``, the readers together
lose least, at every rank, with the reduction whose rows span the first right singular vectors of

    [ √n_j (G_j ⊗ B_j)^½ W_j ]_j  H^½        one reader below the other; n_j their positions

(Eckart & Young 1936). It is made orthonormal, and the core of each reader is then solved exactly in the norm of its
patches, whose loss is exact, too (`pwrewrite.decompose.last_factor`). At rank ``min(in, Σ out·k)`` all of it is exact.

A core may be cut once more, over its outputs, into a narrower core and a 1×1: the form `expand` of the core, in the
norm of what the core reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import prod

import torch
from torch import Tensor

from ..decompose import AxisSplit, Nested, solve_last, split_spectrum
from ..decompose.weighting import SideWeight
from .expand import FORM as EXPAND
from .weighted import WeightedLayer


@dataclass(frozen=True, eq=False, kw_only=True)
class SharedFactors(AxisSplit):
    """A reduction ``first (rank, in)`` and the cores of its readers, one below the other: ``second (Σ out·k, rank)``.

    Attributes:
        sizes: ``(out, *k)`` of every reader.
        shifts: For every reader what its outputs lack on average ``(out,)``, for a bias; None where nothing makes up.
    """

    sizes: tuple[tuple[int, ...], ...]
    shifts: tuple[Tensor | None, ...]

    def cores(self) -> list[Tensor]:
        """The kernel ``(out, rank, *k)`` of every core."""
        rows = torch.split(self.second, [prod(size) for size in self.sizes])
        return [core.reshape(*size, self.rank).movedim(-1, 1) for core, size in zip(rows, self.sizes)]

    def kernels(self) -> list[Tensor]:
        """The kernels ``(out, in, *k)`` that the chains stand for."""
        return [_product(core, self.first) for core in self.cores()]


class SharedCuts:
    """One reduction and its readers' cores at every rank up to ``max_rank``, in the norm of the readers' statistics.

    Args:
        layers: The readers: plain convolutions of one group.
    """

    def __init__(self, layers: Sequence[WeightedLayer]) -> None:
        self._layers = layers
        channels, rows, moment = layers[0].kernel.shape[1], list[Tensor](), layers[0].kernel.new_zeros(())
        for layer in layers:
            near, outputs, _ = layer.sides(())
            near = torch.eye(channels, device="cpu").to(layer.kernel) if near is None else near[0]
            level = near.diagonal().mean().clamp(min=1e-300)
            moment = moment + near / level
            taps = outputs[1] if isinstance(outputs, tuple) else None
            rows.append((layer.factor * level).sqrt() * _weighted(layer, taps))
        self._spectrum = split_spectrum(torch.cat(rows), input_weight=moment / len(layers))
        self.max_rank = self._spectrum.max_rank

    def losses(self, ranks: Sequence[int]) -> list[list[Tensor]]:
        """At each of some ranks what every reader loses with 0, 1, … channels between its core and a 1×1 behind that.

        ``(out + 1,)``: the last is what it loses without such a 1×1.
        """
        basis, roots = self._basis(max(ranks)), [layer.gradient_root() for layer in self._layers]
        nested = [
            Nested(_pair(layer, basis), len(basis), layer.moved, layer.inputs, layer.spatial) for layer in self._layers
        ]
        curves = []
        for rank in ranks:
            explained = [each.explained_cut(rank, root) for each, root in zip(nested, roots)]
            losses = [(y.scale - each * y.factor).clamp(min=0) for y, each in zip(self._layers, explained)]
            for loss in losses if rank == self.max_rank else ():
                loss[-1] = 0
            curves.append(losses)
        return curves

    def factors(self, rank: int, widths: Sequence[int | None] = ()) -> SharedFactors:
        """The factors at one rank; cores are of some rank over their outputs where that is not None."""
        basis = self._basis(rank)
        cores = [self._core(layer, basis, width) for layer, width in zip_longest(self._layers, widths)]
        deltas = [layer.kernel - _product(core, basis) for layer, core in zip(self._layers, cores)]
        whole = sum(float(layer.kernel.square().sum()) for layer in self._layers)
        lost, scale = (sum(values) for values in zip(*((y.loss_of(d), y.scale) for y, d in zip(self._layers, deltas))))
        return SharedFactors(
            first=basis,
            second=torch.cat([_unfolded(core) for core in cores]),
            first_axes=(),
            groups=1,
            relative_error=(sum(float(d.square().sum()) for d in deltas) / whole) ** 0.5 if whole else 0.0,
            weighted_error=(lost / scale) ** 0.5 if scale > 0 else 0.0,
            sizes=tuple((layer.kernel.shape[0], *layer.spatial) for layer in self._layers),
            shifts=(None,) * len(cores),
        )

    def _core(self, layer: WeightedLayer, basis: Tensor, width: int | None) -> Tensor:
        """The core of a reader, ``(out, rank, *k)``."""
        factors, normal = _pair(layer, basis), None
        core = factors.second
        if layer.inputs is not None:
            normal, cross = factors.normal(layer.inputs, layer.spatial), factors.inner(layer.moved.mT, layer.spatial)
            if layer.scale > 0 and len(basis) < self.max_rank:
                core = solve_last(normal, cross.mT, towards=factors.last_matrix()).reshape(core.shape)
        if width is None:
            return core
        spec = replace(layer.spec, in_channels=len(basis))
        behind = WeightedLayer(core, spec, normal, layer.gradients, 2 * layer.factor)
        return EXPAND.fit(behind, {EXPAND.widths[0]: width}).reconstruct()

    def _basis(self, rank: int) -> Tensor:
        """The reduction ``(rank, in)`` with orthonormal rows; the first ones are those of smaller ranks."""
        return self._spectrum.right_basis(rank)[0]


def _unfolded(kernel: Tensor) -> Tensor:
    """A kernel ``(out, in, *k)`` as ``(out·k, in)``."""
    return kernel.flatten(2).movedim(1, -1).flatten(0, 1) if kernel.dim() > 2 else kernel


def _weighted(layer: WeightedLayer, taps: Tensor | None) -> Tensor:
    """A kernel as ``(out·k, in)`` times a root of the weight of its outputs, and of its taps where they have one."""
    apart, root = _unfolded(layer.kernel).reshape(layer.kernel.shape[0], prod(layer.spatial), -1), layer.gradient_root()
    if taps is not None:
        apart = SideWeight(taps, 1).roots()[0][0] @ apart
    return (apart if root is None else torch.einsum("po,pki->oki", root[0], apart)).flatten(0, 1)


def _product(core: Tensor, basis: Tensor) -> Tensor:
    return torch.einsum("or...,ri->oi...", core, basis)


def _pair(layer: WeightedLayer, basis: Tensor) -> AxisSplit:
    """A reduction and the core that is nearest to a reader without any norm."""
    ones = (1,) * len(layer.spatial)
    second = torch.einsum("oi...,ri->or...", layer.kernel, basis)
    first = basis.reshape(*basis.shape, *ones)
    return AxisSplit(
        first=first, second=second, first_axes=(), groups=1, relative_error=math.nan, weighted_error=math.nan
    )
