"""Fewer input channels for linear maps: which channels go, what that loses, and what the others do in their place.

A map ``W (out, d)`` reads ``x`` with the second moment ``H = E[x xᵀ]``; a channel is a block ``S`` of ``d / channels``
columns. Of all maps without a block the best one, whatever the weight ``G`` of the outputs, and what it loses, are

    W − W_S (P_SS)⁻¹ P_S        tr(G W_S (P_SS)⁻¹ W_Sᵀ)        with P = H⁻¹

(optimal brain surgeon: Hassibi & Stork 1993; for groups of columns Kurtic et al. 2022, *The optimal BERT surgeon*). The
same holds for the next block with ``P − P_Sᵀ (P_SS)⁻¹ P_S``: these are the steps of a block Cholesky factorisation of
``P`` whose pivot is the channel that loses least. Losses add up, so one sweep (`eliminate`) has a loss for every number
of channels. Maps that read the same channels share the order: their losses count together.

Updates of whole matrices wait and are made many at a time; channels that are gone leave the matrices then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .eigen import ridged_cholesky, root_of
from .gram import row_gram
from .layout import Factors, Stage, frobenius, from_forward_layout, relative, wide_dtype

RIDGE = 1e-6
"""What is added to the diagonal of a moment before it is inverted, as a share of it."""

_LARGE, _LARGE_RIDGE = 2048, 1e-4
"""Larger moments are swept in float32, with another ridge."""
_WAITING = 96
"""How many columns wait to be taken off the matrices, at least; a sixteenth of them where that is more."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A map that reads channels, in the widest dtype."""

    rows: Tensor  # W (out, d), the columns of a channel side by side
    moment: Tensor  # H (d, d), or its diagonal (d,) where no more of it is known
    outputs: Tensor | None = None  # G (out, out); the identity where None
    factor: float = 1.0  # what its loss counts

    @property
    def scale(self) -> float:
        """Loss of a map without any column."""
        moved = self.rows @ self.moment if self.moment.dim() == 2 else self.rows * self.moment
        weighted = self.rows if self.outputs is None else self.outputs @ self.rows
        return max(float((moved * weighted).sum()), 0.0) * self.factor


@dataclass(frozen=True)
class Elimination:
    """The channels in the order in which they go, and the loss ``losses[n]`` without the first ``n`` of them."""

    channels: int
    order: tuple[int, ...]
    losses: tuple[float, ...]

    def kept(self, count: int) -> tuple[int, ...]:
        """The channels that stay where so many do, in their order."""
        gone = set(self.order[: self.channels - count])
        return tuple(channel for channel in range(self.channels) if channel not in gone)

    def loss(self, count: int) -> float:
        """What is lost where so many channels stay."""
        return self.losses[self.channels - count]


def columns_of(channels: Sequence[int], size: int) -> list[int]:
    """The columns of channels that have so many each, side by side."""
    return [channel * size + i for channel in channels for i in range(size)]


def eliminate(readers: Sequence[Reader], channels: int, least: int = 1) -> Elimination:
    """Takes channels away one by one, each time the one that loses least with the others made to do its work.

    Of ``channels`` at least ``least`` stay.
    """
    sweeps = [_Fixed(r, channels) if r.moment.dim() == 1 else _Sweep(r, channels) for r in readers]
    order, losses = list[int](), [0.0]
    gone = torch.zeros(channels, device="cpu")
    for _ in range(channels - max(least, 1)):
        prices = torch.stack([sweep.losses() for sweep in sweeps]).sum(0) + gone
        channel = int(prices.argmin())
        for sweep in sweeps:
            sweep.remove(channel)
        gone[channel] = torch.inf
        order.append(channel)
        losses.append(losses[-1] + max(float(prices[channel]), 0.0))
    return Elimination(channels, tuple(order), tuple(losses))


class _Fixed:
    """The losses of a map of which only the diagonal of the moment is known: no channel can do another's work."""

    def __init__(self, reader: Reader, channels: int) -> None:
        weighted = reader.rows if reader.outputs is None else reader.outputs @ reader.rows
        each = (weighted * reader.rows).sum(0) * reader.moment
        self._losses = each.reshape(channels, -1).sum(1).cpu() * reader.factor

    def losses(self) -> Tensor:
        """``(channels,)``: what each channel loses."""
        return self._losses

    def remove(self, channel: int) -> None:
        """Nothing else changes."""


