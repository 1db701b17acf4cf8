"""Work that a model does in threads of its own: `recorded_threads`.

A torch function mode belongs to one thread. So while a model is recorded, threads that it starts and work that it hands
to a ``concurrent.futures`` pool run under the recorder, and modules called with the recording's tensors are recorded in
any thread. Limits: functions (not modules) that other pools run in threads started before are not seen; tensors that
come back from them are counted, so that the report says that the totals are too low.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from .state import replaced

one_at_a_time = threading.RLock()
"""Held during a capture, which changes what calling a module does and sets random states and training flags."""

APART, RECORDED, BUSY = range(3)
"""What a thread does is apart from the recording, recorded, or the recorder's own."""


class Here(threading.local):
    """What a recorder knows of one thread; ``scope`` has the paths of the modules whose code runs, innermost last."""

    state = APART

    def __init__(self) -> None:
        self.scope: list[str] = []


Function = Callable[..., object]


@contextmanager
def recorded_threads(here: Here, within: Callable[[Function, list[str]], Function]) -> Iterator[None]:
    """Records what a recorded thread starts or submits, in what ``within`` makes of it."""
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    def start_recorded(thread: threading.Thread) -> None:
        pool = getattr(thread, "_target", None)  # the workers of a pool outlive the recording; their work is recorded
        if here.state != APART and getattr(pool, "__module__", "") != "concurrent.futures.thread":
            setattr(thread, "run", within(thread.run, here.scope))  # noqa: B010
        start(thread)

    def submit_recorded(pool: ThreadPoolExecutor, fn: Function, /, *args: object, **kwargs: object) -> Future[object]:
        return submit(pool, fn if here.state == APART else within(fn, here.scope), *args, **kwargs)

    with replaced(threading.Thread, "start", start_recorded), replaced(ThreadPoolExecutor, "submit", submit_recorded):
        yield
