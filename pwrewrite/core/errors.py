"""Every error that pwrewrite raises on purpose.

Each class also subclasses the builtin a caller would expect, so ``except FileNotFoundError`` works as well as
``except PwrewriteError``. ``exit_code`` is what the command returns for it: 1 when the tool refused or a check failed,
2 when the usage or the input was wrong.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path
from traceback import extract_tb

from .text import plain


class PwrewriteError(Exception):
    """Base of all deliberate errors: what happened, where, what was expected and what came, and what to try."""

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message, self.where, self.expected, self.got, self.hint = message, where, expected, got, hint
        super().__init__(message)

    def __str__(self) -> str:
        parts = {"where": self.where, "expected": self.expected, "got": self.got, "try": self.hint}
        shown = [f"  {label}: {plain(text, lines=True)}" for label, text in parts.items() if text]
        return "\n".join([plain(self.message, lines=True), *shown])


class UsageError(PwrewriteError, ValueError):
    """An argument, an option or a setting that makes no sense."""


class TargetError(PwrewriteError, ValueError):
    """A target string that does not lead to one model."""


class TargetNotFound(TargetError, FileNotFoundError):
    """A target whose file, folder or module does not exist."""


class WeightsError(PwrewriteError, RuntimeError):
    """A checkpoint that cannot be read, is not safe to read, or does not fit the model."""


class InputError(PwrewriteError, ValueError):
    """Example inputs that the model does not take, or that cannot be known."""


class CaptureError(PwrewriteError, RuntimeError):
    """A model that cannot be run or traced at all on the given inputs."""


class PlanError(PwrewriteError, ValueError):
    """A plan that is malformed or belongs to another model."""


class OutputError(PwrewriteError, OSError):
    """A place that cannot be written."""


class RefusedError(PwrewriteError, RuntimeError):
    """The tool could do what was asked and refuses, because the result would be wrong."""

    exit_code = 1


class VerificationError(PwrewriteError, RuntimeError):
    """A rewritten model that did not pass verification."""

    exit_code = 1


class GateError(PwrewriteError, RuntimeError):
    """A limit that the user set and the model exceeds."""

    exit_code = 1


def shortened(text: str, limit: int = 200) -> str:
    """A text on one line, without the addresses of objects, cut between two words where it is longer than ``limit``."""
    line = plain(" ".join(re.sub(r"\s+at 0x[0-9a-fA-F]+", "", text[: 8 * limit]).split()))
    return line if len(line) <= limit else f"{line[:limit].rsplit(' ', 1)[0]} …"


def first_line(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shortened(lines[0])}" if lines else type(error).__name__


def line_of_model(error: BaseException) -> str | None:
    """``file.py:12: x = len(y)``, the deepest line that an exception came through outside of Python's own library,
    torch and this package; None without one.
    """
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    others = [Path(__file__).parent.parent, *([Path(torch).parent] if torch else [])]
    library = Path(sysconfig.get_path("stdlib"))
    for frame in reversed(extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        stock = file.is_relative_to(library) and "site-packages" not in file.parts
        if file.is_file() and not stock and not any(file.is_relative_to(other) for other in others):
            return f"{file.name}:{frame.lineno}" + (f": {shortened(frame.line, 100)}" if frame.line else "")
    return None
