"""Every stream takes everything that is printed; piped into a reader that goes away, every command leaves alike."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from messages import messages
from warm_python import python

from pwrewrite.cli.encoding import plain

COMMANDS = (["--help"], ["analyze", "net.py"], ["analyze", "nö→×.py"], ["passes", "--format", "markdown"])


def command(*arguments: str, encoding: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    return subprocess.run(
        [*python(), "-m", "pwrewrite", *arguments], capture_output=True, check=False, env=env, **options
    )  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii:strict"])
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_no_encoding_is_too_poor(folder: Path, encoding: str, arguments: list[str]) -> None:
    done = command(*arguments, encoding=encoding)
    assert done.returncode == (2 if "nö→×.py" in arguments else 0), done.stderr
    assert b"Unicode" not in done.stderr
    for stream in (done.stdout, done.stderr):
        text = stream.decode("utf-8" if "markdown" in arguments else encoding.partition(":")[0])
        if encoding.startswith("ascii") and "markdown" not in arguments:
            assert text.isascii()
    if arguments == ["analyze", "net.py"]:
        shown = done.stdout.decode(encoding.partition(":")[0])
        assert {"ascii": "1x3x32x32", "cp1252": "1×3×32×32"}[encoding.partition(":")[0]] in shown


def test_what_programs_read_is_utf_8(folder: Path) -> None:
    done = command("passes", "--format", "json", encoding="cp1252")
    assert any("×" in row["summary"] for row in json.loads(done.stdout.decode("utf-8")))


def test_what_stands_for_a_character() -> None:
    assert plain("1×3 → é ≤ 2 ½ ─│╭ ⠋ ☃ …") == "1x3 -> e <= 2 1/2 -|+ * \\u2603 ..."


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["passes"], ["analyze", "--help"]], ids=" ".join)
def test_a_reader_that_goes_away(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*python(), "-m", "pwrewrite", *arguments], stdout=write, stderr=subprocess.PIPE, check=False, text=True
    )
    os.close(write)
    assert done.returncode == 141
    assert messages(done.stderr) == ""
