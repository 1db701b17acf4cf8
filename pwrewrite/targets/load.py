"""The whole way from a target string to a model with its weights and inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..core.errors import TargetError, WeightsError
from .checkpoints import SUFFIXES
from .empty import empty_weights
from .inputs import ExampleInputs, parse_input, resolve_inputs
from .resolve import TargetInfo, resolve_model
from .user_code import suggest_files
from .weights import load_weights


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be captured.

    Attributes:
        model: In eval mode.
        example_inputs: A tuple of positional inputs or a dict of keyword ones; empty when none were asked for.
        target: As the user gave it.
        notes: What the user should be told: what was assumed, chosen or left out.
    """

    model: nn.Module
    example_inputs: ExampleInputs
    target: str
    notes: tuple[str, ...] = ()


def load_target(
    target: str,
    *,
    args: Mapping[str, object] | None = None,
    weights: Path | None = None,
    weights_lenient: bool = False,
    inputs: Sequence[str] = (),
    need_inputs: bool = True,
    empty: bool = False,
) -> LoadedModel:
    """Builds a model, fills in weights and finds inputs for it.

    Args:
        target: ``model.py``, ``model.py:NAME``, ``package.module:NAME``, ``torchvision:NAME`` or ``timm:NAME``.
        args: Arguments for whatever makes the model, by name.
        weights: A checkpoint; without one the model keeps the weights it was made with.
        weights_lenient: Accept a checkpoint that fits in part.
        inputs: The texts of ``--input``: ``[NAME=]SHAPE[:DTYPE]``.
        need_inputs: Whether inputs are wanted at all.
        empty: Build without memory for the weights: parameters are on the meta device, buffers and inputs are real, and
            a checkpoint's tensors take the place of the empty ones. A model that does not bear this is built wholly on
            meta, or for real.

    Returns:
        The model, its inputs, and notes.

    Raises:
        TargetError: The target does not lead to one model (``TargetNotFound`` where there is no such file).
        WeightsError: The checkpoint cannot be read, is not safe to read, or does not fit.
        InputError: An input is malformed, or none was given and none can be known.
    """
    for text in inputs:  # what is cheap to refuse is refused before a model is built
        parse_input(text)
    if weights is not None and "://" not in str(weights) and not weights.exists():
        raise WeightsError(f"no such file: {weights}", hint=suggest_files(weights, SUFFIXES))
    model, info = _resolve_empty(target, args) if empty else resolve_model(target, args)
    notes = info.notes
    if weights is not None:
        notes += load_weights(model, weights, weights_lenient)
    example: ExampleInputs = ()
    if need_inputs:
        example, told = resolve_inputs(model, info, inputs)
        notes += told
    return LoadedModel(model, example, target, notes)


def _resolve_empty(target: str, args: Mapping[str, object] | None) -> tuple[nn.Module, TargetInfo]:
    """Builds a model with empty weights, else all on meta (for what probes itself when built), or else for real."""
    for empty in (empty_weights(), torch.device("meta")):
        try:
            with empty:
                return resolve_model(target, args)
        except TargetError as error:
            if not isinstance(error.__cause__, RuntimeError):  # torch's complaints about meta are of this kind
                raise
    return resolve_model(target, args)
