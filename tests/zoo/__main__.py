"""Runs a sweep and prints its table: ``python -m zoo SWEEP [JOBS]`` in ``tests``."""

import argparse
from collections import Counter
from functools import partial
from typing import Any

from . import budgets, exporting, fusing
from .checks import check_capture, check_replay, summary
from .harness import RESULTS, sweep


def _replayed(rows: dict[str, dict[str, Any]]) -> str:
    lines = [str(Counter(row.get("replay", "error") for row in rows.values()))]
    for key, row in sorted(rows.items()):
        if row.get("replay") == "different" or "error" in row:
            lines.append(f"{key} {row.get('error', 'different')}")
    return "\n".join(lines)


_calibrated = partial(sweep, budgets.check_budget, timeout=1800)
_exported = partial(sweep, exporting.check_export, timeout=1800)
SWEEPS = {
    "capture": lambda file, jobs: summary(sweep(check_capture, file, jobs=jobs)),
    "replay": lambda file, jobs: _replayed(sweep(check_replay, file, jobs=jobs)),
    "fuse": lambda file, jobs: fusing.summary(sweep(fusing.check_fuse, file, jobs=jobs)),
    "budget": lambda file, jobs: budgets.summary(_calibrated(file, only=budgets.sampled(), jobs=jobs)),
    "export": lambda file, jobs: exporting.summary(_exported(file, only=exporting.exportable(), jobs=jobs)),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m zoo", description="Sweeps every torchvision and timm model; resumable."
    )
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("jobs", type=int, nargs="?", help="worker processes; two, or one in a shard")
    given = parser.parse_args()
    print(SWEEPS[given.sweep](RESULTS / f"{given.sweep}.jsonl", given.jobs))
