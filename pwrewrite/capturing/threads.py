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
from typing import Protocol

from .state import replaced

APART, RECORDED, BUSY = range(3)
"""What a thread does is apart from the recording, recorded, or the recorder's own."""


class Here(threading.local):
    """What a recorder knows of one thread; ``scope`` has the paths of the modules whose code runs, innermost last."""

    state = APART

    def __init__(self) -> None:
        self.scope: list[str] = []

    @property
    def recorded(self) -> bool:
        """Whether what the thread does belongs to the recording."""
        return self.state != APART


class _Recorder(Protocol):
    @property
    def here(self) -> Here: ...

    def within(self, function: Callable[..., object], scope: list[str]) -> Callable[..., object]: ...


@contextmanager
def recorded_threads(recorder: _Recorder) -> Iterator[None]:
    """Records what a recorded thread starts or submits."""
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    def start_recorded(thread: threading.Thread) -> None:
        pool = getattr(thread, "_target", None)  # the workers of a pool outlive the recording; their work is recorded
        if recorder.here.recorded and getattr(pool, "__module__", "") != "concurrent.futures.thread":
            setattr(thread, "run", recorder.within(thread.run, recorder.here.scope))  # noqa: B010
        start(thread)

    def submit_recorded(
        self: ThreadPoolExecutor, fn: Callable[..., object], /, *args: object, **kwargs: object
    ) -> Future[object]:
        if recorder.here.recorded:
            fn = recorder.within(fn, recorder.here.scope)
        return submit(self, fn, *args, **kwargs)

    with replaced(threading.Thread, "start", start_recorded), replaced(ThreadPoolExecutor, "submit", submit_recorded):
        yield
