"""The commands of the README and of the pages in ``docs``, run as they stand.

Blocks behind ``<!-- run -->`` are run in order, each page in a copy of ``examples``; ``sh`` blocks line by line,
``python`` blocks whole. The two behind ``<!-- ci: … -->`` install, and are run by ``.ci/run`` alone.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner
from warm_python import python

from pwrewrite.cli.app import app
from pwrewrite.engines import timing
from pwrewrite.planning import latency
from pwrewrite.workflows import end_to_end

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^<!-- run(?:: exit (\d))? -->\n```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


TRAINING = "train(model, images[:1200], classes[:1200])"
SHELL = "docs/analyze.md"
PAGES = (
    "README.md",
    "docs/analyze.md",
    "docs/rewrite.md",
    "docs/budget.md",
    "docs/compress.md",
    "docs/fuse.md",
    "docs/check.md",
    "docs/export.md",
    "docs/html.md",
    "docs/recover.md",
)


def blocks(page: str) -> list[tuple[int, str, str]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(int(code or 0), kind, body) for code, kind, body in BLOCK.findall(text)]


def test_every_page_has_something_to_run_and_is_linked() -> None:
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md")} == set(PAGES[1:])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert blocks(page), page
        assert page == "README.md" or f"({page})" in readme, page


def lines(body: str) -> list[str]:
    return [line for line in body.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of ``pwrewrite`` run in this process, but for the first of one page, which a shell finds."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    digits = tmp_path / "examples" / "digits.py"
    assert TRAINING in digits.read_text()  # in full it is run by `.ci/run`
    digits.write_text(digits.read_text().replace(TRAINING, TRAINING.replace("1200", "96")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Longer than elsewhere: a latency is to be met.
    monkeypatch.setattr(end_to_end, "_SECONDS", (1.0, 4.0, 8.0))
    monkeypatch.setattr(timing, "_SECONDS", 1.0)
    monkeypatch.setattr(latency, "_SECONDS_EACH", 0.06)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    began = page != SHELL
    for expected, kind, body in blocks(page):
        for line in [body] if kind == "python" else lines(body):
            words = shlex.split(line) if kind == "sh" else []
            if began and words[:1] == ["pwrewrite"]:
                result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
                code, out, errors = result.exit_code, result.stdout, result.stderr
            else:
                began = began or kind == "sh"
                command = [*python(), "-c", line] if kind == "python" else ["sh", "-c", line]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
                code, out, errors = done.returncode, done.stdout, done.stderr
            said = f"{line}\n{out[-2000:]}\n{errors[-2000:]}"
            assert code == expected, said
            assert "Traceback" not in errors, said


def test_the_two_commands_of_ci_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("compress", "test"):
        found = re.findall(rf"^<!-- ci: {name} -->\n```sh\n([^\n]+)\n```$", text, re.MULTILINE)
        assert len(found) == 1, name
    assert text.index("<!-- ci: test -->") < 4000  # near the top


def test_every_option_is_in_the_documents() -> None:
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    commands = typer.main.get_group(app).commands
    missing = [
        f"{name} {option.opts[0]}"
        for name, command in commands.items()
        for option in command.params
        if option.opts[0].startswith("-")
        and not any(re.search(rf"(?<![\w-]){word}(?![\w-])", text) for word in option.opts)
    ]
    assert not missing
