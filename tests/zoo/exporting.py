"""What the sweep of `export` checks of a model: as it is, at half rank and fused, in every format.

Every torchvision classifier and every model of ``examples``; a row holds for each variant and format whether every
output agreed in its own runtime, or what was said instead.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

import pwrewrite
from pwrewrite.core.errors import PwrewriteError
from pwrewrite.core.names import EXPORT_NAMES

from .fusing import _prepare, _smaller
from .harness import Built, Candidate, build

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT = 60_000_000


def exportable() -> list[Candidate]:
    """Torchvision's classifiers and the examples."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    examples = [Candidate("examples", file.stem) for file in sorted(EXAMPLES.glob("*.py"))]
    return [*examples, *(Candidate("torchvision", n) for n in names if not n.startswith("quantized_"))]


def check_export(built: Built) -> dict[str, Any]:
    """Exports a model in its variants."""
    params = sum(p.numel() for p in built.model.parameters())
    if params > LIMIT:
        return {"skipped": f"{params:,} parameters"}
    if built.meta:
        built = build(built.candidate, real=True)
    _prepare(built.model)
    inputs = _smaller(built)
    row: dict[str, Any] = {}
    for variant in ("original", "half rank", "fused"):
        row[variant] = _exported(built.model, inputs, variant)
    row["passed"] = all(said == "agrees" for each in row.values() for said in each.values())
    return row


def _exported(model: nn.Module, inputs: tuple[Any, ...], variant: str) -> dict[str, str]:
    """Format to ``agrees``, or to what was said."""
    try:
        if variant == "half rank":
            passes = [pwrewrite.passes.InsertBottleneck(0.5, min_gain=0.0)]
            model = pwrewrite.rewrite(model, inputs, passes, verify=False).model
        elif variant == "fused":
            model = pwrewrite.fuse(model, inputs, verify=False).model
        with TemporaryDirectory() as folder:
            done = pwrewrite.export(model, inputs, to=EXPORT_NAMES, out=Path(folder, "out"))
    except PwrewriteError as refusal:
        said = f"{refusal.message}: {refusal.got}" if refusal.got else refusal.message
        return dict.fromkeys(EXPORT_NAMES, f"refused: {said}"[:300])
    frozen = any(note.startswith("static") for note in done.notes)
    return {
        each.format: ("static" if frozen else "agrees") if each.passed else f"{each.differs_at}: {each.detail}"[:300]
        for each in done.formats
    }


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """The figures of a sweep, then what does not agree."""
    counted: Counter[str] = Counter()
    lines = []
    for key, row in sorted(rows.items()):
        if "error" in row or "skipped" in row:
            lines.append(f"{key}: {str(row.get('error') or row.get('skipped'))[:200]}")
            continue
        for variant in ("original", "half rank", "fused"):
            for name, said in row[variant].items():
                counted[said if said in ("agrees", "static") else said.partition(":")[0][:40]] += 1
                if said != "agrees":
                    lines.append(f"{key} {variant} {name}: {said}")
    return "\n".join([f"{len(rows)} models, {counted.total()} exports: {dict(counted)}", *lines])
