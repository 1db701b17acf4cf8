"""Keeps what C code prints off standard output, which belongs to reports and to the caller."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def descriptor_to_stderr() -> Iterator[None]:
    """While this holds, file descriptor 1 is stderr: C code (a solver, a profiler) prints past Python's stdout."""
    try:
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()
        stdout = os.dup(1)
    except (OSError, ValueError):  # closed
        yield
        return
    try:
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.dup2(stdout, 1)
            os.close(stdout)
