import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pwrewrite.core import files
from pwrewrite.core.errors import OutputError
from pwrewrite.core.files import check_writable, new_folder, prune, recover, write_file

as_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    check_writable(path)
    write_file(path, "a\r\n×\r\n")
    assert path.read_bytes() == "a\r\n×\r\n".encode()
    path.chmod(0o640)
    write_file(path, "b")
    assert path.read_text() == "b"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    write_file(tmp_path / "ours", "")
    (tmp_path / "theirs").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_device_is_written_directly() -> None:
    check_writable(Path(os.devnull))
    write_file(Path(os.devnull), "gone")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize(
    ("place", "message"),
    [(".", "it is a folder"), ("no/such/folder/x", "does not exist"), ("file/x", "is not a folder")],
)
def test_places_that_cannot_be(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=message):
        check_writable(tmp_path / place)
    with pytest.raises(OutputError):
        write_file(tmp_path / place, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@as_user
def test_permission_denied_for_real(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission denied"):
        check_writable(tmp_path / "x")
    with pytest.raises(OutputError, match="permission denied"):
        write_file(tmp_path / "x", "x")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="permission denied"):
        check_writable(tmp_path / "x")


def test_a_folder_in_which_nothing_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match="read-only file system"):
        check_writable(tmp_path / "report.json")


@pytest.mark.parametrize("step", ["replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "report"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises((OutputError, KeyboardInterrupt)) as raised:
        write_file(path, "new")
    if isinstance(error, OSError):
        assert "no space left on device" in str(raised.value)
        assert str(path) in str(raised.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------------ folders


def fill(folder: Path, text: str, names: tuple[str, ...] = ("a", "b")) -> None:
    with new_folder(folder, names) as scratch:
        for name in names:
            (scratch / name).write_text(text)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    fill(tmp_path / "x" / "out", "first")
    fill(tmp_path / "x" / "out", "second")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["out"]
    assert (tmp_path / "x" / "out" / "b").read_text() == "second"


@pytest.mark.skipif(sys.platform != "linux", reason="a step of Linux")
def test_there_is_never_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "first")
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("two renames leave a moment without either"))
    fill(tmp_path / "out", "second")
    assert (tmp_path / "out" / "a").read_text() == "second"


def test_only_what_is_ours_is_deleted(tmp_path: Path) -> None:
    fill(tmp_path / "out", "first")
    with new_folder(tmp_path / "out", ("a", "b")) as scratch:
        (scratch / "a").write_text("second")
        (tmp_path / "out" / "theirs").write_text("kept")
    (aside,) = [p for p in tmp_path.iterdir() if p.name != "out"]
    assert [p.name for p in aside.iterdir()] == ["theirs"]


KILLED = """
import os, sys, pathlib
from pwrewrite.core import files
place = pathlib.Path(sys.argv[1])
with files.new_file(place / "report.json") as a, files.new_folder(place / "out", ("a",)) as b:
    (b / "a").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".mine.part").write_text("theirs")
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    unfinished = {p for p in tmp_path.iterdir() if "pwrewrite-" in p.name}
    assert len(unfinished) == 2

    def age() -> None:
        for path in unfinished:
            os.utime(path, (1, 1))

    age()
    write_file(tmp_path / "other", "x")
    assert all(path.exists() for path in unfinished)  # their writer is alive
    child.communicate()
    age()
    write_file(tmp_path / "other", "y")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.part", "other"]


def earlier(folder: Path, *names: str, days: float = 2) -> Path:
    """A folder as version 0.1 left it when it was killed."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("half")
    old = time.time() - days * 86400
    for path in (*folder.iterdir(), folder):
        os.utime(path, (old, old))
    return folder


def test_what_version_0_1_left_beside_a_folder_is_removed(tmp_path: Path) -> None:
    ours = [
        earlier(tmp_path / ".out.abcd_012", "a"),
        earlier(tmp_path / ".out.abcd_013", "a", "b"),
        earlier(tmp_path / ".out.old.abcd_012" / "out", "a").parent,
    ]
    theirs = [
        earlier(tmp_path / ".out.abcd_014", "a", "c"),  # holds what we did not write
        earlier(tmp_path / ".out.abcd_015"),  # nothing tells whose it is
        earlier(tmp_path / ".out.abcd_016", "a", days=0.5),  # its writer may be alive
        earlier(tmp_path / ".out.abcd", "a"),
        earlier(tmp_path / ".out.ABCD_017", "a"),
        earlier(tmp_path / ".other.abcd_018", "a"),
        earlier(tmp_path / ".out.old.abcd_019" / "other", "a").parent,
        earlier(tmp_path / ".out.old.abcd_020" / "out", "c").parent,
        earlier(tmp_path / "elsewhere", "a"),
    ]
    (tmp_path / ".out.abcd_021").symlink_to(tmp_path / "elsewhere")
    fill(tmp_path / "out", "first")
    assert not [path for path in ours if path.exists()]
    assert all(path.exists() for path in (*theirs, tmp_path / ".out.abcd_021", tmp_path / "elsewhere" / "a"))
    assert (tmp_path / "out" / "a").read_text() == "first"


def test_a_folder_that_version_0_1_moved_aside_is_moved_back(tmp_path: Path) -> None:
    earlier(tmp_path / ".out.old.abcd_012" / "out", "a")
    recover(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "half"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("old", "new", "newest")]
    places[0].write_bytes(bytes(10))
    for place in places[1:]:
        (place / "inside").mkdir(parents=True)
        (place / "inside" / "file").write_bytes(bytes(40))
    for age, place in enumerate(reversed(places)):
        os.utime(place, (0, 1000 - age))
    for limit, left in ((90, places), (89, places[1:]), (50, places[2:]), (0, places[2:])):
        prune(tmp_path.iterdir(), limit)
        assert sorted(tmp_path.iterdir()) == sorted(left)
    prune((tmp_path / "gone" for _ in range(1)), 0)
