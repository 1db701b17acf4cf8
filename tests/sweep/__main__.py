"""``python -m sweep FIRST COUNT [CHECK …]`` in ``tests``: one JSON line per network, faults counted at the end.

Alarms after a minute per check. Run it at low priority: ``nice python -m sweep 0 3000 > sweep.jsonl``.
"""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))  # where pytest looks, too

from .checks import CHECKS, check
from .networks import network

LIMIT = 60
"""Seconds for one check."""


def alarm(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"took more than {LIMIT} s")


def main(first: int, count: int, names: list[str]) -> int:
    """Runs the checks; the number of networks with a fault."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, alarm)
    faults, refusals = Counter[str](), Counter[str]()
    faulty = 0
    for seed in range(first, first + count):
        row: dict[str, dict[str, str]] = {}
        for name in names:
            signal.alarm(LIMIT)
            row[name] = check(network(seed), name)
            signal.alarm(0)
            faults[name] += "fault" in row[name]
            refusals[name] += "refused" in row[name]
        bad = any("fault" in result for result in row.values())
        faulty += bad
        told = {name: result for name, result in row.items() if result}
        print(json.dumps({"seed": seed, "parts": network(seed).parts, **told}, ensure_ascii=False), flush=True)
    print(f"{count} networks, {faulty} with a fault {dict(faults)}; refused: {dict(refusals)}", file=sys.stderr)
    return faulty


if __name__ == "__main__":
    sys.exit(1 if main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(CHECKS)) else 0)
