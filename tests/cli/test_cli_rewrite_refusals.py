"""Bad input to `rewrite`, `plan` and `verify`: the exit code, plain words, and nothing half-written."""

import errno
import json
import os
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
HALF = ("--pass", "insert-bottleneck", "--rank", "0.5")

USAGE: dict[str, tuple[list[str], str]] = {
    # name: (arguments after `rewrite net.py`, what stderr says)
    "rank zero": (["--pass", "insert-bottleneck", "--rank", "0"], "--rank is out of range"),
    "rank negative": (["--pass", "insert-bottleneck", "--rank", "-3"], "--rank is out of range"),
    "rank above one and no width": (["--pass", "insert-bottleneck", "--rank", "1.5"], "--rank is out of range"),
    "rank beyond the channels": (["--pass", "insert-bottleneck", "--rank", "1000"], "an integer from 1 to 3"),
    "rank beyond the channels, where": (["--pass", "insert-bottleneck", "--rank", "1000"], "where: stem"),
    "rank in zero": (["--pass", "insert-bottleneck", "--rank-in", "0"], "--rank-in is out of range"),
    "rank that is none": (["--pass", "insert-bottleneck", "--rank", "half"], "neither a width nor a ratio"),
    "rank in of a pass without": (["--pass", "factorize-spatial", "--rank-in", "4"], "none of the passes"),
    "set zero": (["--set", "stem=reduce:0"], "out of range"),
    "set beyond the channels": (["--set", "stem=reduce:4"], "an integer from 1 to 3"),
    "set without form": (["--set", "stem"], "cannot read --set 'stem'"),
    "set of an unknown form": (["--set", "stem=bottlneck:4"], "did you mean bottleneck?"),
    "set with too many widths": (["--set", "stem=reduce:4,4"], "gives 2 widths"),
    "set keep with a width": (["--set", "stem=keep:4"], "keep without a width"),
    "set project with a ratio": (["--set", "stem=project:0.5"], "an integer"),
    "set matches nothing": (["--set", "stam=reduce:2"], "layers are called stem"),
    "set project matches nothing": (["--set", "stam=project:2"], "no branch of a concatenation"),
    "include matches nothing": ([*HALF, "--include", "layer9.*"], "'layer9.*' matches no layer"),
    "exclude matches nothing": ([*HALF, "--exclude", "layer9.*"], "'layer9.*' matches no layer"),
    "rank with set alone": (["--set", "stem=reduce:2", "--rank", "4"], "--rank goes with --pass"),
    "unknown pass": (["--pass", "insert-botleneck"], "did you mean insert-bottleneck"),
    "pass that needs a branch": (["--pass", "project-branch"], "--set 'PATH=project:32'"),
    "energy and rank": ([*HALF, "--energy", "0.9"], "exclude each other"),
    "energy and rank in": (["--pass", "insert-bottleneck", "--energy", "0.9", "--rank-in", "4"], "exclude each other"),
    "energy that is none": (["--pass", "insert-bottleneck", "--energy", "much"], "--energy"),
    "share that is none": ([*HALF, "--min-share", "200"], "--min-share"),
    "error that is none": ([*HALF, "--max-error", "small"], "--max-error"),
    "error below zero": ([*HALF, "--max-error", "-1"], "--max-error"),
    "norm with weights": ([*HALF, "--norm", "batch_norm"], "init='fresh'"),
    "unknown norm": ([*HALF, "--init", "fresh", "--norm", "layer"], "unknown norm"),
    "unknown activation": ([*HALF, "--init", "fresh", "--activation", "reluu"], "unknown activation"),
    "bound and no proof": ([*HALF, "--no-verify", "--max-error", "1"], "exclude each other"),
    "no such plan": (["--plan", "no.json"], "cannot read the plan"),
    "plan that is no JSON": (["--plan", "net.py"], "net.py, line 2"),
    "model for no folder": ([*HALF, "--model", "net.py"], "--model is for a saved folder"),
    "output nowhere": ([*HALF, "--output", "no/such/report.txt"], "does not exist"),
    "folder is a file": ([*HALF, "--out", "net.py"], "the output folder is a file"),
    "folder of somebody else": ([*HALF, "--out", "theirs", "--force"], "did not write"),
}


