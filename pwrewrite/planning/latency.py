"""What layers and their candidates really take on this device.

Fewer MACs are not always faster: three small convolutions can take longer than one large one. Each distinct layer (its
shape facts, its input's shape) and its candidates run alone, in eval mode, on the model's device, in its dtype and
memory format and with its number of threads. The contestants of a layer take turns, so that what else the machine does
hits all of them alike; what counts is the median of the ratio to the layer in the same turn. Results are kept on disk
by device and shape.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..capturing import Inputs, split_inputs
from ..core.convolution import ConvSpec
from ..core.files import cache_folder, write_file
from ..core.plan import Plan
from ..edit.apply import carry_out
from ..engines.timing import interleaved, time_models
from ..forms.specs import spec_to_dict
from ..layers.factorized import Factorized, build, make_layer


@dataclass(frozen=True, slots=True)
class Contestant:
    """A layer, or what could replace it.

    Attributes:
        spec: The layer.
        form: The form of the replacement; ``""`` for the layer itself.
        widths: Its widths, as sorted pairs.
        axes: For ``spatial``: the axes of the first stage.
    """

    spec: ConvSpec
    form: str = ""
    widths: tuple[tuple[str, int], ...] = ()
    axes: tuple[int, ...] | None = None

    def make(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The module, with weights of no matter."""
        if not self.form:
            return make_layer(self.spec, device=device, dtype=dtype).eval()
        return build(self.spec, self.form, dict(self.widths), axes=self.axes, device=device, dtype=dtype).eval()


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how things are timed.

    Attributes:
        device: The device.
        dtype: Of weights and activations.
        channels_last: Whether tensors are in that memory format.
        threads: Threads that torch uses.
    """

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    threads: int

    @classmethod
    def of(cls, model: nn.Module) -> Place:
        """That of a model, by its weights."""
        weights = [p for p in model.parameters() if p.is_floating_point()]
        first = weights[0] if weights else torch.zeros(())
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        last = any(
            p.dim() in formats and not p.is_contiguous() and p.is_contiguous(memory_format=formats[p.dim()])
            for p in weights
        )
        return cls(first.device, first.dtype, last, torch.get_num_threads())

    def name(self) -> str:
        """Names the device for a person and for the cache."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return _processor()

    def arrange(self, value: Any) -> Any:
        """A module or tensor in the memory format."""
        if not self.channels_last:
            return value
        if isinstance(value, Tensor):
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            return value.contiguous(memory_format=formats[value.dim()]) if value.dim() in formats else value
        for parameter in value.parameters():
            parameter.data = self.arrange(parameter.data)
        return value


class LatencyTable:
    """Times of contestants, measured once and kept.

    Args:
        place: Where they run.

    Attributes:
        measured: How many were measured and not found in the cache.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.measured = place, 0
        folder = cache_folder("latency")
        about = f"{place.name()}|{place.dtype}|{place.channels_last}|{place.threads}|{torch.__version__}"
        name = hashlib.sha256(about.encode()).hexdigest()[:24]
        self._file = None if folder is None else folder / f"{name}.json"
        self._known = _read(self._file, say=True)

    def times(self, shape: Sequence[int], contestants: Sequence[Contestant]) -> list[float]:
        """Seconds that each of a layer's contestants takes on inputs of one shape.

        Args:
            shape: The layer's input shape, batch included.
            contestants: The layer itself first.

        Returns:
            Seconds, infinite for a contestant that does not run here.

        Raises:
            RuntimeError: If the layer itself does not run.
        """
        keys = [_key(shape, one) for one in contestants]
        if any(key not in self._known for key in keys):
            with torch.no_grad(), _undisturbed(self.place):
                found = self._measure(shape, contestants)
            self._known.update(zip(keys, found))
            self.measured += len(keys)
        return [self._known[key] for key in keys]

    def save(self) -> None:
        """Keeps what was measured, beside what others kept meanwhile; if it cannot, that is no error."""
        if self._file is None or not self.measured:
            return
        runs = {key: seconds for key, seconds in self._known.items() if math.isfinite(seconds)}
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._file, json.dumps({**_read(self._file), **runs}))

    def _measure(self, shape: Sequence[int], contestants: Sequence[Contestant]) -> list[float]:
        place = self.place
        x = place.arrange(torch.randn(tuple(shape), device=place.device).to(place.dtype))
        runs: dict[int, Callable[[], object]] = {}
        for i, one in enumerate(contestants):
            try:
                run = _call(place.arrange(one.make(place.device, place.dtype)), x)
                run()
            except RuntimeError:  # no kernel for this dtype, or too little memory
                if i == 0:
                    raise
                continue
            runs[i] = run
        found = dict(zip(runs, interleaved(list(runs.values()), place.device)))
        return [found.get(i, math.inf) for i in range(len(contestants))]


@contextmanager
def _undisturbed(place: Place) -> Iterator[None]:
    """With the number of threads of a place; random numbers that are drawn meanwhile count for nothing outside."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng([place.device] if place.device.type == "cuda" else []):
        try:
            torch.set_num_threads(place.threads)
            yield
        finally:
            torch.set_num_threads(threads)


def _call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def time_plan(model: nn.Module, inputs: Inputs, plan: Plan) -> float:
    """The time of a model with a plan carried out, as a share of its time before.

    Args:
        model: The model; stays as it is.
        inputs: What it runs on.
        plan: The plan; its weights do not matter here.
    """
    if not plan.ops:
        return 1.0
    made = carry_out(model, plan, fill=False).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, Factorized):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    args, kwargs = split_inputs(inputs)
    before, after = time_models([model, made], args, kwargs)
    return after / before


def _key(shape: Sequence[int], one: Contestant) -> str:
    facts = {"shape": list(shape), "layer": spec_to_dict(one.spec), "form": one.form, "widths": one.widths}
    return hashlib.sha256(json.dumps({**facts, "axes": one.axes}, sort_keys=True).encode()).hexdigest()[:32]


def _read(file: Path | None, *, say: bool = False) -> dict[str, float]:
    """What is kept in a file: nothing where there is none or it is damaged, which is then said if asked."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): float(value) for key, value in found.items() if 0 < float(value) < math.inf}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if say:
            warnings.warn(f"measured latencies in {file} cannot be read and are measured anew: {error}", stacklevel=3)
        return {}


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
