"""What is asked of every network: each check returns what is wrong; a refusal with a reason is no fault."""

from __future__ import annotations

import copy
import random
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from random_networks import fingerprint
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pwrewrite
from pwrewrite import passes
from pwrewrite.core.errors import CaptureError, InputError, RefusedError
from pwrewrite.core.nested import tensors_of

from .networks import Network

UNCOUNTED = {"recurrent", "lost", "by value"}
"""Parts whose MACs depend on values, or that pwrewrite says it does not see."""

FORMING = tuple(passes.FACTORIZING.values())


def outputs(model: nn.Module, x: Tensor) -> list[Tensor] | None:
    """All tensors that a copy of a model returns; None where it does not run."""
    try:
        with torch.no_grad():
            return [t for t in tensors_of(copy.deepcopy(model)(x.clone())) if t.is_floating_point()]
    except (RuntimeError, ValueError, IndexError):
        return None


def inputs_beside(x: Tensor, seed: int) -> Iterator[Tensor]:
    """Other inputs of the same kind: negated, larger values, another batch, other sizes."""
    generator = torch.Generator().manual_seed(seed)
    yield x
    yield -x
    yield torch.randn(x.shape, generator=generator, dtype=x.dtype) * 4
    yield torch.randn((x.shape[0] + 1, *x.shape[1:]), generator=generator, dtype=x.dtype) + 0.5
    yield torch.randn((*x.shape[:2], *(n + 3 for n in x.shape[2:])), generator=generator, dtype=x.dtype)


def differing(model: nn.Module, other: nn.Module, x: Tensor, seed: int) -> str:
    """Where a model and another one differ; ``""`` where they do not."""
    limit = 2e-3 if x.dtype == torch.float32 else 1e-8
    for i, value in enumerate(inputs_beside(x, seed)):
        expected = outputs(model, value)
        if expected is None:
            continue
        got = outputs(other, value)
        if got is None:
            return f"does not run on input {i}, {tuple(value.shape)}, where the original does"
        for a, b in zip(expected, got, strict=True):
            off = float((a - b).norm()) / (float(a.norm()) + 1e-3) if a.shape == b.shape and a.dtype == b.dtype else 9.0
            if not off <= limit and bool(a.isfinite().all()):
                return f"differs by {off:.1e} on input {i}, {tuple(value.shape)}"
    return ""


def analysis(network: Network) -> str:
    """Analysis runs, renders, and counts what torch counts."""
    report = pwrewrite.analyze(network.model, network.x)
    assert str(report)
    data = report.to_dict()
    if UNCOUNTED & set(network.parts) or any("hook" in part for part in network.parts):
        return ""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(network.model)(network.x.clone())
    mine, theirs = data["totals"]["macs"], counter.get_total_flops() // 2
    # torch counts neither the matrix-vector products of a spectral norm nor attention's own kernel
    spectral = any(name.endswith("_u") for name in network.model.state_dict())
    if mine == theirs or (mine > theirs and (spectral or "attention" in network.parts)):
        return ""
    return f"{mine} MACs, torch counts {theirs}"


def failures(result: Any) -> str:
    """The checks of a result's own proof that failed."""
    if result.report.passed:
        return ""
    return "; ".join(f"{c.name}: {c.detail}" for c in result.report.verification.checks if not c.passed)


def full_rank(network: Network) -> str:
    """At full rank a rewrite is the same model."""
    kind = random.Random(network.x.numel()).choice(FORMING)
    rank = "100%"
    result = pwrewrite.rewrite(network.model, network.x, [kind(rank, allow_growth=True)])
    return failures(result) or differing(network.model, result.model, network.x, 1)


def half_rank(network: Network) -> str:
    """At half rank it passes its own proof."""
    chosen = random.Random(network.x.numel() + 1).sample(FORMING, 2)
    result = pwrewrite.rewrite(network.model, network.x, [kind("50%", replan=True, multiple=1) for kind in chosen])
    return failures(result)


def budget(network: Network) -> str:
    """A budget is met or refused."""
    result = pwrewrite.rewrite(network.model, network.x, budget={"macs": 0.7})
    return failures(result)


def calibrated(network: Network) -> str:
    """The same with calibration inputs."""
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(network.x.shape, generator=generator, dtype=network.x.dtype) for _ in range(16)]
    return failures(pwrewrite.rewrite(network.model, network.x, budget={"macs": 0.8}, calibration=batches))


def fuse(network: Network) -> str:
    """A fused model is the same."""
    result = pwrewrite.fuse(network.model, network.x)
    return failures(result) or differing(network.model, result.model, network.x, 3)


def freeze(network: Network) -> str:
    """A fused and frozen model is the same."""
    fused = pwrewrite.fuse(network.model, network.x).model
    frozen = pwrewrite.freeze(copy.deepcopy(fused))  # without any edit it is the network itself
    limit = 2e-3 if network.x.dtype == torch.float32 else 1e-8
    for i, value in enumerate((network.x, -network.x)):
        expected = outputs(network.model, value)
        with torch.no_grad():
            got = [t for t in tensors_of(frozen(value.clone())) if t.is_floating_point()]
        for a, b in zip(expected or (), got):
            off = float((a - b).norm()) / (float(a.norm()) + 1e-3)
            if not off <= limit:
                return f"differs by {off:.1e} on input {i}"
    return ""


CHECKS: dict[str, Callable[[Network], str]] = {
    check.__name__: check for check in (analysis, full_rank, half_rank, budget, calibrated, fuse, freeze)
}


def state(model: nn.Module) -> dict[str, Any]:
    """What must stay, without how often a tensor was written."""
    known = fingerprint(model)
    for key, value in known.items():
        if key.endswith((":_parameters", ":_buffers")):
            known[key] = [(name, identity, held and held[:4]) for name, identity, held in value]
    return known


def check(network: Network, name: str) -> dict[str, str]:
    """One check of a network: ``fault``, ``refused`` or neither; and that the network stayed as it was."""
    before = state(network.model)
    try:
        fault = CHECKS[name](network)
        result = {"fault": fault} if fault else {}
    except (RefusedError, CaptureError, InputError) as refused:
        result = {"refused": f"{type(refused).__name__}: {refused.message}"}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        result = {"fault": f"{type(error).__name__} in {last.name}, line {last.lineno}: {str(error)[:200]}"}
    if state(network.model) != before:
        result["fault"] = "the network was changed; " + result.get("fault", "")
    return result
