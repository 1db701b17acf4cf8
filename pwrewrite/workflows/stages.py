"""Stages of a long run, each done once for the same inputs.

What a stage makes is a folder of the cache, named by a hash of what it is made from: the facts of its own and, through
the hash before it, those of every earlier stage. It gets there whole or not at all, so a run that was killed goes on
with the first stage that is not there. The folders used longest ago go when all of them outgrow `LIMIT`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from ..core.errors import OutputError, PwrewriteError, first_line
from ..core.files import cache_folder, lacks_room, prune
from .steps import Progress

T = TypeVar("T")

LIMIT = 8 * 1024**3
"""Bytes that stages in the cache may take."""

_FOLDER = re.compile(r"[a-z]+-[0-9a-f]{64}")


class Stages:
    """The stages of one run in order, in the cache's part ``kind``; a context, which tidies the cache up.

    Attributes:
        key: A hash of all that the stages so far were made from; set to that of the model and the options first.
        seconds: What each stage took; None where its result was at hand.
        places: The folder of each stage.
        notes: What a reader should know.
    """

    def __init__(self, kind: str, names: Sequence[str], say: Progress) -> None:
        self.key, self.seconds, self.places = "", dict[str, float | None](), dict[str, Path]()
        self.notes: list[str] = []
        self._names, self._say, self._scratch = names, say, ExitStack()
        folder, self._root = cache_folder(kind), Path()
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                with TemporaryDirectory(dir=folder):  # which says whether it can be written
                    self._root = folder
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            self.notes.append(f"the cache {folder} cannot be written ({why}): a run that is interrupted begins anew")
        self._temporary = self._root != folder
        if self._temporary:
            self._root = Path(self._scratch.enter_context(TemporaryDirectory()))

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: object) -> None:
        prune((place for place in self._root.glob("*-*") if _FOLDER.fullmatch(place.name)), LIMIT)
        self._scratch.close()

    def progress(self, name: str) -> Progress:
        """What a stage calls at each step."""
        head = f"{name} {self._names.index(name) + 1}/{len(self._names)} · "
        return lambda what, share: self._say(head + what, share)

    def timed(self, name: str, do: Callable[[Progress], T]) -> T:
        """Does what is done in every run."""
        start, say = time.monotonic(), self.progress(name)
        say("starting", None)
        result = do(say)
        self.seconds[name] = time.monotonic() - start
        return result

    def done(
        self,
        name: str,
        facts: Mapping[str, object],
        make: Callable[[Path, Progress], object],
        read: Callable[[Path], T],
    ) -> T:
        """Does a stage, unless its result is at hand.

        ``facts`` are what it depends on besides the stages before, as JSON data. ``make`` makes its folder, which may
        exist and hold what ``read`` refuses, by raising, as damaged or not whole.
        """
        self.key = hashlib.sha256(f"{self.key}|{name}|{json.dumps(facts, sort_keys=True)}".encode()).hexdigest()
        place = self.places[name] = self._root / f"{name}-{self.key}"
        if place.is_dir():
            self.progress(name)("reading what was done before", None)
            try:
                result = read(place)
                self.seconds[name] = None
                with suppress(OSError):
                    os.utime(place)
                return result
            except (PwrewriteError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                self.notes.append(f"{name} was done again: what the cache held of it is damaged: {first_line(error)}")
                shutil.rmtree(place, ignore_errors=True)
        try:
            self.timed(name, lambda say: make(place, say))
        except OutputError as error:
            if self._temporary or error.__cause__ is None or not lacks_room(error.__cause__):
                raise
            self.notes.append(
                f"the cache {self._root} is full: {name} was done twice; a run that is interrupted begins anew"
            )
            self._root, self._temporary = Path(self._scratch.enter_context(TemporaryDirectory())), True
            place = self.places[name] = self._root / place.name
            self.timed(name, lambda say: make(place, say))
        return read(place)
