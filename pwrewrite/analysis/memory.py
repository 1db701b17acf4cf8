"""Peak activation memory, and which tensors make it up.

A storage is born when an operation makes it and dies when the last tensor that shares it does, as in eager PyTorch.
Replaying births and deaths gives the bytes alive at every moment. Inputs count, for the caller holds them; weights do
not. Limits: this is what tensors occupy. A caching allocator rounds up and keeps freed blocks, and kernels take
workspaces that no tensor shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..capturing.records import MemoryEvent, NodeInfo
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
    node = events[moment].node
    return Peak(peak, node, _path(infos, node), tuple(_live(infos, *item) for item in largest[:TENSORS]))


def _path(infos: Mapping[str, NodeInfo], node: str) -> str:
    return infos[node].path if node in infos else ""


def _live(infos: Mapping[str, NodeInfo], node: str, nbytes: int) -> LiveTensor:
    outputs = infos[node].outputs if node in infos else ()
    return LiveTensor(node, _path(infos, node), outputs[0].shape if outputs else (), nbytes)
