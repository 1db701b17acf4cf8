"""The sweep of rewriting: every dense k×k convolution of a model behind a full-rank bottleneck, outputs equal.

At full rank a bottleneck is the convolution itself, so whatever differs is a fault. All of torchvision and the first
model of each of 150 timm families are verified in every way; every other timm model up to 100 M parameters by one
forward on a small input.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import Any

import torch

from pwrewrite.capturing import capture
from pwrewrite.core.errors import CaptureError
from pwrewrite.passes import InsertBottleneck
from pwrewrite.workflows.rewrite import rewrite

from .harness import Built, Candidate, build, candidates

SIZES = (64, 96, 128)
"""Edges of small square inputs, tried in order before the model's own."""

LARGEST = 100_000_000
"""Parameters above which a timm model is left out."""

THOROUGH_LARGEST = 120_000_000
"""Parameters above which one forward has to do."""

FAMILIES = 150


def thorough_keys() -> set[str]:
    """Keys of the models that are verified in every way."""
    families: dict[str, str] = {}
    everything = candidates()
    for candidate in everything:
        if candidate.library == "timm":
            family = re.match(r"[a-z]+(?:_[a-z]{4,})?", candidate.name)
            families.setdefault(family[0] if family else candidate.name, candidate.key)
    chosen = set(list(families.values())[:FAMILIES])
    return chosen | {c.key for c in everything if c.library == "torchvision"}


_thorough: set[str] = set()


def check_rewrite(built: Built) -> dict[str, Any]:
    """Rewrites one model at full rank and verifies it."""
    if not _thorough:
        _thorough.update(thorough_keys())
    candidate = built.candidate
    params = sum(p.numel() for p in built.model.parameters())
    thorough = candidate.key in _thorough and params <= THOROUGH_LARGEST
    if candidate.library == "timm" and params > LARGEST:
        return {"left_out": f"{params:,} parameters"}
    if built.meta:
        inputs = small_inputs(built)
        built = build(candidate, real=True)
    else:
        inputs = small_inputs(built)
    shrink_transform(built.model)
    began = time.perf_counter()
    result = rewrite(built.model, inputs, passes=[InsertBottleneck(1.0, allow_growth=True)], thorough=thorough)
    proof = result.report.verification
    assert proof is not None
    return {
        "thorough": thorough,
        "input": [list(t.shape) for t in inputs if isinstance(t, torch.Tensor)],
        "edits": len(result.edits),
        "skips": dict(Counter(str(s.reason) for s in result.plan.skips)),
        "exact": all(edit.exact == "both" for edit in result.edits),
        "passed": proof.passed,
        "relative_error": proof.relative_error,
        "failures": [f"{c.name}: {c.detail}" for c in proof.failures],
        "notes": list(proof.notes),
        "seconds": round(time.perf_counter() - began, 2),
    }


def shrink_transform(model: Any) -> None:
    """Makes a detector resize its images to something small, where it lets one."""
    transform = getattr(model, "transform", None)
    if getattr(transform, "min_size", None) and not getattr(transform, "fixed_size", None):
        transform.min_size, transform.max_size = (160,), 200


def small_inputs(built: Built) -> tuple[Any, ...]:
    """Small real inputs that the model takes, or its own."""
    generator = torch.Generator().manual_seed(0)
    own = built.inputs
    if len(own) == 1 and isinstance(own[0], torch.Tensor) and own[0].dim() >= 4:
        for edge in SIZES:
            shape = (*own[0].shape[:-2], edge, edge)
            if edge >= own[0].shape[-1]:
                break
            try:
                capture(built.model, (torch.empty(shape, device="meta"),), values="meta")
            except CaptureError:
                continue
            return (torch.rand(shape, generator=generator),)

    def real(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.rand(value.shape, generator=generator) if value.is_meta else value
        return type(value)(real(v) for v in value)

    made: tuple[Any, ...] = real(own)
    return made


def rewrite_summary(rows: dict[str, dict[str, Any]]) -> str:
    """The table of a sweep."""
    lines = []
    for library in ("torchvision", "timm"):
        mine = {k: r for k, r in rows.items() if k.startswith(library)}
        ran = {k: r for k, r in mine.items() if "passed" in r}
        thorough, passed, edits = (sum(r[what] for r in ran.values()) for what in ("thorough", "passed", "edits"))
        left_out, errors = (sum(what in r for r in mine.values()) for what in ("left_out", "error"))
        lines.append(
            f"{library}: {len(mine)} models, {len(ran)} rewritten and verified ({thorough} in every way), "
            f"{passed} passed, {edits} layers edited, {left_out} left out, {errors} errors"
        )
    reasons: Counter[str] = Counter()
    for row in rows.values():
        reasons.update(row.get("skips", {}))
    lines.append("skips: " + ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()))
    for key, row in sorted(rows.items()):
        if "error" in row or not row.get("passed", True):
            lines.append(f"  {key}: {row.get('error') or row['failures']}"[:400])
    return "\n".join(lines)


def order() -> list[Candidate]:
    """Candidates, those that are verified in every way first."""
    chosen = thorough_keys()
    return sorted(candidates(), key=lambda c: c.key not in chosen)
