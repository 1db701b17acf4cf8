"""What verifying a rewrite costs in forward passes: ``python tests/benchmarks/bench_verify.py [--rounds N] [MODEL …]``.

Every model gets a bottleneck of half the width in place of its heavy convolutions, the default of a rewrite. Then
the original runs at the example input, in evaluation and without gradients, and the rewrite is verified, in turns;
figures are medians. The processor's time is counted, which a busy machine spares, on one thread.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any

import peers
import torch
from bench_analyze import table, timed, verdict
from torch import nn

import pwrewrite

MODELS = (
    "resnet18", "resnet50", "squeezenet1_1", "densenet121", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x1_0"
)  # fmt: skip
GOAL = 12.0
"""Forward passes that a verification should take at most."""


def verification(model: nn.Module, x: torch.Tensor, rank: float) -> Callable[[], pwrewrite.Verification]:
    """The verification that a rewrite makes, to be repeated."""
    workflow = import_module("pwrewrite.workflows.rewrite")
    verify, calls = workflow.verify, list[Callable[[], Any]]()

    def kept(*args: Any, **options: Any) -> pwrewrite.Verification:
        calls.append(partial(verify, *args, **options))
        return calls[-1]()

    workflow.verify = kept
    try:
        pwrewrite.rewrite(model, x, [pwrewrite.passes.InsertBottleneck(rank)])
    finally:
        workflow.verify = verify
    return calls[0]


def bench(names: list[str], rounds: int, rank: float, size: int) -> bool:
    rows, fine = [], True
    for name in names:
        model, x = peers.build(f"torchvision:{name}"), torch.rand(1, 3, size, size)
        verify = verification(model, x, rank)
        with torch.no_grad():
            model(x)
            turns = [[timed(partial(model, x)).cpu for _ in range(3)] + [timed(verify).cpu] for _ in range(rounds)]
        forward, whole = median(t for *ones, _ in turns for t in ones), median(t[-1] for t in turns)
        proof = verify()
        fine &= whole / forward <= GOAL and proof.passed
        passed = f"{sum(c.passed for c in proof.checks)} of {len(proof.checks)}"
        met = verdict(whole / forward <= GOAL)
        rows.append(
            [name, f"{forward * 1e3:.1f}", f"{whole * 1e3:.0f}", f"{whole / forward:.1f}", f"≤ {GOAL:g}", met, passed]
        )
    print(f"Verification of a rewrite to {rank:g} of the width, {size}×{size}, median of {rounds} rounds")
    table(["model", "forward ms", "verify ms", "forwards", "goal", "", "checks"], rows)
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description="What verifying a rewrite costs, in forward passes.")
    parser.add_argument("models", nargs="*", default=MODELS, help="names of torchvision models")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the median is taken")
    parser.add_argument("--rank", type=float, default=0.5, help="width of the bottlenecks; 1 for exact ones")
    parser.add_argument("--size", type=int, default=224, help="height and width of the image")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, 1 thread\n")
    if not bench(list(wanted.models), wanted.rounds, wanted.rank, wanted.size) and wanted.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
