"""Statistics on disk, by content: a second plan for the same model and inputs need not calibrate again.

A file is named by a hash of the model's weights, operations and first outputs, the inputs and the settings. What an
interrupted calibration has gathered is stored too, and the next one goes on from there. Files are safetensors; the
oldest go when the folder outgrows `LIMIT`.
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
from torch import Tensor

from ..capturing.records import Capture
from ..core.errors import first_line
from ..core.files import cache_folder, new_file, prune
from ..core.nested import hash_tensors
from ..core.options import Budget
from .batches import Batches
from .running import wide_dtype
from .statistics import LayerStatistics, Statistics, Watched

LIMIT = 8 * 1024**3
"""Bytes that the statistics in the cache may take."""

_VERSION = "5"
_FACTS = ("samples", "chunks", "kind", "outcome", "outputs")


def statistics_file(
    capture: Capture, layers: Watched, batches: Batches, outputs: object, settings: Budget
) -> Path | None:
    """The file of the statistics of such layers, named by all that they depend on; None where nothing is cached.

    ``outputs``, of the first chunk, tell models apart that do something else with the same weights.
    """
    if (folder := cache_folder("statistics")) is None:
        return None
    facts = {"kind": settings.sensitivity, "seed": settings.seed, "outputs": settings.outputs, "chunk": batches.chunk}
    facts["values"] = hash_tensors(outputs)
    return folder / f"{content_key(capture, layers, batches.fingerprint, facts)}.safetensors"


def content_key(capture: Capture, layers: Watched, inputs: str, settings: Mapping[str, object]) -> str:
    """A hash of the model, the layers looked at, a hash of the inputs, and the settings."""
    digest = hashlib.sha256(f"{_VERSION}|{torch.__version__}|{inputs}|{json.dumps(settings, sort_keys=True)}".encode())
    digest.update(repr(sorted((path, repr(spec)) for path, spec in layers.items())).encode())
    for node in capture.graph.nodes:
        digest.update(f"{node.name}|{node.op}|{node.meta['info'].op}|{[a.name for a in node.all_input_nodes]}".encode())
    tensors = dict([*capture.model.named_parameters(), *capture.model.named_buffers()])
    digest.update(f"{list(tensors)}|{hash_tensors(tensors)}".encode())
    return digest.hexdigest()


def read_statistics(
    file: Path | None, device: torch.device, layers: Watched
) -> tuple[Statistics | None, bool, list[str]]:
    """The statistics in a file, whether they are complete, and a note on a damaged file, which is removed."""
    if file is None or not file.is_file():
        return None, False, []
    try:
        statistics, complete = _read(file, device)
        for path, sums in statistics.layers.items():
            _check(path, sums, LayerStatistics.empty(layers[path], torch.device("meta")))
        with suppress(OSError):
            os.utime(file)
        return statistics, complete, []
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        with suppress(OSError):
            file.unlink()
        note = f"the cached statistics in {file} were damaged and have been removed: {first_line(error)}"
        return None, False, [note]


def _read(file: Path, device: torch.device) -> tuple[Statistics, bool]:
    with safe_open(file, framework="pt", device=str(device)) as opened:
        facts = json.loads(opened.metadata()["pwrewrite"])
        statistics = Statistics(**{name: facts[name] for name in _FACTS})
        for name, kind in zip(_FACTS, (int, int, str, str, str), strict=True):
            if type(facts[name]) is not kind:
                raise TypeError(f"{name} is {facts[name]!r}")
        for number, layer in enumerate(facts["layers"]):
            statistics.layers[layer["path"]] = LayerStatistics(
                opened.get_tensor(f"{number}.inputs").to(wide_dtype(device)),
                opened.get_tensor(f"{number}.means"),
                float(layer["weight"]),
                int(layer["rows"]),
                opened.get_tensor(f"{number}.gradients") if layer["gradients"] else None,
                float(layer["gradient_weight"]),
            )
    return statistics, facts["complete"] is True


def _check(path: str, sums: LayerStatistics, empty: LayerStatistics) -> None:
    """Refuses sums that are not those of a layer."""
    gradients = sums.gradients
    square = gradients is None or (gradients.dim() == 3 and gradients.shape[1] == gradients.shape[2])
    if sums.inputs.shape != empty.inputs.shape or sums.means.shape != empty.means.shape or not square:
        raise ValueError(f"{path} has sums of another shape")
    finite = all(t is None or t.isfinite().all() for t in (sums.inputs, sums.means, gradients))
    if not finite or not all(0 <= n < float("inf") for n in (sums.weight, sums.rows, sums.gradient_weight)):
        raise ValueError(f"{path} has sums that are no numbers")


def write_statistics(file: Path | None, statistics: Statistics, *, complete: bool) -> None:
    """Caches statistics, if it can; a full disk or a folder that cannot be written is no error."""
    if file is None or not statistics.chunks:
        return
    tensors, layers = dict[str, Tensor](), []
    for number, (path, sums) in enumerate(statistics.layers.items()):
        tensors[f"{number}.inputs"] = sums.inputs.float().contiguous()
        tensors[f"{number}.means"] = sums.means.contiguous()
        if sums.gradients is not None:
            tensors[f"{number}.gradients"] = sums.gradients.contiguous()
        facts = {"path": path, "weight": sums.weight, "rows": sums.rows, "gradient_weight": sums.gradient_weight}
        layers.append({**facts, "gradients": sums.gradients is not None})
    about = {name: getattr(statistics, name) for name in _FACTS} | {"complete": complete, "layers": layers}
    with suppress(OSError, SafetensorError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as scratch:
            save_file(tensors, scratch, metadata={"pwrewrite": json.dumps(about)})
        prune(file.parent.glob("*.safetensors"), LIMIT)
