"""The random states of torch, Python and NumPy: set together, and put back together."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .errors import UsageError

_cuda_runs: Callable[[], bool] = torch.cuda.is_initialized


def check_seed(seed: int) -> None:
    """Raises `UsageError` for what is negative, too large or no whole number."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UsageError("this is not a seed", expected="a whole number from 0 to 2**63 - 1", got=repr(seed)[:40])


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Puts the random states back on leaving, whatever happened in between."""
    python, numpy = random.getstate(), sys.modules.get("numpy.random")
    numpy_state = numpy.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if _cuda_runs() else (), device_type="cuda"):
            yield
    finally:
        random.setstate(python)
        if numpy is not None and numpy_state is not None:
            numpy.set_state(numpy_state)


def random_states() -> tuple[object, ...]:
    """The random states of torch, on every CUDA device in use, Python and NumPy: equal where nothing was drawn."""
    devices = range(torch.cuda.device_count()) if _cuda_runs() else ()
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    numpy = sys.modules.get("numpy.random")
    words, place = (None, 0) if numpy is None else numpy.get_state()[1:3]
    return *(state.numpy().tobytes() for state in states), random.getstate(), words is None or words.tobytes(), place


def seed_all(seed: int) -> None:
    """Seeds torch on every device in use, Python and NumPy; raises `UsageError` for what they do not take."""
    check_seed(seed)
    accelerator = torch.accelerator.current_accelerator()
    if _cuda_runs() or not (accelerator is None or accelerator.type == "cuda"):
        torch.manual_seed(seed)
    else:  # CUDA that is not in use yet would note the seed for later, and the whole stack with it, in a millisecond
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed(seed % 2**32)
