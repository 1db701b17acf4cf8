"""Runs the capture sweep outside pytest and prints its table: ``python -m zoo [jobs]`` with ``tests`` on the path."""

import sys

from .checks import check_capture, summary
from .harness import RESULTS, sweep

if __name__ == "__main__":
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    print(summary(sweep(check_capture, RESULTS / "capture.jsonl", jobs=jobs)))
