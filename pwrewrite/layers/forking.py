"""A lock that a fork does not tear in two."""

from __future__ import annotations

import os
import threading

_PATIENCE = 60.0
"""Seconds that a fork waits for a lock; then the child gets a fresh one."""


class ForkSafeLock:
    """A reentrant lock: a fork waits until it is free, so that no child finds it held by a thread that it has not.

    Servers and data loaders fork while other threads work. Without this the child would wait for ever for a lock, and
    what the lock guards would be half done in it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waited = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._before, after_in_parent=self._after_in_parent, after_in_child=self._after_in_child
            )

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _before(self) -> None:
        self._waited = self._lock.acquire(timeout=_PATIENCE)

    def _after_in_parent(self) -> None:
        if self._waited:
            self._lock.release()

    def _after_in_child(self) -> None:
        if self._waited:
            self._lock.release()
        else:
            self._lock = threading.RLock()
