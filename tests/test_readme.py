"""The README's commands, run as they stand.

Blocks behind ``<!-- run -->`` are run in order in one copy of ``examples``; ``sh`` blocks line by line, ``python``
blocks whole. The two behind ``<!-- ci: … -->`` install, and are run by ``.ci/run`` alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^<!-- run(?:: exit (\d))? -->\n```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[int, str, str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [(int(code or 0), kind, body) for code, kind, body in BLOCK.findall(text)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


def test_there_is_something_to_run() -> None:
    assert len(blocks()) >= 8


def test_every_command_of_the_readme_runs(place: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for expected, kind, body in blocks():
        if kind == "python":
            commands = [[sys.executable, "-c", body]]
        else:
            lines = body.replace("\\\n", " ").splitlines()
            commands = [["sh", "-c", line] for line in lines if line.strip() and not line.startswith("#")]
        for command in commands:
            done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
            said = f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            assert done.returncode == expected, said
            assert "Traceback" not in done.stderr, said


def test_the_two_commands_of_ci_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("analyze", "test"):
        found = re.findall(rf"^<!-- ci: {name} -->\n```sh\n([^\n]+)\n```$", text, re.MULTILINE)
        assert len(found) == 1, name
    assert text.index("<!-- ci: test -->") < 4000  # near the top