@pytest.mark.parametrize("case", USAGE)
def test_refused_in_plain_words(run: Run, folder: Path, case: str) -> None:
    arguments, said = USAGE[case]
    (folder / "theirs").mkdir()
    (folder / "theirs" / "thesis.txt").write_text("years of work")
    before = sorted(folder.rglob("*"))
    out = () if "--out" in arguments else ("--out", "out")
    result = run("rewrite", "net.py", *arguments, *out)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert messages(result.stderr).startswith("error: ")
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert [p for p in sorted(folder.rglob("*")) if "__pycache__" not in p.parts] == before


def plan_of(run: Run, folder: Path) -> list[str]:
    run("plan", "net.py", *HALF, "--out", "plan.json")
    return (folder / "plan.json").read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"rank_in": 8', '"rank_in": 17', "an integer from 1 to 16"),
        ('"rank_in": 8', '"rank_in": 0', "an integer from 1 to 16"),
        ('"rank_in": 8', '"rank_in": "many"', "an integer"),
        ('"form": "bottleneck"', '"form": "bottle"', "bottleneck, reduce"),
        ('"action": "factorize"', '"action": "delete"', "factorize"),
        ('"path": "body.1"', '"path": "body.7"', "a path of this model"),
        ('"path": "body.1"', '"path": 7', "a string"),
        ('"schema": "pwrewrite.plan/1"', '"schema": "pwrewrite.plan/9"', "pwrewrite.plan/1"),
        ('"groups": 1', '"groups": 1,,', "line"),
    ],
)
def test_a_plan_edited_into_nonsense_is_refused_with_its_line(
    run: Run, folder: Path, old: str, new: str, expected: str
) -> None:
    lines = plan_of(run, folder)
    number = max(i for i, line in enumerate(lines) if old in line)
    lines[number] = lines[number].replace(old, new)
    (folder / "plan.json").write_text("".join(lines))
    result = run("rewrite", "net.py", "--plan", "plan.json", "--out", "out")
    assert result.exit_code == 2, result.output
    assert f"plan.json, line {number + 1}" in result.stderr
    assert expected in result.stderr
    assert not (folder / "out").exists()


def test_a_plan_for_another_model(run: Run, folder: Path) -> None:
    plan_of(run, folder)
    wider = run("rewrite", "net.py", "--arg", "width=32", "--plan", "plan.json")
    assert wider.exit_code == 2
    assert "3→16" in wider.stderr
    assert "3→32" in wider.stderr
    text = (folder / "net.py").read_text().replace("self.stem", "self.trunk")
    (folder / "other.py").write_text(text)
    other = run("rewrite", "other.py", "--plan", "plan.json")
    assert other.exit_code == 2
    assert "no module 'stem'" in other.stderr
    assert "another model" in other.stderr


def test_a_plan_beside_passes(run: Run, folder: Path) -> None:
    plan_of(run, folder)
    for options, named in ((HALF, "--pass"), (("--set", "stem=keep"), "--set"), (("--min-share", "5%"), "--min-share")):
        result = run("rewrite", "net.py", "--plan", "plan.json", *options)
        assert result.exit_code == 2
        assert f"--plan and {named} exclude each other" in result.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(run: Run, folder: Path, value: float) -> None:
    import pwrewrite

    model = pwrewrite.load_target("net.py").model
    with torch.no_grad():
        model.body[1].weight[3, 2, 1, 0] = value
    torch.save(model.state_dict(), folder / "w.pt")
    result = run("rewrite", "net.py", "--weights", "w.pt", *HALF, "--out", "out")
    assert result.exit_code == 1
    assert "where: body.1" in result.stderr
    assert "NaN" in result.stderr or "Inf" in result.stderr or "finite" in result.stderr
    assert not (folder / "out").exists()


def test_nothing_to_rewrite_says_why(run: Run, folder: Path) -> None:
    result = run("rewrite", "net.py", "--pass", "factorize-pointwise", "--out", "out")
    assert result.exit_code == 1
    assert "there is nothing to rewrite" in result.stderr
    assert "got: 2 wrong-form" in result.stderr
    shown = run("rewrite", "net.py", "--pass", "factorize-pointwise", "--dry-run", "--all")
    assert shown.exit_code == 0
    assert "not a 1×1 convolution" in shown.stdout
    assert not (folder / "out").exists()


def test_a_set_that_cannot_be_done_is_no_success(run: Run) -> None:
    result = run("rewrite", "net.py", *HALF, "--set", "body.1=bottleneck:16,16")
    assert result.exit_code == 1
    assert "--set 'body.1=bottleneck:16,16' could not be done" in result.stderr
    assert "no-gain" in result.stderr
    linear = run("rewrite", "net.py", *HALF, "--set", "head=bottleneck:4")
    assert linear.exit_code == 1
    assert "pair is for linear maps" in linear.stderr


