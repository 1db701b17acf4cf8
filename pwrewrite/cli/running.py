"""How every command runs: errors in plain words, Ctrl-C, closed pipes, quiet libraries.

Exit codes: 0 done; 1 refused, a limit exceeded, or a fault of pwrewrite; 2 wrong usage or input; 130 Ctrl-C; 141 the
reader of stdout went away.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import typer

from ..core.errors import PwrewriteError
from .progress import Say, progressing

if TYPE_CHECKING:
    from .options import Common

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""

_BROKEN_PIPE = 141


@contextlib.contextmanager
def handled(debug: bool) -> Iterator[None]:
    """Turns every exception of a command into a message on stderr and an exit code.

    Args:
        debug: Whether to show the traceback too; the environment's ``PWREWRITE_DEBUG=1`` does the same.

    Raises:
        typer.Exit: With the exit code.
    """
    debug = debug or os.environ.get("PWREWRITE_DEBUG", "") not in ("", "0")
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except PwrewriteError as error:
        if debug:
            traceback.print_exc()
        _say_error("error:", str(error))
        raise typer.Exit(error.exit_code) from None
    except BaseException as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            _silence_stdout()
            raise typer.Exit(_BROKEN_PIPE) from None
        if debug:
            traceback.print_exc()
        lines = str(error).strip().splitlines()
        what = type(error).__name__ + (f": {lines[0]}" if lines else "")
        _say_error("internal error:", f"{what} (run with --debug; please report)")
        raise typer.Exit(1) from None


@contextlib.contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """While models are built and run: warnings stay unsaid, and what their code and libraries print goes to stderr.

    Args:
        debug: Whether to let warnings through.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), _descriptor_to_stderr():
        if not debug:
            warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _descriptor_to_stderr() -> Iterator[None]:
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


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Holds the garbage collector back: imports, models and graphs are many objects and no garbage.

    It would take a sixth of the time. What little garbage there is dies with the process.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes Ctrl-C count even where a library swallows it, as torch does while it is imported.

    Raises:
        KeyboardInterrupt: At the latest when the block ends.
    """
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
def working(common: Common) -> Iterator[Say]:
    """While a command works: libraries are quiet, Ctrl-C counts, and a person sees what is going on.

    Yields:
        What to call with each step.
    """
    with quiet(common.debug), interruptible(), progressing() as progress:
        yield progress


def leave(code: int) -> NoReturn:
    """Ends the process. Once torch is loaded, taking Python apart would cost a third of a second: that is left out.

    Registered exit functions still run, and what was printed is flushed.

    Args:
        code: The exit code.
    """
    if "torch" not in sys.modules:
        sys.exit(code)
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the reader went away
        code = code or _BROKEN_PIPE
    finally:
        os._exit(code)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def _say_error(label: str, text: str) -> None:
    """An error: its label in red where a person sees it."""
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        label = f"\x1b[1;31m{label}\x1b[0m"
    _say(f"{label} {text}")


def _silence_stdout() -> None:
    """Points stdout at nothing, so that closing it when Python ends does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
