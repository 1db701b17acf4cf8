"""Bad input, each kind: the exit code, plain words on stderr, no traceback unless asked for, no half-written file."""

import os
import pickle
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from messages import messages, next_message
from typer.testing import Result
from warm_python import python

Run = Callable[..., Result]

CASES: dict[str, tuple[list[str], str, str]] = {
    # name: (arguments, content of model.py, what stderr says)
    "no such file": (["nett.py"], "", "no such file"),
    "its near name": (["nett.py"], "", "net.py"),
    "no such folder": (["no/such/net.py"], "", "no such file"),
    "no such module": (["nosuchpackage.models:Net"], "", "nosuchpackage"),
    "syntax error": (["model.py"], "import torch\ndef f(:\n", "line 2"),
    "syntax error shown": (["model.py"], "import torch\ndef f(:\n", "def f(:"),
    "missing import": (["model.py"], "import nosuchlibrary\n", "nosuchlibrary"),
    "no model": (["model.py"], "x = 1\n", "model.py"),
    "several models": (
        ["model.py"],
        "from torch import nn\nclass A(nn.Module): pass\nclass B(nn.Module): pass\n",
        "A",
    ),
    "constructor needs arguments": (
        ["model.py:A"],
        "from torch import nn\nclass A(nn.Module):\n    def __init__(self, width):\n        super().__init__()\n",
        "width",
    ),
    "import raises": (["model.py"], "raise ValueError('boom at import')\n", "boom at import"),
    "wrong shape": (["net.py", "--input", "1x1x32x32"], "", "stem"),
    "wrong shape, what it wanted": (["net.py", "--input", "1x1x32x32"], "", "3 channels"),
    "input that is none": (["net.py", "--input", "big"], "", "--input 'big'"),
    "argument that is none": (["net.py", "--arg", "width"], "", "--arg 'width'"),
    "unknown argument": (["net.py", "--arg", "depth=3"], "", "depth"),
    "no such weights": (["net.py", "--weights", "no.pt"], "", "no.pt"),
    "truncated weights": (["net.py", "--weights", "truncated.pt"], "", "truncated.pt"),
    "code in weights": (["net.py", "--weights", "code.pt"], "", "code.pt"),
    "weights of another model": (["net.py", "--weights", "other.pt"], "", "stem.weight"),
    "no folder for output": (["net.py", "--output", "no/such/report.json"], "", "does not exist"),
    "output is a folder": (["net.py", "--output", "."], "", "it is a folder"),
    "no share": (["net.py", "--hotspot-share", "much"], "", "--hotspot-share"),
    "no limit": (["net.py", "--max-macs", "few"], "", "--max-macs"),
    "no device": (["net.py", "--device", "abacus"], "", "abacus"),
    "json has all": (["net.py", "--format", "json", "--top", "3"], "", "every layer"),
    "csv has no modules": (["net.py", "--format", "csv", "--tree"], "", "not modules"),
}


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo EXECUTED > executed",)


def prepare(folder: Path, content: str) -> None:
    (folder / "model.py").write_text(content)
    torch.save({"stem.weight": torch.zeros(1)}, folder / "whole.pt")
    (folder / "truncated.pt").write_bytes((folder / "whole.pt").read_bytes()[:200])
    (folder / "code.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"elsewhere.weight": torch.zeros(3)}, folder / "other.pt")


@pytest.mark.parametrize("case", CASES)
def test_refused_in_plain_words(run: Run, folder: Path, case: str) -> None:
    arguments, content, said = CASES[case]
    prepare(folder, content)
    before = sorted(folder.iterdir())
    result = run("analyze", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert messages(result.stderr).startswith("error: ")
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(folder.iterdir()) == before
    shown = run("analyze", *arguments, "--debug")
    assert shown.exit_code == 2
    assert "Traceback (most recent call last)" in shown.stderr


def test_debug_by_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_DEBUG", "0")
    assert "Traceback" not in run("analyze", "nett.py").stderr
    monkeypatch.setenv("PWREWRITE_DEBUG", "1")
    assert "Traceback" in run("analyze", "nett.py").stderr


def test_a_zoo_name_nearly_right(run: Run) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    result = run("analyze", "torchvision:resnet5O")
    assert result.exit_code == 2
    assert "resnet50" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["analyze"],
        ["analyse"],
        ["--nonsense"],
        ["analyze", "net.py", "--format", "xml"],
        ["analyze", "net.py", "--top", "-1"],
    ],
)
def test_usage(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_no_permission_for_the_output(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    result = run("analyze", "net.py", "--output", "report.txt")
    assert result.exit_code == 2
    assert "permission denied" in result.stderr
    assert "report.txt" in result.stderr
    assert not (folder / "report.txt").exists()


def test_a_fault_of_ours_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("pwrewrite.workflows.analyze.capture_target", broken)
    result = run("analyze", "net.py")
    assert result.exit_code == 1
    assert (
        messages(result.stderr) == "internal error: ZeroDivisionError: first line (run with --debug; please report)\n"
    )
    assert "second line" in run("analyze", "net.py", "--debug").stderr


def default_interrupts() -> None:
    """A test run in the background may ignore SIGINT, and its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    "place",
    [
        "def build_model():\n    wait()\n",
        "wait()\n",
        "def f():\n    try:\n        wait()\n    except Exception:\n        pass\nf()\n",
    ],
)
def test_ctrl_c(folder: Path, place: str) -> None:
    """While the user's code runs: exit code 130, a word, and no file."""
    wait = 'import time\ndef wait():\n    print("READY", flush=True)\n    time.sleep(60)\n'
    (folder / "slow.py").write_text(wait + place)
    before = sorted(folder.iterdir())
    process = subprocess.Popen(
        [*python(), "-m", "pwrewrite", "analyze", "slow.py", "--output", "report.json", "--format", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_interrupts,
    )
    assert process.stderr is not None
    assert next_message(process.stderr) == "READY\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout == ""
    assert messages(stderr) == "interrupted\n"
    assert sorted(folder.iterdir()) == before
