"""Statistics on disk, by content: a second plan for the same model and inputs need not calibrate again.

A file is named by a hash of the model's weights and operations, the inputs and the settings. What an interrupted
calibration has gathered is stored too, and the next one goes on from there. Files are safetensors; the oldest go when
the folder outgrows `LIMIT`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..capturing.records import Capture
from ..core.convolution import ConvSpec
from ..core.files import new_file
from .statistics import LayerStatistics, Statistics

LIMIT = 8 * 1024**3
"""Bytes that the statistics in the cache may take."""

_VERSION = "2"
_FACTS = ("samples", "chunks", "kind", "outcome", "outputs")


def content_key(capture: Capture, layers: Mapping[str, ConvSpec], inputs: str, settings: Mapping[str, object]) -> str:
    """A hash of all that statistics depend on.

    Args:
        capture: The model.
        layers: The layers looked at.
        inputs: A hash of the inputs.
        settings: Seed, kind and the like.
    """
    digest = hashlib.sha256(f"{_VERSION}|{torch.__version__}|{inputs}|{json.dumps(settings, sort_keys=True)}".encode())
    digest.update(repr(sorted((path, repr(spec)) for path, spec in layers.items())).encode())
    for node in capture.graph.nodes:
        digest.update(f"{node.name}|{node.op}|{node.meta['info'].op}|{[a.name for a in node.all_input_nodes]}".encode())
    _add_weights(digest, capture.model)
    return digest.hexdigest()


def _add_weights(digest: hashlib._Hash, model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_statistics(folder: Path | None, key: str, device: torch.device) -> tuple[Statistics | None, bool]:
    """What is cached under a key.

    Returns:
        The statistics, None where there are none that can be read, and whether they are complete.
    """
    if folder is None:
        return None, False
    file = folder / f"{key}.safetensors"
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            facts = json.loads(opened.metadata()["pwrewrite"])
            statistics = Statistics(**{name: facts[name] for name in _FACTS})
            for number, layer in enumerate(facts["layers"]):
                gradients = opened.get_tensor(f"{number}.gradients") if layer["gradients"] else None
                statistics.layers[layer["path"]] = LayerStatistics(
                    opened.get_tensor(f"{number}.inputs").to(torch.float64 if device.type != "mps" else torch.float32),
                    opened.get_tensor(f"{number}.means"),
                    layer["weight"],
                    layer["rows"],
                    gradients,
                    layer["gradient_weight"],
                )
        with suppress(OSError):
            os.utime(file)
        return statistics, bool(facts["complete"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None, False


def write_statistics(folder: Path | None, key: str, statistics: Statistics, *, complete: bool) -> None:
    """Caches statistics, if it can; a full disk or a folder that cannot be written is no error."""
    if folder is None or not statistics.chunks:
        return
    tensors: dict[str, Tensor] = {}
    layers = []
    for number, (path, sums) in enumerate(statistics.layers.items()):
        tensors[f"{number}.inputs"] = sums.inputs.float().contiguous()
        tensors[f"{number}.means"] = sums.means.contiguous()
        if sums.gradients is not None:
            tensors[f"{number}.gradients"] = sums.gradients.contiguous()
        facts = {"path": path, "weight": sums.weight, "rows": sums.rows, "gradient_weight": sums.gradient_weight}
        layers.append({**facts, "gradients": sums.gradients is not None})
    about = {name: getattr(statistics, name) for name in _FACTS} | {"complete": complete, "layers": layers}
    file = folder / f"{key}.safetensors"
    with suppress(OSError, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(file) as scratch:
            save_file(tensors, scratch, metadata={"pwrewrite": json.dumps(about)})
        _prune(folder, file)


def _prune(folder: Path, newest: Path) -> None:
    """Removes the files used longest ago until the rest fit."""
    files = sorted((f for f in folder.glob("*.safetensors") if f != newest), key=lambda f: f.stat().st_mtime)
    total = newest.stat().st_size + sum(f.stat().st_size for f in files)
    for file in files:
        if total <= LIMIT:
            break
        total -= file.stat().st_size
        file.unlink(missing_ok=True)
