"""Runs a sweep and prints its table: ``python -m zoo [capture|replay|fuse|budget|export] [jobs]`` in ``tests``."""

import sys
from collections import Counter

from . import budgets, exporting, fusing
from .checks import check_capture, check_replay, summary
from .harness import RESULTS, sweep

if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "capture"
    jobs = int(sys.argv[2]) if len(sys.argv) > 2 else None
    if what == "capture":
        print(summary(sweep(check_capture, RESULTS / "capture.jsonl", jobs=jobs)))
    elif what == "fuse":
        print(fusing.summary(sweep(fusing.check_fuse, RESULTS / "fuse.jsonl", jobs=jobs)))
    elif what == "budget":
        rows = sweep(budgets.check_budget, RESULTS / "budget.jsonl", only=budgets.sampled(), jobs=jobs, timeout=1800)
        print(budgets.summary(rows))
    elif what == "export":
        rows = sweep(
            exporting.check_export, RESULTS / "export.jsonl", only=exporting.exportable(), jobs=jobs, timeout=1800
        )
        print(exporting.summary(rows))
    else:
        rows = sweep(check_replay, RESULTS / "replay.jsonl", jobs=jobs)
        print(Counter(row.get("replay", "error") for row in rows.values()))
        for key, row in sorted(rows.items()):
            if row.get("replay") == "different" or "error" in row:
                print(key, row.get("error", "different"))