def test_a_folder_needs_its_model_or_trust(run: Run, folder: Path) -> None:
    run("rewrite", "net.py", *HALF, "--out", "out")
    marker = folder / "ran"
    (folder / "net.py").write_text(f"open({str(marker)!r}, 'w')\n" + (folder / "net.py").read_text())
    for command in (["analyze", "out"], ["rewrite", "out", *HALF], ["plan", "out"], ["verify", "out", "out"]):
        result = run(*command)
        assert result.exit_code == 2, command
        assert "--model TARGET" in result.stderr
        assert not marker.exists()
    assert run("analyze", "out", "--trust-target").exit_code == 0
    assert marker.exists()
    for extra in (["--weights", "w.pt"], ["--model", "out"]):
        assert run("rewrite", "out", "--trust-target", *HALF, *extra).exit_code == 2


def test_a_model_for_two_targets_that_are_none(run: Run) -> None:
    result = run("verify", "net.py", "net.py", "--model", "net.py")
    assert result.exit_code == 2
    assert "--model is for saved folders" in result.stderr


def test_an_output_folder_that_may_not_be_written(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    result = run("rewrite", "net.py", *HALF, "--out", "out")
    assert result.exit_code == 2
    assert result.stdout == ""  # before any work
    assert "no write permission" in result.stderr
    assert not (folder / "out").exists()


@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool) -> None:
    if earlier:
        run("rewrite", "net.py", "--set", "stem=reduce:2", "--out", "out")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = run("rewrite", "net.py", *HALF, "--out", "out", "--force")
    assert result.exit_code == 2
    assert "no space left on device" in result.stderr
    assert "Structure  verified" in result.stdout  # the work is not lost without a trace
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert after == before
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from pwrewrite.cli import main
main()
"""


def test_a_disk_that_takes_no_more_bytes(folder: Path) -> None:
    """A limit on the size of files stands in for a full disk: the weights' writer meets it in native code."""
    done = subprocess.run(
        [*python(), "-c", LIMITED, "rewrite", "net.py", *HALF, "--out", "out", "--no-verify", "--save-unverified"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "error: cannot write" in done.stderr
    assert sorted(p.name for p in folder.iterdir()) == ["net.py"]


SLOW = """
import sys, time
import pwrewrite.targets.storage as storage
usual = storage.{function}
def slow(*given, **named):
    usual(*given, **named)
    print("READY", file=sys.stderr, flush=True)
    time.sleep(60)
storage.{function} = slow
from pwrewrite.cli import main
main()
"""


def default_interrupts() -> None:
    """A test run in the background may ignore SIGINT, and its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("function", ["_save_weights", "Path.write_text"])
def test_ctrl_c_while_saving(run: Run, folder: Path, function: str) -> None:
    """Neither a folder nor parts of one; what an earlier rewrite saved there stays."""
    run("rewrite", "net.py", "--set", "stem=reduce:2", "--out", "out")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    arguments = ["rewrite", "net.py", *HALF, "--out", "out", "--force", "--no-verify", "--save-unverified"]
    process = subprocess.Popen(
        [*python(), "-c", SLOW.format(function=function), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_interrupts,
    )
    assert process.stderr is not None
    assert next_message(process.stderr) == "READY\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert messages(stderr) == "interrupted\n"
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert after == before
    assert json.loads((folder / "out" / "plan.json").read_text())
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_escape_sequences_from_files_reach_no_terminal(run: Run, folder: Path) -> None:
    evil = "a\x1b]0;owned\x07\u202eb"
    plan = {
        "schema": "pwrewrite.plan/1",
        "ops": [{"action": "factorize", "path": evil, "pass": evil, "settings": {"form": evil}}],
        "skipped": [{"path": evil, "reason": "pointwise", "detail": evil}],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "raises.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.conv = nn.Conv2d(3, 4, 3)\n\n    def forward(self, x):\n"
        f"        raise ValueError({evil!r})\n\n\nexample_inputs = torch.zeros(1, 3, 8, 8)\n"
    )
    planned = ("rewrite", "net.py", "--plan", "plan.json", "--dry-run")
    for command in (planned, ("analyze", "raises.py"), ("analyze", evil)):
        result = run(*command)
        assert result.exit_code
        assert "\\x1b" in result.stderr
        assert not {c for c in result.stdout + result.stderr if not c.isprintable()} - {"\n", "\t"}
