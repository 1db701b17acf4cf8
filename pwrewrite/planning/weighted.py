"""One layer in the norm of its statistics: the loss of every form at a ladder of ranks, and the factors behind it.

The norm is ``positions · ½ · tr(G Δ C Δᵀ)``: ``C`` over whole input patches, ``G`` over outputs
(`pwrewrite.planning.statistics`). In it

* ``expand`` and ``pair`` are solved exactly at every rank by one factorisation;
* ``reduce``, ``spatial`` and ``depthwise`` take their first factor from a Kronecker approximation of ``C`` (partial
  traces, `pwrewrite.decompose.split_moment`), and their last one exactly (`pwrewrite.planning.last_factor`);
* ``bottleneck`` takes its reduction from there too. Given that, core and expansion are again one exact factorisation:
  the best core for the reduced patches, then the best cut of it in their moment. The two errors add up, since the
  first is orthogonal to what the reduced patches can express.

So every loss is one of the full norm, whatever approximation the factors came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from .. import decompose
from ..core.convolution import ConvSpec
from ..decompose import Factors, Reduction, Tucker2, default_multiple
from ..decompose.weighting import Weight
from ..forms import default_axes, rank_limits
from .last_factor import Inner, last_matrix, solve_last, with_last
from .nested import Nested

LADDER = 24
"""At most this many ranks of a form are looked at."""

_CORNERS = 8
"""At most this many input widths of a bottleneck."""


@dataclass(frozen=True, slots=True)
class Rung:
    """A form at some widths, and what it loses.

    Attributes:
        form: One of `pwrewrite.forms.FORMS`.
        widths: Its widths, per group.
        axes: For ``spatial``: the axes of the first stage.
        loss: Predicted loss, ``½ · positions · tr(G Δ C Δᵀ)``.
        error: Relative error in that norm, ``√(loss / loss of an all-zero kernel)``.
    """

    form: str
    widths: Mapping[str, int]
    axes: tuple[int, ...] | None
    loss: float
    error: float


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

    Attributes:
        scale: Loss of an all-zero kernel.
    """

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
        groups, taps = spec.groups, prod(self.spatial)
        self.rows = self.kernel.reshape(groups, self.kernel.shape[0] // groups, -1)
        size = self.rows.shape[2]
        device = self.kernel.device
        if (
            inputs is not None and inputs.shape[-1] * taps == size and taps > 1
        ):  # transposed: the same moment under every tap
            eye = torch.eye(taps, dtype=wide, device=device)
            inputs = torch.stack([torch.kron(one.to(wide), eye) for one in inputs])
        self.inputs = None if inputs is None else inputs.to(device=device, dtype=wide)
        self.gradients = None if gradients is None else gradients.to(device=device, dtype=wide)
        self.factor = positions / 2
        self.scale = 0.0
        self.scale = self.loss_of(self.kernel)
        self._spectra: dict[tuple[str, tuple[int, ...] | None], decompose.Spectrum[Factors]] = {}
        self._reduced_ranks: Nested | None = None
        self._tucker_made: decompose.Tucker2Spectrum | None = None
        self._reductions: dict[int, tuple[Reduction, decompose.Spectrum[decompose.Expansion], float]] = {}

    def normalise(self, scale: float) -> None:
        """Changes the unit of the loss, so that an all-zero kernel loses ``scale``."""
        if self.scale > 0:
            self.factor *= scale / self.scale
            self.scale = scale

    # ------------------------------------------------------------------------------------------- ladders

    def rungs(self, form: str, worth: Callable[[str, Mapping[str, int], tuple[int, ...] | None], bool]) -> list[Rung]:
        """A form at a ladder of ranks.

        Args:
            form: The form.
            worth: Whether some widths are worth a look, such as whether they cost less than the layer.
        """
        if form == "bottleneck":
            return self._bottlenecks(worth)
        found = []
        for axes in self._splits() if form == "spatial" else (None,):
            (name,) = rank_limits(self.spec, form, axes)
            limit = rank_limits(self.spec, form, axes)[name]
            ranks = [r for r in ladder(limit, self.multiple) if worth(form, {name: r}, axes)]
            losses = self._losses(form, axes, ranks) if ranks else []
            found += [self._rung(form, {name: rank}, axes, loss) for rank, loss in zip(ranks, losses)]
        return found

    def factors(self, form: str, widths: Mapping[str, int], axes: Sequence[int] | None = None) -> Factors:
        """The weights of a form, in the compute dtype, its last factor exact in the full norm."""
        if form == "bottleneck":
            made: Factors = self._bottleneck(widths["rank_in"], widths["rank_out"])
        else:
            made = self._truncate(form, None if axes is None else tuple(axes), widths)
            if form not in ("expand", "pair") and self.scale > 0 and self.inputs is not None:
                half, normal = Inner(made, self.spatial).normal(self.inputs)
                made = with_last(made, solve_last(normal, self.rows @ half.mT, towards=last_matrix(made)))
        delta = self.kernel - made.reconstruct().reshape(self.kernel.shape)
        norm = float(self.kernel.norm())
        loss = self.loss_of(delta)
        return replace(
            made,
            relative_error=float(delta.norm()) / norm if norm else 0.0,
            weighted_error=(loss / self.scale) ** 0.5 if self.scale > 0 else 0.0,
        )

    def loss_of(self, delta: Tensor) -> float:
        """The loss of a change of the kernel, in forward layout."""
        rows = delta.reshape(self.rows.shape).to(self.rows)
        moved = rows if self.inputs is None else rows @ self.inputs
        return max(self._trace(moved @ rows.mT) * self.factor, 0.0)

    def _rung(self, form: str, widths: Mapping[str, int], axes: tuple[int, ...] | None, loss: float) -> Rung:
        loss = max(loss, 0.0)
        return Rung(form, dict(widths), axes, loss, (loss / self.scale) ** 0.5 if self.scale > 0 else 0.0)

    def _trace(self, square: Tensor) -> float:
        """``tr(G X)`` over the groups."""
        if self.gradients is None:
            return float(square.diagonal(dim1=-2, dim2=-1).sum())
        return float((self.gradients * square.mT).sum())

    def _splits(self) -> list[tuple[int, ...] | None]:
        """The ways to split the spatial axes that have an extent."""
        extended = [axis for axis, size in enumerate(self.spatial) if size > 1]
        if len(extended) < 2:
            return []
        splits: list[tuple[int, ...] | None] = [default_axes(self.spec)]
        for count in range(1, len(extended)):
            splits += [axes for axes in combinations(extended, count) if axes not in splits]
        return splits

    # ------------------------------------------------------------------------------------- one-rank forms

    def _truncate(self, form: str, axes: tuple[int, ...] | None, widths: Mapping[str, int]) -> Factors:
        spectrum = self._spectrum(form, axes)
        (rank,) = widths.values()
        made: Factors = spectrum.truncate(rank)
        return made

    def _spectrum(self, form: str, axes: tuple[int, ...] | None) -> decompose.Spectrum[Factors]:
        key = (form, axes)
        if key not in self._spectra:
            self._spectra[key] = self._make_spectrum(form, axes)
        return self._spectra[key]

    def _make_spectrum(self, form: str, axes: tuple[int, ...] | None) -> decompose.Spectrum[Factors]:
        groups, channels = self.spec.groups, self.kernel.shape[1]
        kernel, gradients = self.kernel, self.gradients
        made: decompose.Spectrum[Factors]
        if form == "pair":
            made = decompose.low_rank_spectrum(kernel, groups, self.inputs, gradients)  # type: ignore[assignment]
        elif form == "expand":
            made = decompose.expansion_spectrum(kernel, groups, self.inputs, gradients)  # type: ignore[assignment]
        elif form == "depthwise":
            made = decompose.depthwise_spectrum(kernel, groups, self.inputs, gradients)  # type: ignore[assignment]
        else:
            near, outputs = self._sides(channels, axes)
            if form == "reduce":
                made = decompose.reduction_spectrum(kernel, groups, near, outputs)  # type: ignore[assignment]
            else:
                assert axes is not None
                made = decompose.spatial_spectrum(kernel, groups, axes, near, outputs)  # type: ignore[assignment]
        return made

    def _sides(self, channels: int, axes: tuple[int, ...] | None) -> tuple[Tensor | None, Weight | None]:
        """The weights of what stays near the input and of the rest, a Kronecker approximation of the norm."""
        if self.inputs is None:
            return None, self.gradients
        near, far = decompose.split_moment(self.inputs, channels, self.spatial, axes or ())
        if self.gradients is not None:
            return near, (self.gradients, far)
        eye = torch.eye(self.rows.shape[1], dtype=far.dtype, device=far.device)
        return near, (eye.expand(len(far), -1, -1), far)

    def _losses(self, form: str, axes: tuple[int, ...] | None, ranks: Sequence[int]) -> list[float]:
        """Losses in the full norm."""
        spectrum = self._spectrum(form, axes)
        if form in ("expand", "pair") or self.inputs is None:
            return [float(spectrum.losses[rank]) * self.factor for rank in ranks]
        below = [rank for rank in ranks if rank < spectrum.max_rank]
        kept = self._nest(form, axes, max(below)).explained(self.gradients) if below else None
        return [
            self.scale - float(kept[rank]) * self.factor if kept is not None and rank < len(kept) else 0.0
            for rank in ranks
        ]

    def _nest(self, form: str, axes: tuple[int, ...] | None, rank: int) -> Nested:
        """A form at every rank up to one; that of reductions serves the bottlenecks too."""
        if form == "reduce" and self._reduced_ranks is not None and self._reduced_ranks.rank >= rank:
            return self._reduced_ranks
        assert self.inputs is not None
        first = self._spectrum(form, axes).right_basis(rank)
        made = Nested(first, form, self.rows, self.inputs, self.spatial, axes)
        if form == "reduce":
            self._reduced_ranks = made
        return made

    # ---------------------------------------------------------------------------------------- bottlenecks

    def _bottlenecks(self, worth: Callable[[str, Mapping[str, int], tuple[int, ...] | None], bool]) -> list[Rung]:
        limits = rank_limits(self.spec, "bottleneck")
        most_in = min(limits["rank_in"], self._spectrum("reduce", None).max_rank)
        pairs: dict[int, list[int]] = {}
        for inner in ladder(most_in, self.multiple, _CORNERS):
            outers = [
                outer
                for outer in ladder(limits["rank_out"], self.multiple)
                if outer <= inner * prod(self.spatial)
                and worth("bottleneck", {"rank_in": inner, "rank_out": outer}, None)
            ]
            if outers and inner < most_in:
                pairs[inner] = outers
        if not pairs:
            return []
        found = []
        if self.inputs is None:
            losses = self._tucker().losses * self.factor
            for inner, outers in pairs.items():
                for outer in outers:
                    widths = {"rank_in": inner, "rank_out": outer}
                    found.append(self._rung("bottleneck", widths, None, float(losses[outer, inner])))
            return found
        nested, root = self._nest("reduce", None, max(pairs)), self._gradient_root()
        for inner, outers in pairs.items():
            kept = nested.explained_cut(min(inner, nested.rank), root)
            for outer in outers:
                loss = self.scale - float(kept[outer]) * self.factor
                found.append(self._rung("bottleneck", {"rank_in": inner, "rank_out": outer}, None, loss))
        return found

    def _tucker(self) -> decompose.Tucker2Spectrum:
        if self._tucker_made is None:
            self._tucker_made = decompose.tucker2_spectrum(self.kernel, self.spec.groups, None, self.gradients)
        return self._tucker_made

    def _gradient_root(self) -> Tensor | None:
        if self.gradients is None:
            return None
        values, vectors = torch.linalg.eigh(self.gradients)
        root: Tensor = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.mT
        return root

    def _reduced(self, inner: int) -> tuple[Reduction, decompose.Spectrum[decompose.Expansion], float]:
        """The reduction of one width, the cuts of its core at every rank, and what the reduction alone loses."""
        assert self.inputs is not None
        if inner not in self._reductions:
            made = self._truncate("reduce", None, {"rank_in": inner})
            half, normal = Inner(made, self.spatial).normal(self.inputs)
            cross = self.rows @ half.mT
            solved = solve_last(normal, cross, towards=last_matrix(made))
            reduction = with_last(made, solved)
            assert isinstance(reduction, Reduction)
            lost = max(self.scale - self._trace(solved @ cross.mT) * self.factor, 0.0)
            spectrum = decompose.expansion_spectrum(reduction.core, self.spec.groups, normal, self.gradients)
            self._reductions[inner] = (reduction, spectrum, lost)
        return self._reductions[inner]

    def _bottleneck(self, inner: int, outer: int) -> Tucker2:
        if self.inputs is None:
            return self._tucker().truncate(inner, outer, sweeps=5)
        limit = self._spectrum("reduce", None).max_rank
        reduction, spectrum, _ = self._reduced(min(inner, limit))
        if inner > limit or outer > spectrum.max_rank:  # wider than the kernel's own rank: the plain form
            return decompose.tucker2(self.kernel, rank_in=inner, rank_out=outer, groups=self.spec.groups)
        cut = spectrum.truncate(outer)
        return Tucker2(
            reduce=reduction.reduce,
            core=cut.core,
            expand=cut.expand,
            groups=self.spec.groups,
            relative_error=float("nan"),
            weighted_error=float("nan"),
        )


def ladder(limit: int, multiple: int | None = None, most: int = LADDER) -> list[int]:
    """Ranks to look at, from small to the full one: multiples, evenly apart where there are few and denser below.

    Args:
        limit: The full rank.
        multiple: What ranks are multiples of; None for 8 where the limit is 64 or more.
        most: About how many.
    """
    step = default_multiple(limit) if multiple is None else multiple
    every = [*range(step, limit, step), limit] if limit > step else [limit]
    if step > 1 and limit > step:
        every = sorted({*every, *(step >> i for i in range(1, step.bit_length() - 1) if step >> i)})
    if len(every) <= most:
        return every
    last = len(every) - 1
    chosen = {round(last * (i / (most - 1)) ** 1.5) for i in range(most)}
    return [every[i] for i in sorted(chosen)]
