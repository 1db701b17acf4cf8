"""Files: written whole or not at all, and read within bounds. Everything that pwrewrite writes goes through here.

A file or folder is written beside its place, flushed to the disk and renamed; a folder that replaces another is
exchanged with it in a single step (``renameat2`` on Linux, ``renamex_np`` on macOS). Where there is no such step, the
old folder waits as ``.NAME.….old`` for as long as two renames take; after a crash between them `recover`, with which
every save begins, moves it back.

A writer holds a lock on what it has not finished. What a killed one left (``.NAME.pwrewrite-….part``, without a lock,
or what version 0.1 left beside a folder) is removed by the next writer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from .errors import OutputError

if sys.platform != "win32":  # there nothing is locked, and nothing removed
    import fcntl

LARGEST_TEXT = 256 << 20
"""Bytes of the largest file that is read as a whole."""

_UNFINISHED = re.compile(r"\..*\.pwrewrite-\w{8}\.part|[0-9a-f]{24,64}\.\d+\.tmp", re.DOTALL)
"""Names of unfinished files; the second kind is that of the cache of version 0.1."""


def cache_folder(kind: str) -> Path | None:
    """The folder of a kind of cached results, which may not exist yet; None where ``PWREWRITE_CACHE`` is ``off``."""
    import platformdirs

    named = os.environ.get("PWREWRITE_CACHE", "")
    if named.lower() in ("off", "0", "none"):
        return None
    return (Path(named) if named else platformdirs.user_cache_path("pwrewrite", appauthor=False)) / kind


def check_writable(path: Path) -> None:
    """Raises `OutputError` for a file that cannot be written, before the work is done whose result would go there."""
    where, cannot = str(path), "cannot write the output:"
    with refusing(path, OSError, RuntimeError, ValueError):
        if path.is_dir():
            raise OutputError(f"{cannot} it is a folder", where=where, hint="name a file in it")
        folder = path.resolve().parent
        if not folder.is_dir():
            what = "does not exist" if not folder.exists() else "is not a folder"
            raise OutputError(f"{cannot} {folder} {what}", where=where, hint="create it first")
        places = [path] * path.exists() + [folder] * (path.is_file() or not path.exists())
    if not all(os.access(place, os.W_OK) for place in places):
        raise OutputError(f"{cannot} permission denied", where=where, hint="choose a place that you may write")
    if folder in places:
        with refusing(path, OSError):
            check_room(folder)


def check_room(folder: Path, size: int = 0) -> None:
    """Makes a file without a name in a folder; raises `OSError` where there cannot be one, whatever permissions say.

    With ``size``, one of so many bytes, where the system can set them aside.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0")
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def lacks_room(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full, also one of libraries that have only its text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_ROOM
    return any(f"os error {number})" in str(error) for number in _NO_ROOM)


_NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def prune(places: Iterable[Path], limit: int) -> None:
    """Removes the files and folders used longest ago until the rest take so many bytes; the last one used stays."""
    with contextlib.suppress(OSError):
        used, total = sorted(places, key=lambda place: place.stat().st_mtime, reverse=True), 0
        for number, place in enumerate(used):
            files = [file for file in place.rglob("*") if file.is_file()] if place.is_dir() else [place]
            total += sum(file.stat().st_size for file in files)
            if number and total > limit:
                shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)


@contextlib.contextmanager
def same_directory() -> Iterator[None]:
    """Changes the working directory back that other people's code changes."""
    try:
        folder = os.getcwd()
    except OSError:  # it is gone, and there is no way back
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.chdir(folder)


def read_bytes(path: str | Path, limit: int = LARGEST_TEXT) -> bytes:
    """All of a file that should be small; raises `OSError` for a larger one, and for a pipe, which might never end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"it is larger than {limit >> 20} MiB", str(path))
        return file.read()


def read_text(path: str | Path, limit: int = LARGEST_TEXT) -> str:
    """The same as text in UTF-8, a byte order mark left off; raises `UnicodeDecodeError`, too."""
    return read_bytes(path, limit).decode("utf-8-sig")


def write_file(path: str | Path, content: str | bytes) -> None:
    """Writes a file as `new_file` does, text as UTF-8, its line ends as they are; a pipe or a device directly."""
    path = Path(path)
    data = content.encode("utf-8", errors="surrogateescape") if isinstance(content, str) else content
    with refusing(path, OSError, RuntimeError, ValueError):
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
    with new_file(path) as scratch:
        scratch.write_bytes(data)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yields an empty file beside a place, for a library to write, and renames it once the block has ended.

    A link stays a link. Raises `OutputError` if it cannot be written.
    """
    with refusing(path, OSError, RuntimeError, ValueError):
        target = Path(path).resolve()
        remove_unfinished(target.parent)
        handle, name = tempfile.mkstemp(prefix=_prefix(target), suffix=".part", dir=target.parent)
    try:
        with refusing(path, OSError):
            _lock(handle)
            yield Path(name)
            os.chmod(name, stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask())
            _flush(name)
            os.replace(name, target)
            _flush(target.parent)
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            os.unlink(name)


