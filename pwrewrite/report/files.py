"""Writing a report to a file: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from ..core.errors import OutputError


def check_writable(path: Path) -> None:
    """Refuses a place that cannot be written, before the work is done whose result would go there.

    Args:
        path: The file to write later.

    Raises:
        OutputError: If its folder does not exist, it is a folder, or writing there is not permitted.
    """
    where = str(path)
    try:
        if path.is_dir():
            raise OutputError("cannot write the output: it is a folder", where=where, hint="name a file in it")
        folder = path.resolve().parent
        if not folder.is_dir():
            what = "does not exist" if not folder.exists() else "is not a folder"
            raise OutputError(f"cannot write the output: {folder} {what}", where=where, hint="create it first")
        exists = path.exists()
    except (OSError, RuntimeError) as error:
        if isinstance(error, OutputError):
            raise
        raise _refused(path, error) from error
    if not os.access(path if exists else folder, os.W_OK) or (
        exists and _is_regular(path) and not os.access(folder, os.W_OK)
    ):
        raise OutputError(
            "cannot write the output: permission denied", where=where, hint="choose a place that you may write"
        )


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8: beside its place and then renamed, so that no half-written file is ever there.

    What exists under ``path`` stays until then. Line ends are written as they are. A place that is no regular file,
    such as a pipe or ``/dev/stdout``, is written directly.

    Args:
        path: The file.
        text: Its content.

    Raises:
        OutputError: If it cannot be written.
    """
    data = text.encode("utf-8", errors="surrogateescape")
    try:
        if path.exists() and not _is_regular(path):
            path.write_bytes(data)
            return
        target = path.resolve()  # a link stays a link
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".part", dir=target.parent)
    except (OSError, RuntimeError, ValueError) as error:
        raise _refused(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, _mode(target))
        os.replace(name, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise _refused(path, error) from error
        raise


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.stat().st_mode)


def _mode(path: Path) -> int:
    """The mode of what is replaced, else what the user's umask makes of a new file."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _refused(path: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"cannot write the output: {reason[:1].lower()}{reason[1:]}", where=str(path))
