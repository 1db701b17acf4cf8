"""Running a model once: seeded, on copies of its inputs, in a mode, with what it returned or how it failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import first_line
from ..core.files import same_directory
from ..core.random_state import random_states, seed_all
from .inputs import Arguments, copied
from .outputs import Flat, flatten


@dataclass(slots=True)
class Outcome:
    """What became of one run: its output or its error, whether it drew random numbers, the inputs it wrote into."""

    output: Flat  # nothing where it failed
    error: str  # the first line of the exception; empty where it ran
    random_state: tuple[object, ...]  # that the run left
    drew: bool = False
    written: tuple[str, ...] = ()

    @property
    def ran(self) -> bool:
        """Whether the model returned."""
        return not self.error

    def drew_like(self, other: Outcome) -> bool:
        """Whether both runs drew the same random numbers."""
        return self.random_state == other.random_state


@contextmanager
def plain_precision(device: torch.device | None) -> Iterator[None]:
    """On CUDA, float32 in float32: TF32 has the significand of float16, and would set the tolerance of all."""
    cudnn: Any = torch.backends.cudnn
    cuda = device is not None and device.type == "cuda"
    places: list[Any] = [torch.backends.cuda.matmul, cudnn.conv] if cuda else []
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, value in zip(places, before):
            place.fp32_precision = value


def device_of(*models: nn.Module) -> torch.device | None:
    """The one device that the models' parameters and buffers are on; None where there is not one."""
    devices = {t.device for model in models for t in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def run(model: nn.Module, inputs: Arguments, *, seed: int, training: bool = False, grad: bool = False) -> Outcome:
    """Runs a model once, which is a copy that may change; an exception of the model is an outcome too.

    With ``grad`` the outputs are those of the graph, otherwise copies.
    """
    model.train(training)
    args, kwargs = copied(inputs)
    seed_all(seed)
    before = random_states()
    try:
        with same_directory(), torch.set_grad_enabled(grad):
            flat = flatten(model(*args, **kwargs))
    except Exception as error:
        return Outcome(Flat(), first_line(error), before)
    if not grad:
        flat.tensors = {path: t.detach().clone() for path, t in flat.tensors.items()}
    after = random_states()
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
    if written.shape != before.shape:
        return False
    return torch.equal(written, before) or bool(((written == before) | (written.isnan() & before.isnan())).all())
