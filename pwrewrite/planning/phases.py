"""What trains a part of a training's steps: AdamW with a warm-up and a cosine, and an average of the weights (EMA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

_WARM, _AVERAGED = 0.05, 0.02
"""Parts of the steps: those that warm up, and those that the average of the weights reaches back."""


@dataclass
class Phase:
    """What trains some of the steps: the optimizer, its learning rate over them, and the average of the weights."""

    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    average: AveragedModel

    def _parts(self) -> tuple[Any, ...]:
        return self.optimizer, self.schedule, self.average

    def state(self) -> list[dict[str, Any]]:
        """What `load` takes."""
        return [part.state_dict() for part in self._parts()]

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """Goes on from an earlier state."""
        for part, state in zip(self._parts(), states, strict=True):
            part.load_state_dict(state)

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter], rate: float, steps: Callable[[], int]) -> Phase:
        """A new one, with its largest learning rate; how many ``steps`` there are may change on the way."""

        def share(step: int) -> float:
            warm = max(1, round(_WARM * steps()))
            done = (step - warm) / max(1, steps() - warm)
            return (step + 1) / (warm + 1) if done < 0 else (1 + math.cos(math.pi * min(1.0, done))) / 2

        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        decay = 1 - 1 / (1 + _AVERAGED * steps())
        mean = get_ema_multi_avg_fn(min(0.999, decay))  # type: ignore[no-untyped-call]
        average = AveragedModel(nn.ParameterList(parameters), multi_avg_fn=mean)
        return cls(optimizer, LambdaLR(optimizer, share), average)
