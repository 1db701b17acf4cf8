"""However a command ends (a signal, a full disk, what the model's code raises), it says so and leaves nothing half."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from messages import messages, next_message
from warm_python import python

NET = """
import torch
from torch import nn

class Stop(BaseException):
    pass

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        {line}
        return self.b(self.a(x))

example_inputs = torch.zeros(1, 3, 8, 8)
"""

Run = Callable[..., Any]
Write = Callable[[str], None]


@pytest.fixture(autouse=True)
def write(folder: Path) -> Write:
    def net(line: str) -> None:
        (folder / "net.py").write_text(NET.format(line=line))

    net("pass")
    return net


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    call = [*python(), "-m", "pwrewrite", *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.run(call, check=False, timeout=120, **options)


@pytest.mark.parametrize("verb", ["analyze", "rewrite", "fuse"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise Stop('enough')", "raised Stop: enough"),
        ("import sys; sys.exit(3)", "calls sys.exit(3)"),
        ("raise SystemExit", "calls sys.exit(None)"),
        ("raise GeneratorExit('odd')", "raised GeneratorExit: odd"),
    ],
)
def test_whatever_forward_raises_is_told(run: Run, write: Write, verb: str, line: str, said: str) -> None:
    write(line)
    result = run(verb, "net.py", *(["--out", "out"] if verb != "analyze" else []))
    assert result.exit_code == 2
    assert said in result.stderr
    assert "net.py, line 14" in result.stderr
    assert "internal" not in result.stderr
    assert not Path("out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "arguments",
    [["analyze", "net.py"], ["analyze", "net.py", "--format", "json"], ["passes"], ["--help"], ["fuse", "-h"]],
)
def test_a_full_standard_output(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = command(*arguments, stdout=full)
    assert result.returncode == 2
    assert "cannot write to standard output: no space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(messages(result.stderr).splitlines()) == 2


@pytest.mark.parametrize("seed", ["9" * 30, str(2**63), "-1"])
def test_seeds_that_are_none(run: Run, seed: str) -> None:
    result = run("rewrite", "net.py", "--dry-run", "--seed", seed)
    assert result.exit_code == 2
    assert "--seed" in result.stderr
    assert "internal" not in result.stderr


@pytest.mark.parametrize("place", ["x" * 300, "new/" + "x" * 300, "new/" + "x" * 300 + "/y"])
def test_names_that_are_too_long_are_refused_before_the_work(run: Run, write: Write, place: str) -> None:
    write("raise RuntimeError('the work began')")
    result = run("rewrite", "net.py", "--set", "b=reduce:4", "--out", place)
    assert result.exit_code == 2
    assert "file name too long" in result.stderr
    assert not Path("new").exists()
    result = run("analyze", "net.py", "--output", place + ".json")
    assert "file name too long" in result.stderr or "does not exist" in result.stderr


def test_a_forward_may_change_the_directory(run: Run, write: Write) -> None:
    Path("elsewhere").mkdir()
    write("import os; os.chdir('/')")
    assert run("analyze", "net.py", "--format", "json", "--output", "report.json").exit_code == 0
    assert run("rewrite", "net.py", "--set", "b=reduce:4", "--out", "out").exit_code == 0
    assert {"net.py", "report.json", "out"} <= {p.name for p in Path().iterdir()}


def test_calibration_is_read_where_it_was_meant(run: Run, write: Write) -> None:
    write("import os; os.chdir('/')")
    np.savez("x.npz", x=np.random.default_rng(0).standard_normal((40, 3, 8, 8), "f"))
    np.save("y.npy", np.zeros(40, int))
    data = ["--calibration", "x.npz", "--labels", "y.npy"]
    result = run("rewrite", "net.py", "--budget", "macs=0.8", *data, "--out", "out")
    assert result.exit_code == 0, result.stderr
    assert Path("out").exists()


SLOW = """
import sys, time
import pwrewrite.targets.storage as storage
usual = storage._save_weights
def slow(*arguments):
    usual(*arguments)
    print("READY", file=sys.stderr, flush=True)
    time.sleep(60)
storage._save_weights = slow
from pwrewrite.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_while_saving_over_an_earlier_folder(run: Run, number: signal.Signals) -> None:
    arguments = [
        "rewrite",
        "net.py",
        "--set",
        "b=reduce:4",
        "--out",
        "out",
        "--no-verify",
        "--save-unverified",
        "--force",
    ]
    assert command(*arguments).returncode == 0
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}
    process = subprocess.Popen(
        [*python(), "-c", SLOW, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup a hang-up is ignored on purpose
    )
    assert process.stderr is not None
    assert next_message(process.stderr) == "READY\n"
    process.send_signal(number)
    errors = process.stderr.read()
    process.wait(30)
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before
    if number == signal.SIGKILL:
        (left,) = [p for p in Path().iterdir() if "pwrewrite-" in p.name]
        os.utime(left, (time.time() - 60,) * 2)
        assert run(*arguments).exit_code == 0
    else:
        assert process.returncode == 128 + number
        assert f"ended by {number.name}" in errors
    assert sorted(p.name for p in Path().iterdir() if p.name != "__pycache__") == ["net.py", "out"]
