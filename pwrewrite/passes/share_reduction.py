"""`ShareReduction`: layers that read the same map get one 1×1 reduction of it, each of them the core behind it.

In GoogLeNet (Szegedy et al. 2014) every wide branch of a module has a 1×1 of its own on the same map. Where what the
branches need of the map overlaps, one for all of them costs less: ``W_j ≈ core_j · R``, with ``R`` from the kernels of
all readers, one below the other (`pwrewrite.forms.shared`). Which layers these are is found by `shared_maps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

from .. import decompose
from ..capturing.records import Capture
from ..core.errors import UsageError
from ..core.plan import Skip, SkipReason
from ..decompose import RankSpec
from .base import Pass, Proposal, below_share, chosen, grows, growth
from .shared_maps import NAME, SharedMap, find_shared

DEFAULT_RANK = 0.5
"""The reduction's width, as a part of what it can be, where nothing else is said."""


@dataclass(eq=False)
class ShareReduction(Pass):
    """Puts one reduction before several layers that read the same map.

    Args:
        rank: Width of the reduction: an integer, or a ratio (``0.5``, ``"50%"``) of the most that it can be.
        include: Patterns on the paths of layers; all where empty.
        exclude: Patterns on paths of layers that read a map of their own.
        min_share: Least part of the model's MACs that the layers do together, 0 to 1.
        multiple: What computed widths are rounded to; by default 8 where there are 64 channels or more, else 1.
        allow_growth: Whether a result that costs more is proposed all the same.

    Raises:
        UsageError: If a setting makes no sense.
    """

    name = NAME
    summary = "one 1×1 reduction for several convolutions that read the same map (one 1×1 → several k×k)"

    rank: RankSpec | None = None
    _: KW_ONLY
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    min_share: float = 0.0
    multiple: int | None = None
    allow_growth: bool = False

    def __post_init__(self) -> None:
        self.width: RankSpec = DEFAULT_RANK if self.rank is None else self.rank
        decompose.resolve_rank(self.width, 1 << 30, name="rank")

    def propose(self, capture: Capture) -> list[Proposal]:
        """See `Pass.propose`."""
        maps, skips = find_shared(capture)
        proposals, taken = list[Proposal](skips), set[str]()
        wanted, total = chosen(capture, self.include, self.exclude), sum(y.macs for y in capture.layers) or 1
        for each in maps:
            paths = {layer.path for layer in each.layers}
            if paths & taken:
                continue
            left = next((layer for layer in each.layers if id(layer) not in wanted), None)
            share = sum(layer.macs for layer in each.layers) / total
            if left is not None:
                detail = f"{left.path}, which reads the same map, is left out by include or exclude"
                proposals += [Skip(path, SkipReason.EXCLUDED, detail) for path in sorted(paths)]
            elif skip := below_share(each.path, share, self.min_share):
                proposals += [replace(skip, path=path) for path in sorted(paths)]
            else:
                proposals.append(self._shared(each))
            taken |= paths
        return proposals

    def _shared(self, each: SharedMap) -> Proposal:
        try:
            rank = decompose.resolve_rank(self.width, each.full, self.multiple)
        except UsageError as error:
            return Skip(each.path, SkipReason.TOO_SMALL, f"{error.message}; there, give {error.expected}")
        estimate = each.estimate(rank)
        if grows(estimate) and not self.allow_growth:
            return Skip(each.path, SkipReason.NO_GAIN, growth(f"with a reduction to {rank}", estimate))
        return each.op(rank)
