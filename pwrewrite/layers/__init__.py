"""A layer and its activation in one kernel: `PointwiseActivation`, and the activations that have one."""

from __future__ import annotations

from .known import ACTIVATIONS
from .pointwise_activation import PointwiseActivation

__all__ = ["ACTIVATIONS", "PointwiseActivation"]