@contextlib.contextmanager
def new_folder(path: str | Path, names: Collection[str]) -> Iterator[Path]:
    """Yields a folder beside a place, and puts it there, for another that may be there, once the block has ended.

    Missing parents are made. Whether an old one may be replaced is for the caller to check; of its files those with
    these names (``a`` or ``folder/a``), and nothing else, are deleted. Raises `OutputError`; the old folder is in its
    place then.
    """
    with refusing(path, OSError, RuntimeError, ValueError):
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(target.parent)
        _remove_earlier(target, names)
        scratch = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=".part", dir=target.parent))
    handle = -1
    try:
        with refusing(path, OSError):
            if sys.platform != "win32":
                handle = os.open(scratch, os.O_RDONLY)
                _lock(handle)
            yield scratch
            for file in (*scratch.rglob("*"), scratch):  # some libraries write files that only their owner can read
                file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
                _flush(file)
            _move_in(scratch, target)
            _flush(target.parent)
    finally:
        if handle >= 0:
            os.close(handle)
        _remove(scratch, names)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed writers left in a folder; what is in use, or is not ours, stays."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        for entry in [entry for entry in os.scandir(folder) if _UNFINISHED.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime <= 1:
                    continue
                handle = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    abandoned = _lock(handle)
                finally:
                    os.close(handle)
                if abandoned and entry.is_dir(follow_symlinks=False):
                    left = Path(entry.path)
                    _remove(left, [str(file.relative_to(left)) for file in left.rglob("*")])
                elif abandoned:
                    os.unlink(entry.path)


def _remove_earlier(target: Path, names: Collection[str]) -> None:
    """Removes what killed writers of version 0.1, which took no locks, left beside a folder: our files, a day old."""
    with contextlib.suppress(OSError):
        for place, folder in _earlier(target):
            files = list(os.scandir(folder))
            ours = all(entry.name in names and entry.is_file(follow_symlinks=False) for entry in files)
            latest = max((entry.stat().st_mtime for entry in files), default=time.time())
            if ours and max(latest, folder.stat().st_mtime) < time.time() - 86400:
                _remove(folder, names)
                _remove(place, ())


def _earlier(target: Path) -> Iterator[tuple[Path, Path]]:
    """What version 0.1 may have left beside a place, and where its files are in it.

    ``.NAME.XXXXXXXX`` is half written, ``.NAME.old.XXXXXXXX/NAME`` was replaced.
    """
    pattern = re.compile(re.escape(f".{target.name}.") + r"(old\.)?[a-z0-9_]{8}")
    for entry in list(os.scandir(target.parent)):
        name = pattern.fullmatch(entry.name)
        folder = Path(entry.path, target.name if name[1] else "") if name else target
        if name and entry.is_dir(follow_symlinks=False) and folder.is_dir() and not folder.is_symlink():
            yield Path(entry.path), folder


def recover(path: str | Path) -> None:
    """Moves a folder back that a crash left beside its place, where no exchange in one step was possible."""
    with contextlib.suppress(OSError):
        target = Path(os.path.realpath(path))
        if not target.exists():
            for aside in target.parent.glob(".*.pwrewrite-*.old"):
                if aside.name.startswith(_prefix(target)):
                    os.rename(aside, target)
                    return
            for place, folder in _earlier(target):
                if folder != place:  # an old one, not a new one that is half written
                    os.rename(folder, target)
                    os.rmdir(place)
                    return


def unwritable(path: str | Path, error: Exception) -> OutputError:
    """The error for a place that the system does not let us write."""
    reason = getattr(error, "strerror", None) or str(error)
    hint = "make room or give another place" if getattr(error, "errno", None) == errno.ENOSPC else "give another place"
    return OutputError(f"cannot write: {reason[:1].lower()}{reason[1:]}", where=str(path), hint=hint)


@contextlib.contextmanager
def refusing(path: str | Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds into an `OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except kinds as error:
        raise unwritable(path, error) from error


def _move_in(scratch: Path, target: Path) -> None:
    """Renames a finished folder into place; an old one then has the finished one's name."""
    if not target.exists():
        os.rename(scratch, target)
    elif not _exchange(scratch, target):
        aside = scratch.with_suffix(".old")
        os.rename(target, aside)
        try:
            os.rename(scratch, target)
        except BaseException:
            os.rename(aside, target)
            raise
        os.rename(aside, scratch)


def _exchange(first: Path, second: Path) -> bool:
    """Gives two folders each other's name in one step; False where the system has no such step."""
    import ctypes

    names = os.fsencode(first), os.fsencode(second)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
        else:
            failed = libc.renameat2(-100, names[0], -100, names[1], 2)  # AT_FDCWD twice, RENAME_EXCHANGE
    except (AttributeError, TypeError, OSError):
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _remove(folder: Path, names: Collection[str]) -> None:
    """Removes files of these names, and the folder and those in it where nothing else is in them."""
    for name in names:
        with contextlib.suppress(OSError):
            os.unlink(folder / name)
    for place in (*{(folder / name).parent for name in names} - {folder}, folder):
        with contextlib.suppress(OSError):
            os.rmdir(place)


def _prefix(target: Path) -> str:
    """What the names of unfinished files for a place begin with; short enough for every file system."""
    return f".{target.name[:40]}.pwrewrite-"


def _lock(handle: int) -> bool:
    """Locks an open file until it is closed; False where another process holds the lock."""
    try:
        if sys.platform != "win32":
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is held, or the file system has no locks
        return False
    return True


def _flush(path: str | Path) -> None:
    """Has a file or folder on the disk, so that a crash cannot leave an empty one; some systems refuse folders."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not os.path.isdir(path):
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
