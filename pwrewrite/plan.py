"""Plans: what to change in a model, as plain data and JSON.

Passes and planners *propose*; a plan records what they proposed; `pwrewrite.apply` alone carries it out.

A `Plan` is an ordered list of `Op` (what to do) beside the `Skip` records (what was refused, and why). An op names the
layer by its absolute path, says which form replaces it and with which widths, and holds no weights: a dry run prints the
plan, ``rewrite`` applies it and fills in weights, ``load`` applies it and fills in saved ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SkipReason(StrEnum):
    """Why a convolution is left as it is."""

    OVERRIDDEN_FORWARD = "overridden-forward"
    PARAMETRIZED = "parametrized"
    HOOKS = "hooks"
    SHARED_WEIGHT = "shared-weight"
    WEIGHT_READ = "weight-read"
    LAZY = "lazy"
    QUANTIZED = "quantized"
    COMPLEX = "complex"
    ALREADY_BOTTLENECK = "already-bottleneck"
    POINTWISE = "pointwise"
    DEPTHWISE = "depthwise"
    TOO_SMALL = "too-small"
    NO_GAIN = "no-gain"
    BELOW_SHARE = "below-share"
    EXCLUDED = "excluded"
    NOT_CALLED = "not-called"
    FUNCTIONAL = "functional"
    HELD_ELSEWHERE = "held-elsewhere"
    NOT_TRACED = "not-traced"
    NOT_LINEAR = "not-linear"
    WRONG_FORM = "wrong-form"
    BROKE_MODEL = "broke-model"


@dataclass(frozen=True, slots=True)
class Skip:
    """A layer that is not rewritten.

    Attributes:
        path: The layer's absolute path.
        reason: Why, as one of `SkipReason`.
        detail: A sentence that helps: what was found, and what would change it.
    """

    path: str
    reason: SkipReason
    detail: str

    def to_dict(self) -> dict[str, str]:
        """The same as plain JSON data."""
        return {"path": self.path, "reason": str(self.reason), "detail": self.detail}
