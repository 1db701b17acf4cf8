"""The sweep of budgets: 60% of a model's MACs in every form, calibrated, verified, saved and loaded again.

A sample of both zoos with random weights on small random inputs, so that what is lost says nothing; what is asked is
whether every form finds its way through models nobody here wrote: planned, carried out, fitted, proved, and the same
after loading. A model that cannot be brought there is refused, with reasons, and that is no failure.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pwrewrite
from pwrewrite.core.errors import RefusedError
from pwrewrite.core.nested import tensors_of
from pwrewrite.workflows.rewrite import Rewritten

from .fusing import _liven
from .harness import Built, Candidate, build, candidates
from .rewrites import shrink_transform, small_inputs

SAMPLE = 320
"""Models drawn."""

LARGEST = 10_000_000
"""Parameters above which a model is left out; one of 40 million takes some ten minutes."""

SHARE, IMAGES, BATCHES = 0.6, 8, 4


def sampled() -> list[Candidate]:
    """The models of the sweep, in a random order that is always the same."""
    return random.Random(0).sample(candidates(), SAMPLE)


def check_budget(built: Built) -> dict[str, Any]:
    """Brings one model to a part of its MACs, saves it and loads it again."""
    params = sum(p.numel() for p in built.model.parameters())
    if params > LARGEST:
        return {"skipped": f"{params:,} parameters"}
    inputs = small_inputs(built)
    if built.meta:
        built = build(built.candidate, real=True)
    _liven(built.model)
    shrink_transform(built.model)
    began = time.perf_counter()
    budget = pwrewrite.Budget({"macs": SHARE}, calibration=_batches(inputs))
    try:
        result = pwrewrite.rewrite(built.model, inputs, budget)
    except RefusedError as refusal:
        return {"refused": str(refusal)[:600], "seconds": round(time.perf_counter() - began, 2)}
    proof = result.report.verification
    assert proof is not None
    return {
        "input": [list(t.shape) for t in tensors_of(inputs)],
        "ops": dict(Counter(edit.op.action for edit in result.edits)),
        "macs": result.report.after["macs"] / result.report.before["macs"],
        "passed": proof.passed,
        "failures": [f"{c.name}: {c.detail}"[:300] for c in proof.failures],
        "notes": [str(note) for note in result.report.notes],
        "reloaded": proof.passed and _reloaded(result, built, inputs),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _batches(inputs: tuple[Any, ...]) -> list[Any]:
    """Random batches of the kind that the model takes."""
    generator = torch.Generator().manual_seed(1)
    if len(inputs) == 1 and isinstance(inputs[0], Tensor) and inputs[0].dim() >= 4:
        shape = (IMAGES, *inputs[0].shape[1:])
        return [torch.rand(shape, generator=generator) for _ in range(BATCHES)]
    return [inputs] * BATCHES


def _reloaded(result: Rewritten, built: Built, inputs: tuple[Any, ...]) -> bool:
    """Whether the saved model, loaded into another original, returns what the rewritten one returns."""
    with tempfile.TemporaryDirectory() as folder:
        saved = result.save(Path(folder) / "small")
        loaded = pwrewrite.load(saved, build(built.candidate, real=True).model)
    with torch.no_grad():
        wanted, found = (tensors_of(model(*inputs)) for model in (result.model, loaded))
    return all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """The figures of a sweep, then what failed."""
    ran = {k: r for k, r in rows.items() if "passed" in r}
    ops: Counter[str] = Counter()
    for row in ran.values():
        ops.update(row["ops"])
    refused, skipped, errors = (sum(what in r for r in rows.values()) for what in ("refused", "skipped", "error"))
    passed, reloaded = (sum(r[what] for r in ran.values()) for what in ("passed", "reloaded"))
    lines = [
        f"{len(rows)} models, {len(ran)} rewritten, {passed} verified, {reloaded} the same after loading, "
        f"{refused} refused, {skipped} too large, {errors} errors",
        f"ops: {dict(ops)}",
    ]
    for key, row in sorted(rows.items()):
        if "error" in row or "refused" in row:
            lines.append(f"  {key}: {row.get('error') or row['refused']}"[:400])
        elif "passed" in row and not (row["passed"] and row["reloaded"]):
            lines.append(f"  {key}: {row['failures'] or 'different after loading'}"[:400])
    return "\n".join(lines)
