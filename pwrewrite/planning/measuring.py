"""What the model loses with a single change, measured: for changes that are too large to be predicted well.

What is predicted from gradients holds to second order, and as if errors at different positions, and of channels that go
together, had nothing to do with each other. For the factors of one layer that is near enough. For channels that go, and
for modules that go as a whole, it can be ten times too little: on ResNet-20 at 30% of its MACs plans with them, by
their predictions, lost three to seven times as much on held-out inputs as plans without. So of these a plan's own are
measured, one by one, in the same unit (`exact_loss`), before it is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core.plan import Op
from .gathering import TEMPERATURE
from .groups import MeasuredGroup
from .norm import Norm
from .outputs import class_scores, floating, log_probabilities
from .replay import Replay
from .running import Chunk, evaluating, first_samples

SAMPLES, FEW = 16, 8
"""On how many inputs the losses of a plan's changes are measured, and on how many those of a whole frontier's."""


class LossMeter:
    """Measures what a model, which stays as it is, loses on a few calibration inputs with one op carried out."""

    def __init__(self, model: nn.Module, norm: Norm, outputs: str, chunk: Chunk) -> None:
        self._model, self._norm, self._outputs, self._chunk = model, norm, outputs, chunk
        self._replays = dict[int, Replay]()

    def loss(self, group: MeasuredGroup, op: Op, samples: int = SAMPLES) -> float:
        """The loss with one of a group's ops; infinite where outputs are not finite any more."""
        what = ["measured", op.action, op.path, op.settings, samples]
        return float(self._norm.once(what, (), lambda: self._measured(group, op, samples)))

    def _measured(self, group: MeasuredGroup, op: Op, samples: int) -> float:
        with torch.no_grad(), evaluating(self._model):
            replay = self._replay(samples)
            with group.trial(self._model, self._norm, op):
                after = replay.changed(group.changed(op))
        loss = exact_loss(replay.outputs, after, self._outputs)
        return loss if math.isfinite(loss) else math.inf

    def _replay(self, samples: int) -> Replay:
        """What the model makes of some inputs, all of the first chunk where it cannot be cut."""
        if samples not in self._replays:
            try:
                self._replays[samples] = Replay(self._model, first_samples(self._chunk, samples))
            except Exception:  # its first axis is no batch, or other inputs have one that was not seen
                self._replays[samples] = Replay(self._model, self._chunk)
        return self._replays[samples]


def exact_loss(first: object, second: object, outputs: str) -> float:
    """What a loss predicted from gradients stands for to second order, of outputs and of changed ones of a kind.

    For class scores the KL divergence of the predictions from halved scores, and half the squared relative error of the
    scores, off their mean; for other outputs the latter of each.
    """
    before, after = class_scores(first, outputs), class_scores(second, outputs)
    if before is None or after is None:
        pairs = list(zip(floating(first), floating(second)))
        return sum(_relative_square(a, b) if a.shape == b.shape else math.inf for a, b in pairs) / 2
    p, q = log_probabilities(before.double(), outputs), log_probabilities(after.double(), outputs)
    tempered, changed = ((each / TEMPERATURE).log_softmax(1) for each in (p, q))
    divergence = float((tempered.exp() * (tempered - changed)).sum(1).mean())
    return divergence + _relative_square(p - p.mean(1, keepdim=True), q - q.mean(1, keepdim=True)) / 2


def _relative_square(before: Tensor, after: Tensor) -> float:
    power = float(before.double().square().sum())
    return float((after - before).double().square().sum()) / power if power else 0.0
