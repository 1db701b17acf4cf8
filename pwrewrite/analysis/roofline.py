"""Compute- or memory-bound: arithmetic intensity against what a stated device can do.

The roofline of Williams, Waterman & Patterson 2009 (*Roofline: an insightful visual performance model for multicore
architectures*): an operation that does M MACs and moves B bytes takes at least ``max(M / peak, B / bandwidth)``
seconds. It is compute-bound where M / B is at or above the *ridge* ``peak / bandwidth``, memory-bound below.

Inputs, weights and outputs are each moved once and nothing is cached between operations, so the sum over nodes bounds
a run without operator fusion. Peaks are datasheet figures for dense matrix arithmetic, two FLOPs to a MAC: read the
result as a classification and a floor, not as a forecast.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..capturing.records import NodeInfo
from .devices import DeviceProfile
from .records import Roofline


def roofline(infos: Iterable[NodeInfo], device: DeviceProfile) -> Roofline:
    """What a device makes of a whole model at best, node after node, each in the dtype of its first output."""
    total = waiting = 0.0
    macs: dict[torch.dtype, int] = {}
    for facts in infos:
        dtype = facts.outputs[0].dtype if facts.outputs else torch.float32
        if facts.cost.macs:
            macs[dtype] = macs.get(dtype, 0) + facts.cost.macs
        compute = facts.cost.macs / device.peak(dtype)
        transfer = (facts.cost.read_bytes + facts.cost.write_bytes) / device.bytes_per_s
        total += max(compute, transfer)
        waiting += transfer if transfer > compute else 0.0
    main = max(macs, key=macs.__getitem__) if macs else torch.float32
    share = waiting / total if total else 0.0
    return Roofline(device.name, device.peak(main), device.bytes_per_s, device.ridge(main), total, share)
