"""Running a model once: seeded, on copies of its inputs, in a mode, with what it returned or how it failed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import first_line
from ..core.files import same_directory
from ..core.random_state import seed_all
from .inputs import Arguments, copied
from .outputs import Flat, flatten


@dataclass(slots=True)
class Outcome:
    """What became of one run.

    Attributes:
        output: What the model returned; None where it failed.
        error: The first line of the exception; empty where it ran.
        random_state: The random state that the run left, of torch and of Python.
        drew: Whether it drew random numbers.
        written: Paths of the inputs that it wrote into.
    """

    output: Flat | None
    error: str
    random_state: tuple[bytes, object]
    drew: bool
    written: tuple[str, ...] = ()

    @property
    def ran(self) -> bool:
        """Whether the model returned."""
        return self.output is not None


@contextmanager
def plain_precision(device: torch.device | None) -> Iterator[None]:
    """On CUDA, float32 in float32: TF32 has the significand of float16, and would set the tolerance of all."""
    if device is None or device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    places: list[Any] = [torch.backends.cuda.matmul, cudnn.conv]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, value in zip(places, before):
            place.fp32_precision = value


def device_of(*models: nn.Module) -> torch.device | None:
    """The one device that the models' parameters and buffers are on; None where there is not one."""
    devices = {t.device for model in models for t in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def _random_state(model: nn.Module) -> tuple[bytes, object]:
    device = device_of(model)
    state = torch.get_rng_state()
    if device is not None and device.type == "cuda":
        state = torch.cat((state, torch.cuda.get_rng_state(device)))
    return state.numpy().tobytes(), random.getstate()


def run(model: nn.Module, inputs: Arguments, *, seed: int, training: bool = False, grad: bool = False) -> Outcome:
    """Runs a model once; an exception of the model is an outcome too.

    The model is a copy that may change: its mode is set, its buffers move. With ``grad`` the outputs are
    those of the graph, otherwise copies.
    """
    model.train(training)
    args, kwargs = copied(inputs)
    seed_all(seed)
    before = _random_state(model)
    try:
        with same_directory(), torch.set_grad_enabled(grad):
            flat = flatten(model(*args, **kwargs))
    except Exception as error:
        return Outcome(None, first_line(error), before, False)
    if not grad:
        flat.tensors = {path: t.detach().clone() for path, t in flat.tensors.items()}
    after = _random_state(model)
    used, given = flatten((args, kwargs)).tensors, flatten(inputs).tensors
    written = tuple(path for path, t in used.items() if not _same(t, given[path]))
    return Outcome(flat, "", after, before != after, written)


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Puts buffers back that a run writes into or replaces, such as counts of calls."""
    buffers = [(m._buffers, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    values = [(buffer._version, buffer.clone()) for _, _, buffer in buffers]
    try:
        yield
    finally:
        for (store, name, buffer), (version, value) in zip(buffers, values):
            store[name] = buffer
            if buffer._version != version and buffer.shape == value.shape:
                with torch.no_grad():
                    buffer.copy_(value)


def _same(written: Tensor, before: Tensor) -> bool:
    """Whether a tensor holds what it held; NaN stays NaN."""
    if written.shape != before.shape or torch.equal(written, before):
        return written.shape == before.shape
    return bool(((written == before) | ((written != written) & (before != before))).all())
