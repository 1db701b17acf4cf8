"""The modes of torch that work on models must not inherit from the caller: inference mode, and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_modes() -> Iterator[None]:
    """No inference mode, in which parameters would be made that cannot be trained, and no autocast around the call.

    Under autocast, decompositions and comparisons would be computed in 16 bits. What a model's own code switches on
    stays as it is.
    """
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
