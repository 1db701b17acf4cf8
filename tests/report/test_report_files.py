import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pwrewrite.analysis.records import Analysis
from pwrewrite.capturing.records import Coverage
from pwrewrite.core.errors import GateError, OutputError
from pwrewrite.report.files import check_writable, write_text
from pwrewrite.report.gates import check

as_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    check_writable(path)
    write_text(path, "a\r\n×\r\n")
    assert path.read_bytes() == "a\r\n×\r\n".encode()
    path.chmod(0o640)
    write_text(path, "b")
    assert path.read_text() == "b"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "")
    (tmp_path / "theirs").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_device_is_written_directly() -> None:
    check_writable(Path(os.devnull))
    write_text(Path(os.devnull), "gone")
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
        write_text(tmp_path / place, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@as_user
def test_permission_denied_for_real(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission denied"):
        check_writable(tmp_path / "x")
    with pytest.raises(OutputError, match="permission denied"):
        write_text(tmp_path / "x", "x")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="permission denied"):
        check_writable(tmp_path / "x")


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
        write_text(path, "new")
    if isinstance(error, OSError):
        assert "no space left on device" in str(raised.value)
        assert str(path) in str(raised.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_gates(analysis: Analysis, make_analysis: Callable[..., Analysis]) -> None:
    check(analysis)
    check(analysis, max_params=analysis.params, max_macs=analysis.macs)
    with pytest.raises(GateError, match=r"too many parameters and too many MACs") as raised:
        check(analysis, max_params=analysis.params - 1, max_macs=100)
    assert "319,999" in str(raised.value)
    assert "1 too many" in str(raised.value)
    with pytest.raises(GateError, match="mylib::correlate ×2"):
        check(analysis, strict=True)
    check(make_analysis(coverage=Coverage("whole", 5, 5, (), "meta")), strict=True)
