"""Runs in a process of their own: without pwrewrite, without each other, and whatever becomes of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from pwrewrite.core.errors import RefusedError
from pwrewrite.engines.apart import _server, run_apart
from pwrewrite.engines.exporting import Program, Run

X = torch.ones(2)
LOAD = "from model import load; model = load()"


def run(folder: Path, forward: str, load: str = LOAD, imports: Sequence[str] = ()) -> Run:
    (folder / "model.py").write_text(f"import os, sys\ndef load(): return forward\ndef forward(x): {forward}\n")
    return run_apart(
        load, Program(nn.Identity(), ((X,), {}), ("x",), {"": "y"}, ()), folder, [((X,), {}), ((2 * X,), {})], imports
    )


def test_what_an_import_prints_is_no_answer(tmp_path: Path) -> None:
    assert run(tmp_path, "return x", imports=("this",)).outputs[0]["y"].tolist() == [1, 1]


def test_a_run_sees_nothing_of_another(tmp_path: Path) -> None:
    first = run(tmp_path, "return x + 1")
    second = run(tmp_path, "return (x + 2, os.getcwd())[0]")
    assert [each["y"].tolist() for each in first.outputs] == [[2, 2], [3, 3]]
    assert [each["y"].tolist() for each in second.outputs] == [[3, 3], [4, 4]]
    assert second.seconds > 0


def test_processes_are_not_one_another(tmp_path: Path) -> None:
    pids = [int(run(tmp_path, "return x + os.getpid()").outputs[0]["y"][0]) for _ in range(2)]
    assert pids[0] != pids[1]


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        ("import pwrewrite", "import of pwrewrite halted"),
        ("sys.exit(3)", "SystemExit: 3"),
        ("raise ValueError('odd')", "ValueError: odd"),
        ("os.kill(os.getpid(), 9)", "exit code -9"),
        ("print('noise'); sys.stdin.read(); raise ValueError('even')", "ValueError: even"),
    ],
)
def test_what_does_not_run_is_refused_and_the_next_runs(tmp_path: Path, forward: str, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        run(tmp_path, forward)
    assert run(tmp_path, "return x").outputs[0]["y"].tolist() == [1, 1]


def test_a_server_that_died_is_started_again(tmp_path: Path) -> None:
    run(tmp_path, "return x")
    process = _server._process
    assert process is not None
    process.kill()
    process.wait()
    assert run(tmp_path, "return x").outputs[0]["y"].tolist() == [1, 1]
