"""A sign of life on stderr: one bar over all steps where a person is watching, a line now and then where nobody is.

How far the work is follows from `_STEPS`, which says what usually takes how long; what a command leaves out is jumped
over, and the bar never goes back. What is left is the time so far, stretched to the whole: a rough figure. Each stage
of a run in stages (``fuse 2/4 · verifying``) has a bar of its own.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from ..core.text import plain

Say = Callable[[str, float | None], None]

_STEPS = (
    ("loading", 3), ("analysing", 3), ("capturing", 1), ("measuring", 1), ("reading the calibration", 1),
    ("calibrating", 30), ("storing", 1), ("looking at", 15), ("timing", 5), ("trying", 5), ("proposing", 2),
    ("rewriting", 15), ("fitting", 20), ("recovering", 60), ("verifying", 20), ("measuring on", 5), ("timing both", 5),
    ("saving", 1), ("which axes", 2), ("running the model", 2), ("torch.export", 10), ("writing", 20),
    ("running at", 30),
)  # fmt: skip
"""What a step's text holds, and its usual share of the time, in the order in which they come."""
_EXPORTING = 18
"""Where in them the steps of an export begin."""

_WIDTH = 60
_STAGE = re.compile(r"\w+ \d+/\d+ · ")


class Work:
    """How far some work is: the step (``what``), and the part of it all that is done (0 to 1)."""

    def __init__(self) -> None:
        self.what, self.stage = "starting", ""
        self._begin()

    def _begin(self) -> None:
        self.done, self.began = 0.0, time.monotonic()
        self._taken: set[int] = set()

    def go_on(self, what: str, share: float | None) -> None:
        """Takes note of a step, and of the part of it that is done."""
        what = plain(what)
        stage = what.partition(" · ")[0] if _STAGE.match(what) else self.stage
        if stage != self.stage:
            self.stage = stage
            self._begin()
        self.what = what if len(what) <= _WIDTH else f"…{what[1 - _WIDTH :]}"
        steps = [i for i, (name, _) in enumerate(_STEPS) if name in what]
        if not steps:
            return
        step = max(steps, key=lambda i: len(_STEPS[i][0]))
        self._taken.add(step)
        before = sum(_STEPS[i][1] for i in self._taken - {step})
        last = _EXPORTING if step < _EXPORTING else len(_STEPS)
        after = sum(weight for i, (_, weight) in enumerate(_STEPS[:last]) if i > step and i not in self._taken)
        done = before + _STEPS[step][1] * (share or 0.0)
        self.done = max(self.done, done / (before + _STEPS[step][1] + after))

    def times(self) -> str:
        """``12 s``, and what is left where that can be guessed: ``12 s, about 30 s left``."""
        spent = time.monotonic() - self.began
        left = spent * (1 - self.done) / self.done if self.done > 0.05 and spent > 2 else None
        return _duration(spent) + (f", about {_duration(left)} left" if left is not None else "")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@contextmanager
def progressing(*, lines: bool = True, steps: bool = False, after: float = 1.0, every: float = 10.0) -> Iterator[Say]:
    """Shows what is going on, how much of it is done and how long it takes.

    Args:
        lines: Whether anything is shown.
        steps: Whether every step is shown on a line of its own.
        after: Seconds before the bar shows.
        every: Seconds between lines where no person is watching.

    Yields:
        What to call with each step.
    """
    out, work, stop = sys.stderr, Work(), threading.Event()
    watched = out.isatty() and os.environ.get("TERM") != "dumb"

    began = time.monotonic()

    def say(what: str, share: float | None) -> None:
        if steps and what != work.what:
            _write(out, f"{_duration(time.monotonic() - began)}: {what}")
        work.go_on(what, share)

    if not lines:
        yield lambda what, share: None
        return
    show = _show_bar if watched and not steps else _show_lines
    thread = threading.Thread(target=show, args=(out, work, stop, after if watched else every, every), daemon=True)
    thread.start()
    try:
        yield say
    finally:
        stop.set()
        thread.join()


def _write(out: TextIO, text: str) -> None:
    try:
        out.write(f"{text}\n")
        out.flush()
    except OSError:  # the reader went away
        pass


def _show_lines(out: TextIO, work: Work, stop: threading.Event, after: float, every: float) -> None:
    while not stop.wait(every):
        _write(out, f"… {work.what} ({work.done:.0%} done, {work.times()})")


def _show_bar(out: TextIO, work: Work, stop: threading.Event, after: float, every: float) -> None:
    if stop.wait(after):
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[times]}"),
        console=Console(file=out),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task, stage = bar.add_task(escape(work.what), total=1.0, times=""), work.stage
    with bar:
        while not stop.wait(0.1):
            if work.stage != stage:
                bar.update(task, description=escape(stage or "loading"), completed=1.0, times="")
                task, stage = bar.add_task(escape(work.what), total=1.0, times=""), work.stage
            bar.update(task, description=escape(work.what), completed=work.done, times=work.times())
