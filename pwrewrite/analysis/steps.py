"""The run, operation after operation, as plain data: what each reads, costs and keeps alive.

A picture of the graph and of the memory over time is drawn from it. Limits: an operation that makes no storage (a view,
one in place) is drawn at what was alive when the one before it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..capturing.records import MemoryEvent, NodeInfo
from ..core.cost import Cost
from .devices import DeviceProfile, bound


@dataclass(frozen=True, slots=True)
class Step:
    """An operation of the run.

    Attributes:
        path: Path of the module that ran it: ``leaf`` where that module is the operation, else its code made the call.
        shape: Of its first output.
        inputs: Positions of the steps that it reads.
        seconds: Lower bound of its time on the stated device.
        live: Most bytes of activations alive while it runs.
    """

    op: str
    path: str
    leaf: bool
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    cost: Cost
    seconds: float
    live: int


@dataclass(frozen=True, repr=False, eq=False)
class Recording:
    """What a run's steps are worked out from, when somebody reads them; holds no module and no tensor.

    Attributes:
        infos: Facts by name of a node, of which those in ``sources`` are steps; ``leaves`` are calls of modules.
        sources: Name of a step to those of the steps that it reads, in the order of the run.
        memory: ``Capture.memory``.
    """

    infos: Mapping[str, NodeInfo]
    leaves: frozenset[str]
    sources: Mapping[str, Sequence[str]]
    memory: Sequence[MemoryEvent]
    device: DeviceProfile

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Every operation in the order of the run, inputs and outputs included."""
        return tuple(self._steps())

    def _steps(self) -> Iterator[Step]:
        position = {name: i for i, name in enumerate(self.sources)}
        live = _live(self.memory, position)
        for name, i in position.items():
            facts = self.infos[name]
            cost, output = facts.cost, facts.outputs[0] if facts.outputs else None
            dtype, shape = (output.dtype, output.shape) if output else (torch.float32, ())
            seconds = bound(cost.macs, cost.read_bytes + cost.write_bytes, dtype, self.device).seconds
            inputs = tuple([position[source] for source in self.sources[name]])
            yield Step(facts.op, facts.path, name in self.leaves, shape, inputs, cost, seconds, live[i])


def _live(memory: Sequence[MemoryEvent], position: Mapping[str, int]) -> list[int]:
    """Most bytes alive at each position, from the births and deaths of storages in order."""
    most = [-1] * len(position)
    after, now, at = [0] * len(position), 0, 0
    for event in memory:
        now += event.nbytes
        if event.nbytes > 0:
            at = max(at, position.get(event.node, at))
            most[at] = max(most[at], now)
        if position:
            after[at] = now
    level = 0
    for i, peak in enumerate(most):
        if peak < 0:
            most[i] = level
        else:
            level = after[i]
    return most
