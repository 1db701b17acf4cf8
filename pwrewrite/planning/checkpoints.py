"""Where a training that is not finished is kept, and the result of one that is: files of the cache, by content.

A file is named by a hash of both models' weights and first outputs, the inputs, labels and settings, so that the same
call finds it, and no other does. Files are torch's, read with ``weights_only``; those used longest ago go when all
outgrow `LIMIT`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import OutputError
from ..core.files import cache_folder, new_file, prune
from ..core.nested import hash_tensors
from .batches import Batches
from .running import evaluating, run_seeded

LIMIT = 4 * 1024**3
"""Bytes that the files may take."""

_VERSION = "2"


def checkpoint_file(
    models: tuple[nn.Module, nn.Module], batches: Batches, labels: Tensor | None, settings: Mapping[str, object]
) -> Path | None:
    """The file of a training, named by all that it depends on; None where nothing is cached."""
    if (folder := cache_folder("recovery")) is None:
        return None
    facts = json.dumps([_VERSION, torch.__version__, batches.fingerprint, settings], sort_keys=True, default=str)
    tensors = [dict([*model.named_parameters(), *model.named_buffers()]) for model in models]
    outputs = []
    for model in models:
        with torch.no_grad(), evaluating(model):
            outputs.append(run_seeded(model, batches.first()[0], 0))
    digest = hashlib.sha256(f"{facts}|{list(map(list, tensors))}|{hash_tensors([tensors, labels, outputs])}".encode())
    return folder / f"{digest.hexdigest()}.pt"


def read_checkpoint(file: Path | None) -> dict[str, Any] | None:
    """What was kept; None where nothing was, or it is damaged."""
    if file is None or not file.is_file():
        return None
    with suppress(Exception):  # whatever torch raises for a damaged file; the training begins anew then
        state = torch.load(file, map_location="cpu", weights_only=True)
        file.touch()
        return state if isinstance(state, dict) else None
    return None


def write_checkpoint(file: Path | None, state: Mapping[str, Any]) -> bool:
    """Keeps a state, whole or not at all; whether it could: a full disk is no error."""
    if file is None:
        return False
    with suppress(OSError, OutputError, RuntimeError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as scratch:
            torch.save(dict(state), scratch)
        prune(file.parent.glob("*.pt"), LIMIT)
        return True
    return False
