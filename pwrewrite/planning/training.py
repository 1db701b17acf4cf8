"""One training of a rewritten model to its original: the steps, what is measured in between, what is kept.

The loop is torch's: AdamW, a warm-up and a cosine, an average of the weights (EMA), clipped gradients, mixed precision
on CUDA, ``DistributedDataParallel`` where there are several processes. First the outputs of blocks are compared, then
predictions (`pwrewrite.planning.distilling`), each with an optimizer of its own. The held-out loss of the averaged
weights decides which state is kept, the one before included.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from ..core.errors import RefusedError, UsageError
from ..core.nested import map_tensors, tensors_of
from ..core.numbers import Time, duration
from ..core.processes import of_first, rank, world
from ..core.random_state import seed_all
from ..core.recovery import Recovery
from .augment import Augment
from .batches import Batches
from .checkpoints import read_checkpoint, write_checkpoint
from .distilling import Distilling
from .outputs import Measured, compare_outputs
from .phases import Phase
from .running import Chunk, Say, run_seeded
from .training_set import Part, TrainingSet

BLOCKS = 0.85
"""The part of the steps in which block outputs are compared. They tell far more than the predictions of a network that
is sure of its inputs: a ResNet-20 at 40% of its MACs lost 30% less after eight epochs of 3,277 images, and nothing less
by predictions alone, at rates of 1e-4 to 1e-3.
"""
RATES = 3e-3, 1e-3
"""The largest learning rate where block outputs can be compared, and where they cannot."""
_GENTLE = 1 / 30
"""What the largest learning rate is multiplied by for predictions after blocks."""
_CLIP = 1.0
_LOOKS = 20
"""How often the held-out loss is measured, about."""
_PLANNED = 0.95
"""The part of a time budget that is planned for."""
_RARE = 30
"""How many times as long as it took is waited before the state is written again."""
_TIMED = 3
_HELD = 512 * 1024**2
"""Bytes of held-out inputs, and of what the original makes of them, that are kept."""
LOWER = "lower --recover-batch"
_TRY = "try a lower --recover-rate, a longer --recover or more --calibration inputs"
_log = logging.getLogger(__name__)
_OPTIONS = signature(DistributedDataParallel).parameters
_SYNC = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"
_NO_BUFFERS: dict[str, Any] = {_SYNC: False}
"""What turns the exchange of buffers at every step off, which do not change; torch renames it."""
_NOTHING = Measured(math.inf, None, 0, "values")


@dataclass(frozen=True)
class Setting:
    """How long and how to train.

    Attributes:
        rate: The largest learning rate; None for `RATES`.
        size: Inputs in a step, at most.
        outputs: What the models' outputs are, see `pwrewrite.planning.outputs`.
        precision: What is computed in, under ``torch.autocast``; None for as the model is.
        augment: The name of what changes the inputs of a step, and that function.
        labelled: Whether labels count, too.
        say: Called at each step.
        notes: Takes what a reader should know.
    """

    time: Time
    rate: float | None
    size: int
    seed: int
    outputs: str
    device: torch.device
    precision: torch.dtype | None
    augment: tuple[str, Augment | None]
    labelled: bool
    say: Say
    notes: list[str] = field(default_factory=list)


@dataclass
class _State:
    """How far a training is.

    Attributes:
        best: Of the held-out measurements, after ``kept`` steps; ``weights`` are those behind it.
        steps: In all, as planned; in a budget of time anew at every look.
        switched: The step from which on predictions are compared; None before it was reached.
    """

    before: Measured
    best: Measured
    weights: list[Tensor]
    steps: int = 0
    step: int = 0
    kept: int = 0
    seconds: float = 0.0
    switched: int | None = None


class Training:
    """One model that is trained; both are in eval mode and on the device."""

    def __init__(self, settings: Setting, batches: Batches, teacher: nn.Module, student: nn.Module) -> None:
        self.began = time.monotonic()
        self.settings, self.batches, self.teacher, self.student = settings, batches, teacher, student
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        if not self.parameters:
            raise RefusedError("the rewritten model has no weights to train")
        chunk = self._placed(batches.first()[0])
        self.data = TrainingSet(batches, settings.size, settings.seed, settings.augment[1], (rank(), world()))
        self.loss = Distilling(teacher, student, settings.outputs, chunk, settings.precision)
        self.rate = RATES[not self.loss.blocks] if settings.rate is None else settings.rate
        self.model: nn.Module = self.loss
        if world() > 1:
            self.model = DistributedDataParallel(self.loss, find_unused_parameters=True, **_NO_BUFFERS)
        self.scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.precision is torch.float16)
        self._kept: list[tuple[Chunk, object]] = []
        self._written, self._writing = -math.inf, 0.0

    def run(self, file: Path | None) -> tuple[Recovery, Measured]:
        """Trains, from where an earlier run was interrupted, and puts the best weights in."""
        settings, earlier = self.settings, len(self.settings.notes)
        kept = of_first(read_checkpoint(file))
        if kept is not None and "recovery" in kept:
            self._put(kept["weights"])
            settings.notes.extend(kept["notes"])
            return Recovery.from_dict(kept["recovery"]), Measured(*kept["best"])
        settings.say("measuring what is lost before", None)
        phase: Phase | None = None
        if kept is not None:
            weights = kept["best_weights"]
            state = _State(Measured(*kept["before"]), Measured(*kept["best"]), weights, *kept["at"])
            self._put(kept["weights"])
            phase = self._phase(state)
            phase.load(kept["phase"])
            self.scaler.load_state_dict(kept["scaler"])
            self.began -= state.seconds
            settings.notes.append(f"an interrupted recovery went on after {state.step} of {state.steps} steps")
        else:
            before = self._held_out()
            state = _State(before, before, self._weights())
            state.steps = self._steps()
        self._loop(state, phase, file)
        self._put(state.weights)
        recovery = self._facts(state)
        self._note(state)
        facts = {"recovery": recovery.to_dict(), "weights": state.weights, "best": list(astuple(state.best))}
        write_checkpoint(file, {**facts, "notes": settings.notes[earlier:]})
        return recovery, state.best

    def _loop(self, state: _State, phase: Phase | None, file: Path | None) -> None:
        steps_in_epoch, time_left = self.data.steps, self.settings.time.seconds
        first, began = state.step, time.monotonic()
        while state.step < state.steps:
            epoch = state.step // steps_in_epoch
            for parts in self.data.epoch(epoch, state.step % steps_in_epoch):
                if state.switched is None and state.step >= self._switch(state):
                    state.switched, phase = state.step, None
                phase = phase or self._phase(state)
                self._step(parts, phase, state)
                state.step += 1
                left = (time.monotonic() - began) / (state.step - first) * (state.steps - state.step)
                self.settings.say(f"epoch {epoch + 1}, about {left:.0f} s left", state.step / state.steps)
                over = time_left is not None and self._over(state, time_left)
                if state.step == state.steps or over:
                    break
            assert phase is not None
            if over and state.step < state.steps:
                self.settings.notes.append(f"recovery ended after {state.step} of {state.steps} steps: time was up")
            every = max(1, math.ceil(state.steps / steps_in_epoch / _LOOKS)) * steps_in_epoch
            looks = over or state.step == state.steps or state.step % every == 0
            if (looks and not self._look(state, phase)) or over:
                return
            state.seconds = time.monotonic() - self.began
            self._keep(state, phase, file)
            if time_left is not None and looks and state.step < state.steps:  # as fast as since the look before
                now = time.monotonic()
                more = (_PLANNED * time_left - (now - self.began)) * (state.step - first) / max(now - began, 1e-6)
                state.steps, first, began = of_first(state.step + max(0, int(more))), state.step, now

    def _switch(self, state: _State) -> int:
        """The step from which on predictions are compared, as planned where it was not reached."""
        planned = round(BLOCKS * state.steps) if self.loss.blocks else 0
        return planned if state.switched is None else state.switched

    def _phase(self, state: _State) -> Phase:
        """A new optimizer with its schedule, for the steps up to the switch or from there on."""
        blocks = state.step < self._switch(state)
        gentle = 1.0 if blocks or not self.loss.blocks else _GENTLE

        def steps() -> int:
            return self._switch(state) if blocks else state.steps - self._switch(state)

        return Phase.of(self.parameters, gentle * self.rate, steps)

    def _step(self, parts: Sequence[Part], phase: Phase, state: _State) -> None:
        phase.optimizer.zero_grad()
        blocks = state.step < self._switch(state)
        seed_all((self.settings.seed + state.step) % 2**63)
        for part in parts:
            waits = part is not parts[-1] and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                labels = part.labels if self.settings.labelled else None
                loss = self.model(self._placed(part.chunk), labels, blocks) * part.weight
                self.scaler.scale(loss).backward()
        self.scaler.unscale_(phase.optimizer)
        norm = clip_grad_norm_(self.parameters, _CLIP)
        if self.scaler.is_enabled() or bool(norm.isfinite()):
            self.scaler.step(phase.optimizer)
        self.scaler.update()
        phase.schedule.step()
        phase.average.update_parameters(nn.ParameterList(self.parameters))

    def _look(self, state: _State, phase: Phase) -> bool:
        """Measures the averaged weights, and keeps them if they are the best; whether they are numbers."""
        weights, averaged = self._weights(), [p.detach().clone() for p in phase.average.module.parameters()]
        self._put(averaged)
        measured = self._held_out()
        self._put(weights)
        if measured.loss < state.best.loss:
            state.best, state.weights, state.kept = measured, averaged, state.step
        if not math.isfinite(measured.loss):
            self.settings.notes.append(f"training diverged after {state.step} steps, and was stopped: {_TRY}")
        return math.isfinite(measured.loss)

    def _held_out(self) -> Measured:
        """How far the model is from the original on held-out inputs, as the first process measures it."""
        measured = None
        if not rank():
            with torch.no_grad():
                measured = compare_outputs(self._both(), self.settings.outputs)
        first = of_first(None if measured is None else astuple(measured))
        assert first is not None
        return Measured(*first)

    def _both(self) -> Iterator[tuple[object, object, Chunk]]:
        """What both models make of the held-out inputs."""
        for number, (chunk, wanted) in enumerate(self._kept or self._of_original()):
            yield wanted, run_seeded(self.student, self._placed(chunk), number), chunk

    def _of_original(self) -> Iterator[tuple[Chunk, object]]:
        """The held-out inputs, and what the original makes of them; both are kept where they are not too much."""
        pairs, held = list[tuple[Chunk, object]](), 0
        for number, chunk in enumerate(self.batches.held_out()):
            pair = chunk, run_seeded(self.teacher, self._placed(chunk), number)
            held += sum(tensor.nbytes for tensor in tensors_of(pair))
            pairs = [*pairs, pair] if held <= _HELD else []
            yield pair
        self._kept = pairs

    def _steps(self) -> int:
        """How many steps to take: so many epochs, or what fits into the time that is left, by timing a few."""
        asked = self.settings.time
        if asked.epochs is not None:
            return max(1, round(asked.epochs * self.data.steps))
        assert asked.seconds is not None
        state, weights = _State(_NOTHING, _NOTHING, [], steps=_TIMED + 1), self._weights()
        phase = self._phase(state)
        while state.step <= _TIMED:
            for parts in self.data.epoch(0):
                if state.step == 1:
                    start = time.monotonic()
                self._step(parts, phase, state)
                state.step += 1
                if state.step > _TIMED:
                    break
        each = (time.monotonic() - start) / _TIMED
        self._put(weights)
        start = time.monotonic()
        self._held_out()
        looking = time.monotonic() - start
        left = _PLANNED * asked.seconds - (time.monotonic() - self.began)
        epoch = each * self.data.steps + looking  # with a look at its end, of which there are only so many
        epochs = left / epoch if left <= _LOOKS * epoch else (left - _LOOKS * looking) / (each * self.data.steps)
        steps = of_first(int(epochs * self.data.steps))
        if steps < 1:
            spent = time.monotonic() - self.began
            raise UsageError(
                f"{asked} is too short for one step of training, which takes {duration(each)}",
                hint=f"give it {math.ceil((spent + each + looking) / _PLANNED)}s or more, or {LOWER}",
            )
        return steps

    def _over(self, state: _State, seconds: float) -> bool:
        """Whether the time is up, as the first process sees it; asked now and then where there are several."""
        if world() > 1 and state.step % 10:
            return False
        return of_first(time.monotonic() - self.began > seconds)

    def _keep(self, state: _State, phase: Phase, file: Path | None) -> None:
        """Writes the state, unless it was written a short time ago."""
        start = time.monotonic()
        if start - self._written < _RARE * self._writing:
            return
        at = [state.steps, state.step, state.kept, state.seconds, state.switched]
        write_checkpoint(
            file,
            {
                "at": at,
                "before": list(astuple(state.before)),
                "best": list(astuple(state.best)),
                "best_weights": state.weights,
                "weights": self._weights(),
                "phase": phase.state(),
                "scaler": self.scaler.state_dict(),
            },
        )
        self._written = time.monotonic()
        self._writing = self._written - start

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def _put(self, weights: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, weights, strict=True):
            parameter.copy_(value)

    def _placed(self, chunk: Chunk) -> Chunk:
        placed: Chunk = map_tensors(chunk, lambda tensor: tensor.to(self.settings.device))
        return placed

    def _facts(self, state: _State) -> Recovery:
        settings, norms = (
            self.settings,
            [
                any(isinstance(module, _BatchNorm) for module in model.modules())
                for model in (self.student, self.teacher)
            ],
        )
        return Recovery(
            str(settings.time),
            state.before.loss,
            state.best.loss,
            state.kept,
            state.step,
            state.step / self.data.steps,
            time.monotonic() - self.began,
            self.data.samples,
            settings.size,
            self.rate,
            len(self.loss.blocks),
            "frozen" if norms[0] else "folded" if norms[1] else "none",
            settings.augment[0],
            settings.labelled,
            str(settings.precision or self.parameters[0].dtype).removeprefix("torch."),
            world(),
        )

    def _note(self, state: _State) -> None:
        if not state.kept:
            note = f"recovery did not lower the held-out loss, {state.before.loss:.3g}: the model is as before; {_TRY}"
            self.settings.notes.append(note)
            _log.warning(note)
