"""Processes that do one piece of work together, as ``torchrun`` starts them: which one this is, and what all agree on.

Without ``torchrun``, or a process group of the user's own, there is one process and nothing is sent.
"""

from __future__ import annotations

import atexit
import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0; the first one reports and saves."""
    return dist.get_rank() if _joined() else int(os.environ.get("RANK", "0")) if _launched() else 0


def world() -> int:
    """How many processes there are."""
    if not _joined() and _launched():
        from torch.distributed.distributed_c10d import PrefixStore  # not in every build of torch
        from torch.distributed.rendezvous import rendezvous

        gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        backend, place = "cpu:gloo,cuda:nccl" if gpus else "gloo", dict[str, Any]()
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # a restart would find the addresses of the dead in the store
            store, number, count = next(rendezvous("env://"))
            store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            place = {"store": store, "rank": number, "world_size": count}
        dist.init_process_group(backend, **place)
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    return dist.get_world_size() if _joined() else 1


def of_first(value: T) -> T:
    """What the first process has, in all of them; plain data and tensors on the CPU."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _launched() -> bool:
    """Whether ``torchrun`` has started several."""
    return dist.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
