"""Peak activation memory, and which tensors make it up.

A storage is born when an operation makes it and dies when the last tensor that shares it does, as in eager PyTorch.
Replaying births and deaths gives the bytes alive at every moment. Inputs count, for the caller holds them; weights do
not. Limits: this is what tensors occupy. A caching allocator rounds up and keeps freed blocks, and kernels take
workspaces that no tensor shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..capturing.records import MemoryEvent, NodeInfo
from ..core.cost import Cost
from .records import LiveTensor, Peak

TENSORS = 32
"""Live tensors that a `Peak` lists at most, largest first."""


def peak_memory(events: Iterable[MemoryEvent], infos: Mapping[str, NodeInfo]) -> Peak:
    """Replays ``Capture.memory`` and finds the moment with the most bytes alive; ``infos`` has paths and shapes."""
    events = tuple(events)
    live = peak = 0
    moment = -1
    for i, event in enumerate(events):
        live += event.nbytes
        if live > peak:
            peak, moment = live, i
    if moment < 0:
        return Peak(0, "", "", ())
    held: dict[str, int] = {}
    for event in events[: moment + 1]:
        held[event.node] = held.get(event.node, 0) + event.nbytes
    largest = sorted((item for item in held.items() if item[1]), key=lambda item: -item[1])
    node, nothing = events[moment].node, NodeInfo("", "", (), (), Cost())
    tensors = []
    for name, nbytes in largest[:TENSORS]:
        facts = infos.get(name, nothing)
        tensors.append(LiveTensor(name, facts.path, facts.outputs[0].shape if facts.outputs else (), nbytes))
    return Peak(peak, node, infos.get(node, nothing).path, tuple(tensors))
