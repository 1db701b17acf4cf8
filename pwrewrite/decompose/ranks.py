"""Rank choice: what a user writes, an energy threshold, and EVBMF, as a width of one side of a kernel.

A *width* is an integer. A *ratio* is a share of the channels on that side, per group. An explicit width is taken as it
is; one that was computed (from a ratio, an energy or EVBMF) is rounded to a multiple that hardware likes.
"""

from __future__ import annotations

import math
import operator
import re
from typing import SupportsIndex

import torch

from ..core.errors import UsageError
from ..core.numbers import ratio
from .layout import Factors
from .spectrum import Spectrum

#: What a rank may be given as: a width, a ratio, or either as text.
RankSpec = SupportsIndex | float | str


def default_multiple(channels: int) -> int:
    """8 for 64 channels and more, else 1."""
    return 8 if channels >= 64 else 1


def round_rank(rank: float, channels: int, multiple: int | None = None) -> int:
    """A computed rank as a width from 1 to ``channels`` (per group): the nearest multiple.

    A rank too small for any multiple is rounded to an integer instead, and one at the full width stays there. Raises
    `UsageError` for a multiple below 1.
    """
    multiple = default_multiple(channels) if multiple is None else multiple
    if multiple < 1:
        raise UsageError(f"cannot round ranks to a multiple of {multiple}", expected="1 or more", got=str(multiple))
    if rank >= channels:
        return channels
    rounded = multiple * math.floor(rank / multiple + 0.5)
    return min(channels, rounded or max(1, math.floor(rank + 0.5)))


def resolve_rank(spec: RankSpec, channels: int, multiple: int | None = None, name: str = "rank") -> int:
    """A width from 1 to ``channels`` (per group), from what a user wrote; raises `UsageError` for anything else.

    Args:
        spec: An integer or ``"32"`` is a width; a float in (0, 1], ``"0.5"`` or ``"50%"`` a ratio of ``channels``.
        channels: The channels on that side, per group where grouped.
        multiple: What a ratio is rounded to; None for `default_multiple`. A width is never rounded.
        name: What to call it in an error.
    """
    value = _parse(spec, name)
    if isinstance(value, int):
        if not 1 <= value <= channels:
            message, hint = f"{name} {spec!r} is not a width of {channels} channels", "a ratio is written 0.5 or 50%"
            raise UsageError(message, expected=f"an integer from 1 to {channels}", got=repr(spec), hint=hint)
        return value
    if not 0 < value <= 1:
        expected = "a number in (0, 1], or a percentage up to 100%"
        hint = "a width is written as an integer, without a point"
        raise UsageError(f"{name} {spec!r} is not a ratio", expected=expected, got=repr(spec), hint=hint)
    return round_rank(value * channels, channels, multiple)


def _parse(spec: RankSpec, name: str) -> int | float:
    """An int for a width and a float for a ratio."""
    try:
        if isinstance(spec, str):
            return int(spec) if re.fullmatch(r"\s*[+-]?\d+\s*", spec) else ratio(spec)
        if not isinstance(spec, bool):
            return operator.index(spec) if isinstance(spec, SupportsIndex) else float(spec)
    except (TypeError, ValueError):
        pass
    expected = "an integer such as 32, or a ratio such as 0.5 or '50%'"
    raise UsageError(f"{name} {spec!r} is neither a width nor a ratio", expected=expected, got=repr(spec))


def energy_rank(spectrum: Spectrum[Factors], energy: float) -> int:
    """The smallest rank, from 1, that keeps a share in (0, 1] of the energy ``‖W‖²`` (weighted, if the spectrum is)."""
    if not 0 < energy <= 1:
        raise UsageError(f"an energy of {energy!r} makes no sense", expected="a share in (0, 1]", got=repr(energy))
    lost = spectrum.relative_errors.square()
    return max(1, int(torch.argmax((lost <= 1 - energy).to(torch.int8)))) if lost[-1] <= 1 - energy else len(lost) - 1