class _Sweep:
    """A map whose channels go one by one: ``P = H⁻¹`` and ``V`` with ``VᵀV = Wᵀ G W``, of the channels that stay.

    With ``B = (P_SS)⁻¹ P_S`` the map becomes ``W − W_S B``, so ``V −= V_S B``, and ``P −= LᵀL`` with ``L = chol(P_SS)⁻¹
    P_S``. ``VᵀV`` then loses ``BᵀR + RᵀB``, ``R = V_Sᵀ (V − ½ V_S B)``; its blocks of single channels are kept.
    """

    def __init__(self, reader: Reader, channels: int) -> None:
        self._size, self._factor, self._channels = reader.rows.shape[1] // channels, reader.factor, channels
        large = reader.moment.shape[0] > _LARGE
        unit = _unit(reader.moment.diagonal())
        ridge = _LARGE_RIDGE if large else RIDGE
        inverse = torch.cholesky_inverse(_factor(reader.moment / unit / unit[:, None], ridge))
        values = reader.rows * unit
        if len(values) > values.shape[1]:  # a root of what little they come to
            weighted = values if reader.outputs is None else reader.outputs @ values
            values = root_of(values.mT @ weighted).mT
        elif reader.outputs is not None:
            values = root_of(reader.outputs).mT @ values
        dtype = torch.float32 if large else inverse.dtype
        self._begin(inverse.to(dtype), values.to(dtype), torch.arange(channels, device="cpu"))

    def _begin(self, inverse: Tensor, values: Tensor, left: Tensor) -> None:
        """Takes matrices that are up to date, of the channels that are left."""
        self._inverse, self._values, self._left = inverse, values, left
        self._place = {channel: i for i, channel in enumerate(left.tolist())}
        every = torch.arange(len(left), device="cpu")
        self._own_inverse = inverse.reshape(len(left), self._size, len(left), self._size)[every, :, every]
        self._own_energy = _own(values, values, self._size)
        self._most = max(_WAITING, len(inverse) // 16)
        self._waiting = inverse.new_empty(2, self._most + self._size, len(inverse))  # L and B of `_Sweep`
        self._taken = values.new_empty(len(values), self._most + self._size)  # V_S
        self._count = 0

    def losses(self) -> Tensor:
        """``(channels,)``: what each channel would lose now; any number for those that are gone."""
        if self._size == 1:
            own = self._own_energy[:, 0, 0] / self._own_inverse[:, 0, 0]
        else:
            solved, _ = torch.linalg.solve_ex(self._own_inverse, self._own_energy)
            own = solved.diagonal(dim1=-2, dim2=-1).sum(-1)
        losses = own.new_zeros(self._channels)
        losses[self._left] = own
        return losses.double().cpu() * self._factor

    def remove(self, channel: int) -> None:
        """Takes a channel away; the others take over what they can of its work."""
        place, size, count = self._place.pop(channel), self._size, self._count
        block = slice(place * size, (place + 1) * size)
        left, solved = self._waiting[:, :count]
        taken = self._taken[:, :count]
        inverse = torch.addmm(self._inverse[block], left[:, block].mT, left, alpha=-1)
        values = torch.addmm(self._values[:, block], taken, solved[:, block], alpha=-1)
        energy = torch.addmm(values.mT @ self._values, values.mT @ taken, solved, alpha=-1)
        self._count += size
        self._taken[:, count : self._count] = values
        left, solved = self._waiting[:, count : self._count]
        root, _ = torch.linalg.cholesky_ex(inverse[:, block])
        left.copy_(torch.linalg.solve_triangular(root, inverse, upper=False))
        solved.copy_(torch.linalg.solve_triangular(root.mT, left, upper=True))
        both = _own(solved, energy.addmm_(energy[:, block].clone(), solved, alpha=-0.5), size)
        self._own_inverse = self._own_inverse - _own(left, left, size)
        self._own_energy = self._own_energy - both - both.mT
        self._own_inverse[place] = torch.eye(size, dtype=inverse.dtype, device=inverse.device)
        if self._count >= self._most:
            self._update()

    def _update(self) -> None:
        """Takes what waits off the matrices, and what is gone out of them."""
        places = torch.tensor(list(self._place.values()), dtype=torch.long, device=self._inverse.device)
        left, solved = (self._of(places, each, 1) for each in self._waiting[:, : self._count])
        inverse, values = self._of(places, self._of(places, self._inverse, 0), 1), self._of(places, self._values, 1)
        inverse -= row_gram(left.mT)
        values.addmm_(self._taken[:, : self._count], solved, alpha=-1)
        self._begin(inverse, values, self._left[places.cpu()])

    def _of(self, places: Tensor, matrix: Tensor, axis: int) -> Tensor:
        """The rows or columns of some channels."""
        shape = list(matrix.shape)
        blocks = matrix.reshape(*shape[:axis], -1, self._size, *shape[axis + 1 :])
        return blocks.index_select(axis, places).flatten(axis, axis + 1)


def _unit(squares: Tensor) -> Tensor:
    """The unit of each column of a moment, of its diagonal: there rounding is the same share of every column."""
    return squares.clamp(min=max(float(squares.mean()) * 1e-12, 1e-300)).sqrt()


def _own(first: Tensor, second: Tensor, size: int) -> Tensor:
    """``firstᵀ second`` within each channel: ``(channels, size, size)`` of ``(rows, channels · size)``."""
    each = [m.reshape(len(m), -1, size).transpose(0, 1) for m in (first, second)]
    return each[0].mT @ each[1]


def _factor(moment: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of a moment of unit diagonal."""
    return ridged_cholesky(moment, moment.new_ones(1, 1), ridge, 10)[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class Kept(Factors):
    """A kernel that reads some of its input channels only."""

    kernel: Tensor  # (out, kept, *k) in forward layout
    channels: tuple[int, ...]  # the input channels that it reads
    of: int  # how many there were
    shift: Tensor  # (out,): what the outputs lack on average; for a bias, or a running mean

    def reconstruct(self) -> Tensor:
        whole = self.kernel.new_zeros(self.kernel.shape[0], self.of, *self.kernel.shape[2:])
        whole[:, list(self.channels)] = self.kernel
        return whole

    def stages(self, transposed: bool = False) -> tuple[Stage, ...]:
        axes = tuple(range(self.kernel.dim() - 2))
        return (Stage(from_forward_layout(self.kernel, 1, transposed), 1, transposed, axes),)


def keep(kernel: Tensor, channels: Sequence[int], moment: Tensor | None, mean: Tensor | None) -> Kept:
    """The best kernel of those that read some channels only: ``W H_K (H_KK)⁻¹``.

    Args:
        kernel: ``(out, in, *k)`` in forward layout.
        channels: The input channels that stay.
        moment: ``H (d, d)`` of the patches; the identity where None or ``(d,)``.
        mean: ``(d,)`` of the patches, where what is lost of it can be made up for; None where not.
    """
    size = kernel[0, 0].numel()
    wide = kernel.detach().to(wide_dtype(kernel))
    rows, of = wide.flatten(1), kernel.shape[1]
    columns = torch.tensor(columns_of(channels, size), device=kernel.device)
    stays = rows[:, columns]
    if moment is not None and moment.dim() == 2 and len(channels) < of:
        moment = moment.to(rows)
        unit = _unit(moment.diagonal()[columns])
        normal = moment[columns][:, columns] / unit / unit[:, None]
        others = torch.ones(rows.shape[1], dtype=torch.bool, device=kernel.device)
        others[columns] = False
        cross = rows[:, others] @ moment[others][:, columns] / unit
        stays = stays + torch.cholesky_solve(cross.mT, _factor(normal, RIDGE)).mT / unit
    shift = rows.new_zeros(len(rows)) if mean is None else rows @ mean.to(rows) - stays @ mean.to(rows)[columns]
    shape = (kernel.shape[0], len(channels), *kernel.shape[2:])
    result = Kept(
        groups=1, relative_error=0.0, weighted_error=0.0, kernel=stays.reshape(shape),
        channels=tuple(channels), of=of, shift=shift,
    )  # fmt: skip
    error = relative(frobenius(result.reconstruct() - wide), frobenius(wide))
    return replace(result, relative_error=error, weighted_error=error)
