"""Records what the peers say of the models in `peers.MODELS`: ``python tests/benchmarks/record_conventions.py``.

With names of models it renews those only. Writes ``tests/golden/conventions.json``, which the ordinary tests compare
with where the peers are not installed. Where a peer fails on a model, its figure is null and the error is printed.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import peers
import quirks
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "conventions.json"
PACKAGES = ("torch", "torchvision", "timm", "fvcore", "thop", "ptflops", "torchinfo")


def record(name: str, model: nn.Module, x: Tensor) -> dict[str, Any]:
    figures: dict[str, Any] = {"input": list(x.shape)}
    for tool in peers.TOTALS:
        try:
            figures[tool] = peers.total(tool, copy.deepcopy(model), x)
        except Exception as error:
            print(f"  {tool} fails on {name}: {type(error).__name__}: {str(error)[:120]}")
            figures[tool] = None
    return figures


def main() -> None:
    torch.manual_seed(0)
    targets = sys.argv[1:] or list(peers.MODELS)
    models = json.loads(GOLDEN.read_text())["models"] if GOLDEN.exists() and sys.argv[1:] else {}
    for target in targets:
        print(target, flush=True)
        models[target] = record(target, peers.build(target), torch.rand(peers.shape(target)))
    small = {name: record(name, model, torch.rand(quirks.SHAPE)) for name, model in quirks.quirks().items()}
    golden = {"versions": {name: peers.version(name) for name in PACKAGES}, "models": models, "quirks": small}
    text = json.dumps(golden, indent=1)
    GOLDEN.write_text(re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n")


if __name__ == "__main__":
    main()
