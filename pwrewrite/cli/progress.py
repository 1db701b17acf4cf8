"""A sign of life on stderr: a progress bar where something takes longer than a moment and a person is watching."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Say = Callable[[str, float | None], None]

_WIDTH = 60


@contextmanager
def progressing(*, after: float = 1.0, stream: TextIO | None = None) -> Iterator[Say]:
    """Shows what is going on and, where that is known, how much of it is done.

    Args:
        after: Seconds before it shows.
        stream: Where to show it; stderr by default.

    Yields:
        What to call with each step.
    """
    out = stream or sys.stderr
    if not out.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=Console(file=out),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = bar.add_task("starting", total=None)
    lock, done = threading.Lock(), threading.Event()

    def begin() -> None:
        with lock:
            if not done.is_set():
                bar.start()

    def say(what: str, share: float | None) -> None:
        shown = what if len(what) <= _WIDTH else f"…{what[-_WIDTH:]}"
        bar.update(task, description=escape(shown), total=None if share is None else 1.0, completed=share or 0.0)

    timer = threading.Timer(after, begin)
    timer.daemon = True
    timer.start()
    try:
        yield say
    finally:
        timer.cancel()
        with lock:
            done.set()
            bar.stop()
