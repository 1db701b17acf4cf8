"""What may change as one, with what it could become: the base of layers, channels between layers, and whole modules.

A group is what the knapsack (`pwrewrite.planning.allocate`) chooses one candidate of, the first of which keeps it as it
is. A `JointGroup` changes several layers at once, and its candidates claim all of them. A `MeasuredGroup` knows how to
try one on a model before any is carried out, and the losses that are measured so take the place of the predicted ones.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import Tensor, nn

from ..core.plan import Op, Skip
from ..decompose import Factors
from .allocate import Option
from .latency import LatencyTable
from .norm import Norm
from .running import Say

_TIMED = 7
"""How many candidates of a form are timed."""
_FASTER = 0.97
"""A candidate is faster than what it replaces below this share of its time."""
_TINY, _LEAST, _MOST = 1e-30, 0.1, 1e3
"""A loss that counts as none, and between what one that was measured may say of others, as a share of theirs."""


@dataclass(frozen=True, slots=True)
class Candidate(Option):
    """One thing that a group could become, by which op (None to keep it), and the relative error of its weights."""

    op: Op | None = None
    error: float = 0.0


class Prices:
    """What was measured of the losses of a group's candidates, by their ops, and what it says of the others."""

    def __init__(self) -> None:
        self._predicted: dict[int, float] = {}
        self._measured: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._measured)

    def knows(self, candidate: Candidate) -> bool:
        """Whether a candidate's loss was measured."""
        return id(candidate.op) in self._measured

    def learn(self, candidate: Candidate, loss: float) -> None:
        """Takes note of a loss that was measured."""
        self._predicted.setdefault(id(candidate.op), candidate.loss)
        self._measured[id(candidate.op)] = loss

    def priced(self, candidate: Candidate) -> Candidate:
        """A candidate with the loss that was measured, else with as many times what was predicted as the nearest."""
        if candidate.op is None or not self._measured:
            return candidate
        key = id(candidate.op)
        predicted = self._predicted.setdefault(key, candidate.loss)
        if key not in self._measured:
            near = min(self._measured, key=lambda other: abs(_log(self._predicted[other]) - _log(predicted)))
            ratio = self._measured[near] / max(self._predicted[near], _TINY)
            return replace(candidate, loss=predicted * min(max(ratio, _LEAST), _MOST))
        return replace(candidate, loss=self._measured[key])


def _log(loss: float) -> float:
    return math.log(max(loss, _TINY))


@dataclass
class Group(ABC):
    """What may change as one, and its candidates, of which the first keeps it; costs are those of all that is in it.

    ``alone``: path to the seconds that its layers take on their own, where they were timed.
    """

    candidates: list[Candidate]
    alone: Mapping[str, float] = field(default_factory=dict, init=False)

    @property
    @abstractmethod
    def path(self) -> str:
        """Path of the layer or module that its ops name."""

    @property
    def kept(self) -> str | None:
        """Path of the layer that is said to be kept where the group stays as it is."""
        return self.path

    def time(self, table: LatencyTable) -> None:
        """Gives the candidates their measured latency; those that are not faster are given up, and most unmeasured."""
        keep, *others = self.candidates
        few = self._few(others)
        self.alone, times = self._times([c.op for c in few if c.op is not None], table)
        before = sum(self.alone.values())
        faster = [(c, seconds) for c, seconds in zip(few, times, strict=True) if seconds < _FASTER * before]
        self.candidates = [replace(c, costs={**c.costs, "latency": s}) for c, s in ((keep, before), *faster)]

    def scale_latency(self, share: float) -> None:
        """Scales the latency of all candidates."""
        costs = ({**c.costs, "latency": share * c.costs["latency"]} for c in self.candidates)
        self.candidates = [replace(c, costs=each) for c, each in zip(self.candidates, costs)]

    def without(self, gone: Container[tuple[str, str]]) -> Self:
        """The group without the candidates of some ops, by their action and path."""
        kept = [c for c in self.candidates if c.op is None or (c.op.action, c.op.path) not in gone]
        other = self if len(kept) == len(self.candidates) else copy.copy(self)
        other.candidates = kept
        return other

    def _few(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Those that are timed."""
        return evenly(candidates)

    @abstractmethod
    def _times(self, ops: Sequence[Op], table: LatencyTable) -> tuple[dict[str, float], list[float]]:
        """Path to the seconds of each layer as it is, and the seconds that the group takes after each op."""


@dataclass
class JointGroup(Group):
    """A group that changes several layers at once, by ops of one ``action``, which is also the name of the form."""

    action: ClassVar[str]

    @classmethod
    @abstractmethod
    def all_of(cls, norm: Norm, say: Say) -> tuple[list[Self], list[Skip]]:
        """The groups of this kind that a budget allows, and why layers of others stay."""

    @classmethod
    @abstractmethod
    def factors(cls, norm: Norm, op: Op, weight: Tensor) -> Factors | None:
        """The weights behind an op of this action, for the layer whose weight this is; None where nothing says so."""


@dataclass
class MeasuredGroup(JointGroup):
    """A joint group whose losses are too large to be predicted well, and are measured before one is taken."""

    prices: Prices = field(default_factory=Prices, init=False)

    @abstractmethod
    def changed(self, op: Op) -> Collection[str]:
        """Paths of the modules that a trial of one of the group's ops changes: their weights, statistics or hooks."""

    @abstractmethod
    def trial(self, model: nn.Module, norm: Norm, op: Op) -> AbstractContextManager[None]:
        """Makes a model compute what it does with one of the group's ops carried out."""


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one beats in MACs and loss."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.costs["macs"], c.loss)):
        if not best or candidate.loss < best[-1].loss:
            best.append(candidate)
    return best


def evenly(candidates: Sequence[Candidate]) -> list[Candidate]:
    """A few of them, evenly apart, the first and the last among them."""
    if not candidates:
        return []
    places = {round((len(candidates) - 1) * n / (_TIMED - 1)) for n in range(_TIMED)}
    return [candidates[i] for i in sorted(places)]
