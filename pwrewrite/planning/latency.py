"""What layers and their candidates really take on this device.

Fewer MACs are not always faster: three small convolutions can take longer than one large one. Each distinct layer (its
shape facts, its input's shape) and its candidates run alone, in the engine that is asked for, in eval mode, on the
model's device, in its dtype and memory format and with as many threads, in turns (`pwrewrite.engines.timing`). Results
are stored on disk by engine and its version, device and shape.

Layers are timed minutes or days apart, while other things run or not. So each turn begins with the same small
reference, and what is stored is how many times as long as it a layer takes. The reference takes turns with the whole
model, too, which makes seconds of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from ..capturing import Inputs, split_inputs
from ..core.convolution import ConvSpec
from ..core.errors import RefusedError, first_line
from ..core.files import cache_folder, read_text, write_file
from ..core.plan import Plan
from ..edit.apply import carry_out
from ..engines.engine import Engine, Session, with_threads
from ..engines.timing import device_name, time_in_turns, time_models
from ..engines.torch_engine import PLAIN
from ..forms import FORMS
from ..forms.specs import Chain, linear_spec, moved, spec_to_dict
from ..layers.factorized import Factorized, build, make_layer

_REFERENCE, _REFERENCE_SHAPE = linear_spec(512, 512, True), (64, 512)
_SECONDS, _SECONDS_EACH = 1.0, 0.12
"""About how long one layer and its candidates run together at most, and each of them where they are few."""
_ROOM = 2**30
"""Bytes that layers which are timed in turns may read and write together."""
MEASURED = 1.05
"""A time within this factor of its limit meets it: as far may two measurements of one model be apart."""
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, slots=True)
class Variant:
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

    def moved(self, shape: Sequence[int]) -> int:
        """Numbers that it reads and writes on an input of some shape."""
        chain: Chain = (("", self.spec),)
        if self.form:
            chain = FORMS[self.form].stages(self.spec, dict(self.widths), self.axes)
        return moved(chain, shape, self.spec.output_shape(shape) if self.spec.dims else ())


@dataclass(frozen=True, slots=True)
class Conditions:
    """Where and how layers are timed.

    Attributes:
        device: The device.
        dtype: Of weights and activations.
        channels_last: Whether tensors are in that memory format.
        threads: How many.
        engine: Where they run.
    """

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    threads: int
    engine: Engine = PLAIN

    @classmethod
    def of(cls, model: nn.Module, threads: int | None = None, engine: Engine = PLAIN) -> Conditions:
        """Those of a model, by its weights, with so many threads (those that torch uses where None)."""
        weights = [p for p in model.parameters() if p.is_floating_point()]
        first = weights[0] if weights else torch.zeros((), device="cpu")
        last = any(
            p.dim() in _FORMATS and not p.is_contiguous() and p.is_contiguous(memory_format=_FORMATS[p.dim()])
            for p in weights
        )
        return cls(first.device, first.dtype, last, threads or torch.get_num_threads(), engine)

    def arranged(self, tensor: Tensor) -> Tensor:
        """A tensor in the memory format."""
        wanted = _FORMATS.get(tensor.dim()) if self.channels_last else None
        return tensor if wanted is None else tensor.contiguous(memory_format=wanted)

    def make(self, variant: Variant) -> nn.Module:
        """A layer or replacement in the memory format, with weights of no matter."""
        module = variant.make(self.device, self.dtype)
        for parameter in module.parameters():
            parameter.data = self.arranged(parameter.data)
        return module


class LatencyTable:
    """Times of layers and replacements, measured once and stored.

    Args:
        conditions: Where and how they run.

    Attributes:
        unit: Seconds that the reference takes.
        measured: How many were measured and not in the cache.
        notes: What should be told: that a cached file was damaged.
    """

    def __init__(self, conditions: Conditions) -> None:
        self.conditions, self.measured, self.unit = conditions, 0, 1.0
        folder = cache_folder("latency")
        engine = "" if conditions.engine is PLAIN else f"{conditions.engine.name} {conditions.engine.version}"
        facts = (device_name(conditions.device), conditions.dtype, conditions.channels_last, conditions.threads, engine)
        name = hashlib.sha256(
            "|".join(map(str, (*facts, torch.__version__, "relative, short turns"))).encode()
        ).hexdigest()[:24]
        self._file = None if folder is None else folder / f"{name}.json"
        self._known, self.notes = _read(self._file)

    def times(self, shape: Sequence[int], variants: Sequence[Variant]) -> list[float]:
        """Seconds that a layer and each of its replacements take on inputs of one shape.

        Args:
            shape: The layer's input shape, batch included.
            variants: The layer itself first.

        Returns:
            Seconds, infinite for one that does not run here.

        Raises:
            RuntimeError: If the layer itself does not run.
        """
        keys = [_key(shape, variant) for variant in variants]
        if any(key not in self._known for key in keys):
            conditions = self.conditions
            devices = [conditions.device] if conditions.device.type == "cuda" else []
            with torch.no_grad(), with_threads(conditions.threads), torch.random.fork_rng(devices):
                self._known.update(zip(keys, self._measure(shape, variants)))
            self.measured += len(keys)
        return [self._known[key] * self.unit for key in keys]

    def reference(self) -> Callable[[], object]:
        """A small layer that takes turns with everything that is timed."""
        with torch.random.fork_rng([self.conditions.device] if self.conditions.device.type == "cuda" else []):
            return self._ready(self._drawn(_REFERENCE_SHAPE), Variant(_REFERENCE))

    def _drawn(self, shape: Sequence[int]) -> Tensor:
        where = self.conditions
        return where.arranged(torch.randn(tuple(shape), device=where.device).to(where.dtype))

    def _ready(self, x: Tensor, variant: Variant) -> Callable[[], object]:
        where = self.conditions
        return partial(where.engine.session(where.make(variant), (x,), {}, where.threads).run, x)

    def save(self) -> None:
        """Stores what was measured, beside what others stored meanwhile; if it cannot, that is no error."""
        if self._file is None or not self.measured:
            return
        runs = {key: seconds for key, seconds in self._known.items() if math.isfinite(seconds)}
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._file, json.dumps({**_read(self._file)[0], **runs}))

    def _measure(self, shape: Sequence[int], variants: Sequence[Variant]) -> list[float]:
        """Times as many at once as there is memory for, and the layer itself with all of them."""
        x, shares = self._drawn(shape), dict[int, float]()
        sizes = [self.conditions.dtype.itemsize * variant.moved(shape) for variant in variants]
        todo = list(range(1, len(variants)))
        while todo or not shares:
            room = accumulate(sizes[i] for i in todo)
            count = max(1, sum(size <= _ROOM for size in room))
            together, todo = [0, *todo[:count]], todo[count:]
            shares = self._shares(x, {i: variants[i] for i in together}) | shares
        return [shares.get(i, math.inf) for i in range(len(variants))]

    def _shares(self, x: Tensor, variants: Mapping[int, Variant]) -> dict[int, float]:
        """How many times as long as the reference variants take, of which the first is to be beaten and must run."""
        runs: dict[int, Callable[[], object]] = {}
        for i, variant in variants.items():
            try:
                run = self._ready(x, variant)
                run()
            except (RuntimeError, RefusedError):  # no kernel for this dtype, or too little memory
                if not runs:
                    raise
                continue
            runs[i] = run
        every = [self.reference(), *runs.values()]
        seconds = min(_SECONDS, _SECONDS_EACH * len(every))
        unit, *timings = time_in_turns(every, self.conditions.device, seconds=seconds, drop=True, against=1)
        return {i: timing.seconds / unit.seconds for i, timing in zip(runs, timings)}


def time_plan(
    model: nn.Module,
    inputs: Inputs,
    plan: Plan,
    threads: int | None = None,
    engine: tuple[Engine, Session] | None = None,
) -> float:
    """What the whole model takes with a plan carried out, as a share of its time before.

    Args:
        model: The model; stays as it is.
        inputs: What it runs on.
        plan: The plan; its weights do not matter here.
        threads: Threads meanwhile; as torch has them where None.
        engine: Where it runs, and the model there; where None, torch.
    """
    if not plan.ops:
        return 1.0
    rewritten = carry_out(model, plan, fill=False).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in rewritten.modules():
            if isinstance(module, Factorized):
                for parameter in module.parameters():
                    fan_in = parameter[0].numel()  # keeps the level: what becomes denormal takes many times as long
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * fan_in**-0.5)
    args, kwargs = split_inputs(inputs)
    where, first = engine or (PLAIN, model)
    before, after = time_models([first, rewritten], args, kwargs, threads=threads, engine=where)
    return after.seconds / before.seconds


def _key(shape: Sequence[int], variant: Variant) -> str:
    facts = {"shape": list(shape), "layer": spec_to_dict(variant.spec), "form": variant.form, "widths": variant.widths}
    return hashlib.sha256(json.dumps({**facts, "axes": variant.axes}, sort_keys=True).encode()).hexdigest()[:32]


def _read(file: Path | None) -> tuple[dict[str, float], list[str]]:
    """The times in a file, and a note where it is damaged; it is then removed."""
    if file is None or not file.is_file():
        return {}, []
    try:
        times = json.loads(read_text(file))
        return {str(key): float(value) for key, value in times.items() if 0 < float(value) < math.inf}, []
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        with suppress(OSError):
            file.unlink()
        return {}, [f"the measured latencies in {file} were damaged and have been removed: {first_line(error)}"]
