"""Trains a rewritten model to its original, the teacher, within a time: `Recoverer`.

The loop is torch's: AdamW, a warm-up and a cosine, an average of the weights (EMA), clipped gradients, mixed precision
on CUDA, ``DistributedDataParallel`` where there are several processes. First the outputs of blocks are compared, then
predictions (`pwrewrite.planning.distilling`), each with an optimizer of its own. Both models are in eval mode: batch
norms keep their statistics and train their scales. The held-out loss of the averaged weights decides which state is
kept, the one before included: by that loss the result is never worse.

A budget of epochs gives the same result for the same seed; minutes are turned into steps by timing the first ones.
After an epoch the state goes to the cache, as often as takes little of the time, and the same call, made again after a
crash, goes on from there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..core.errors import RefusedError, UsageError, first_line
from ..core.nested import deep_copy, map_tensors
from ..core.numbers import Time, parse_time
from ..core.options import RecoverOptions
from ..core.processes import rank
from ..core.recovery import Recovery
from .augment import augment_named, source_of
from .batches import Batches
from .checkpoints import checkpoint_file
from .layout import channels_last
from .outputs import Measured, Scoring, floating, scoring
from .running import Say, device_of, evaluating, first_samples, run_seeded
from .training import LOWER, Setting, Training


class Recoverer:
    """Trains rewritten versions of one model.

    Args:
        original: The teacher; stays as it is.
        batches: The inputs; those held out are measured on.
        options: How long and how.
        outputs: What the outputs are, see `pwrewrite.planning.outputs`.
        seed: Of the order of the inputs and of what is drawn.
        say: Called at each step.

    Attributes:
        notes: What a reader should know.

    Raises:
        UsageError: If an option makes no sense.
    """

    def __init__(
        self, original: nn.Module, batches: Batches, options: RecoverOptions, outputs: str, *, seed: int, say: Say
    ) -> None:
        given = options.recover or ""
        rate, size = options.recover_rate, options.recover_batch
        if rate is not None and not 0 < rate < math.inf:
            raise UsageError("the learning rate is out of range", expected="above 0, such as 0.001", got=str(rate))
        if size is not None and size < 1:
            raise UsageError("a step takes 1 input or more", got=f"recover_batch={size}")
        device = device_of(original) if options.recover_device is None else _device(options.recover_device)
        precision: torch.dtype | None = None
        if device.type == "cuda":
            precision = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        self.original, self.batches = original, batches
        self.setting = Setting(
            given if isinstance(given, Time) else parse_time(given, "recover"),
            rate,
            size or batches.chunk,
            seed,
            outputs,
            device,
            precision,
            augment_named(options.augment, batches.first()[0]),
            self._fitting_labels(outputs),
            lambda what, share: say(f"recovering: {what}", share),
        )
        self.notes = self.setting.notes

    def train(self, rewritten: nn.Module) -> tuple[Recovery, Measured]:
        """Trains a model in place.

        Returns:
            How it went, and how far it is from the original on held-out inputs now.

        Raises:
            UsageError: If the time is too short for a step, or an augmentation goes wrong.
            RefusedError: If nothing can be trained, or memory runs out.
        """
        setting, file = self.setting, None
        if not rank():
            facts = {name: value for name, value in vars(setting).items() if name not in ("say", "notes")}
            facts |= {"device": setting.device.type, "augment": [setting.augment[0], source_of(setting.augment[1])]}
            labels = self.batches.labels("calibration") if setting.labelled else None
            file = checkpoint_file((self.original, rewritten), self.batches, labels, facts)
        home, teacher = device_of(rewritten), self.original
        if home != setting.device:
            teacher = deep_copy(self.original).to(setting.device)
            rewritten.to(setting.device)
        try:
            with (
                evaluating(teacher),
                evaluating(rewritten, buffers=False),
                _trainable(rewritten),
                torch.enable_grad(),
                channels_last(teacher, rewritten, fits=lambda: self._try(teacher, rewritten)),
            ):
                return Training(setting, self.batches, teacher, rewritten).run(file)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RefusedError) or not _out_of_memory(error):
                raise
            raise RefusedError(
                f"out of memory while training on {setting.size} inputs at a time",
                got=first_line(error),
                hint=f"{LOWER} (recover_batch=), such as {max(1, setting.size // 2)}"
                if setting.size > 1
                else "fewer or smaller inputs",
            ) from error
        finally:
            rewritten.to(home)

    def _try(self, teacher: nn.Module, student: nn.Module) -> None:
        """Runs both models on a few inputs, and the one that is trained backwards, too."""
        chunk, _ = self.batches.first()
        few = map_tensors(first_samples(chunk, 2), lambda tensor: tensor.to(self.setting.device))
        with evaluating(student):
            with torch.no_grad():
                run_seeded(teacher, few, 0)
            results = [t for t in floating(run_seeded(student, few, 0)) if t.requires_grad]
            trained = [p for p in student.parameters() if p.requires_grad]
            if results and trained:
                torch.autograd.grad([t.sum() for t in results], trained, allow_unused=True)

    def _fitting_labels(self, outputs: str) -> bool:
        """Whether there are labels, one class for each input, that suit the original's outputs."""
        labels = self.batches.labels()
        if labels is None or labels.dim() != 1:
            return False
        chunk, _ = self.batches.first()
        with torch.no_grad(), evaluating(self.original):
            how = scoring(run_seeded(self.original, chunk, 0), labels, outputs)
        return isinstance(how, Scoring) and how.threshold is None


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """All floating weights take gradients; afterwards as before, without any."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(parameter.is_floating_point())
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _device(text: str) -> torch.device:
    """The device of a name; of several GPUs each process takes its own.

    Raises:
        UsageError: If there is none.
    """
    try:
        device = torch.device(text)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"there is no device {text!r} here", got=first_line(error)) from error
    return device


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
