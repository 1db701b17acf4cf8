"""`pwrewrite compress`: what a person reads in ten seconds, and a project whose file holds all options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

Run = Callable[..., Result]

PROJECT = """
[compress]
target = "net.py"
budget = { macs = 0.5 }
calibration = "x.npz"
export = ["pt2"]
out = "small"
force = true
"""


@pytest.fixture(autouse=True)
def data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    np.savez("x.npz", x=draw.standard_normal((40, 3, 32, 32), "f"))
    monkeypatch.setenv("PWREWRITE_CACHE", str(folder / "cache"))


def test_a_project_says_it_all(run: Run, folder: Path) -> None:
    (folder / "pwrewrite.toml").write_text(PROJECT)
    result = run("compress", "-v")
    assert result.exit_code == 0, result.stderr
    for text in ("parameters", "MACs", "time", "held-out inputs", "export/model.pt2", "verified", "stages"):
        assert text in result.stdout, text
    assert "saved in small" in result.stderr
    for step in ("rewrite 1/4 · calibrating", "fuse 2/4 · ", "export 3/4 · pt2: writing", "measure 4/4 · "):
        assert step in result.stderr, step
    checked = run("check", "small", "--model", "net.py", "--max-macs", "1.4M")
    assert checked.exit_code == 0, checked.stderr
    again = run("compress", "--format", "json")
    assert again.exit_code == 0, again.stderr
    stages = json.loads(again.stdout)["stages"]
    assert [name for name, seconds in stages.items() if seconds is None] == ["rewrite", "fuse", "export"]
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == {
        "cache",
        "net.py",
        "pwrewrite.toml",
        "small",
        "x.npz",
    }
    (folder / "pwrewrite.toml").write_text(PROJECT.replace("export", "exprot"))
    wrong = run("compress")
    assert wrong.exit_code == 2
    assert "did you mean export?" in wrong.stderr


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ((), 2, "there is no budget"),
        (("--budget", "macs=0.5", "--export", "pt2"), 2, "--out DIR"),
        (("--budget", "macs=0.5", "--out", "net.py"), 2, "is a file"),
        (("--budget", "macs=0.5", "--calibration", "gone.npz", "--out", "small"), 2, "no such file"),
        (("--budget", "macs=0.001", "--out", "small"), 1, "cannot be met"),
        (("--budget", "macs=0.5", "--max-error", "1e-9", "--out", "small"), 1, "verification failed"),
        (("--budget", "macs=0.5", "--labels", "y.npy"), 2, "goes with --calibration"),
    ],
)
def test_what_is_refused(run: Run, folder: Path, options: tuple[str, ...], code: int, says: str) -> None:
    result = run("compress", "net.py", *options)
    assert result.exit_code == code, result.stderr
    assert says in result.stderr
    assert not (folder / "small").exists()


def test_nothing_is_saved_without_a_place(run: Run, folder: Path) -> None:
    result = run("compress", "net.py", "--budget", "macs=0.9")
    assert result.exit_code == 0, result.stderr
    assert "nothing was saved: give --out DIR" in result.stderr
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == {"cache", "net.py", "x.npz"}


def test_a_folder_without_exports(run: Run, folder: Path) -> None:
    result = run("compress", "net.py", "--budget", "macs=0.9", "--calibration", "x.npz", "--out", "small")
    assert result.exit_code == 0, result.stderr
    assert "saved in small" in result.stderr
    refused = run("compress", "net.py", "--budget", "macs=0.9", "--out", "other", "--static")
    assert refused.exit_code == 2
    assert "--static goes with --export" in refused.stderr
