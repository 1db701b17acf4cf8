"""The modes of torch that work on models must not inherit from the caller: inference mode, and autocast."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.RLock()
"""Held by one such call at a time: they trace code, for which torch.fx changes what calling any module does."""


@contextmanager
def plain_modes() -> Iterator[None]:
    """No inference mode, in which parameters would be made that cannot be trained, and no autocast around the call.

    Under autocast, decompositions and comparisons would be computed in 16 bits. What a model's own code switches on
    stays as it is. Calls from several threads run one after another.
    """
    with (
        _LOCK,
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield
