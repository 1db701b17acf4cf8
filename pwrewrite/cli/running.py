"""How every command runs: errors in plain words, Ctrl-C, closed pipes, quiet libraries.

Exit codes: 0 done; 1 refused, a limit exceeded, or a fault of pwrewrite; 2 wrong usage or input, or no room to write;
130 Ctrl-C, 143 SIGTERM; 141 the reader of stdout went away.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import typer

from ..core.errors import PwrewriteError, UsageError
from ..core.files import check_writable, same_directory
from ..core.standard_output import descriptor_to_stderr
from ..core.text import plain
from .progress import Say, progressing

if TYPE_CHECKING:
    from .options import Common

BROKEN_PIPE = 141

_STDOUT_ERRORS = (errno.EPIPE, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, errno.EIO)


_project: list[str] = []
"""The options that the project's file gives, for errors: what was not typed is easily overlooked."""


def note_project(file: str, names: Sequence[str]) -> None:
    """Notes which options a project's file gives the command that runs now."""
    _project[:] = [f"{', '.join(names)} of {file}"] if names else []


@contextlib.contextmanager
def handled(debug: bool) -> Iterator[None]:
    """Turns every exception of a command into a message on stderr and a ``typer.Exit`` with its code.

    ``debug``, or the environment's ``PWREWRITE_DEBUG=1``, shows the traceback too.
    """
    debug = debug or os.environ.get("PWREWRITE_DEBUG", "") not in ("", "0")
    try:
        with _terminable():
            yield
    except typer.Exit:
        raise
    except BaseException as error:
        if debug:
            traceback.print_exc()
        raise typer.Exit(_told(error)) from None


def _told(error: BaseException) -> int:
    """Says what ended a command; the exit code for it."""
    if isinstance(error, KeyboardInterrupt):
        number = error.number if isinstance(error, Terminated) else signal.SIGINT
        _say("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}")
        return 128 + number
    if isinstance(error, OSError) and error.errno in _STDOUT_ERRORS and error.filename is None:
        return stdout_failed(error)
    if not isinstance(error, PwrewriteError):
        from ..targets.user_code import raised_in_user_code

        lines = str(error).strip().splitlines()
        theirs = raised_in_user_code(error)
        if theirs is None:
            what = type(error).__name__ + (f": {lines[0]}" if lines else "")
            _say_error("internal error:", f"{what} (run with --debug; please report)")
            return 1
        error = theirs
    given = f"\n  with: {', '.join(_project)}" if _project and isinstance(error, UsageError) else ""
    _say_error("error:", str(error) + given)
    return error.exit_code


def stdout_failed(error: OSError) -> int:
    """Says that standard output cannot be written, unless its reader just went away; the exit code for it."""
    _silence_stdout()
    if error.errno == errno.EPIPE:
        return BROKEN_PIPE
    reason = os.strerror(error.errno or 0)
    _say_error("error:", f"cannot write to standard output: {reason[:1].lower()}{reason[1:]}\n  try: --report FILE")
    return 2


class Terminated(KeyboardInterrupt):
    """Another process asked this one to end, by signal ``number``; what is half done is cleaned up as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end a command as Ctrl-C does, so that nothing half written stays."""
    signals = [s for name in ("SIGTERM", "SIGHUP") if (s := getattr(signal, name, None)) is not None]
    if threading.current_thread() is threading.main_thread():
        signals = [s for s in signals if signal.getsignal(s) is signal.SIG_DFL]
    else:
        signals = []
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() == process:
            raise Terminated(number)
        os.kill(os.getpid(), number)  # a process that a library forked

    for number in signals:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """While models run: warnings stay unsaid (not with ``debug``), and what code and libraries print goes to stderr."""
    with same_directory(), warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), descriptor_to_stderr():
        if not debug:
            warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes Ctrl-C count, at the latest when the block ends, even where a library swallows it (torch's import)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hit = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal hit
        hit = True
        signal.default_int_handler(number, frame)

    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception:
        if hit:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, usual)
    if hit:
        raise KeyboardInterrupt


@contextlib.contextmanager
def working(common: Common, *endings: str) -> Iterator[Say]:
    """While a command works: libraries are quiet, Ctrl-C counts, and a person sees each step that is passed on.

    A place for the report that cannot be written is refused first, and a name that asks for a form that there is not;
    ``endings`` are those that this report may have beside the usual ones.
    """
    if common.verbose and common.quiet:
        raise UsageError("--verbose and --quiet exclude each other")
    output: Path | None = getattr(common, "output", None)
    if output is not None:
        common.check_ending(*endings)  # type: ignore[attr-defined]
        check_writable(output)
    shown = progressing(lines=not common.quiet, steps=common.verbose)
    with quiet(common.debug), interruptible(), logged(common), shown as progress:
        yield progress


@contextlib.contextmanager
def logged(common: Common) -> Iterator[None]:
    """What the library logs goes to stderr: warnings, with ``--verbose`` everything, with ``--quiet`` nothing."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if common.verbose else "warning: %(message)s"))
    logger, level = logging.getLogger("pwrewrite"), logging.getLogger("pwrewrite").level
    logger.setLevel(logging.ERROR if common.quiet else logging.DEBUG if common.verbose else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def leave(code: int) -> NoReturn:
    """Ends the process. Once torch is loaded, taking Python apart would cost a third of a second: that is left out.

    Registered exit functions still run, and what was printed is flushed.
    """
    if "torch" not in sys.modules:
        try:
            sys.stdout.flush()
        except OSError as error:
            code = code or stdout_failed(error)
        sys.exit(code)
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as error:
        code = code or stdout_failed(error)
    finally:
        os._exit(code)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def _say_error(label: str, text: str) -> None:
    """An error: its label in red where a person sees it."""
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        label = f"\x1b[1;31m{label}\x1b[0m"
    _say(f"{label} {plain(text, lines=True)}")


def _silence_stdout() -> None:
    """Points stdout at nothing, so that closing it when Python ends does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
