"""The help of every command, spellings and their aliases, and what a mistyped value gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]
COMMANDS = ("analyze", "compress", "rewrite", "plan", "verify", "fuse", "export", "check", "diff", "passes")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_flags_have_no_type_and_examples_lines_of_their_own(
    run: Run, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    text = run(*command, "--help").stdout
    assert "<bool>" not in text
    assert "9223372036854775807" not in text
    for line in text.splitlines():
        assert line.count("pwrewrite ") <= 1 or "Usage" in line


def test_every_command_says_how_much_it_says(run: Run) -> None:
    for name in COMMANDS:
        text = run(name, "--help").stdout
        for flag in ("--verbose", "--quiet", "--debug"):
            assert flag in text


def test_old_spellings_are_aliases(run: Run, folder: Path) -> None:
    for flag in ("--report", "--output", "--out"):
        assert run("analyze", "net.py", flag, f"a{flag}.txt").exit_code == 0
        assert (folder / f"a{flag}.txt").exists()
    for flag in ("--report", "--output"):
        assert run("rewrite", "net.py", flag, f"r{flag}.json", "--format", "json", "--no-verify").exit_code == 0
        assert json.loads((folder / f"r{flag}.json").read_text())["edits"]
    for flag, passes in (("--pass", ["insert-bottleneck"]), ("--passes", ["insert-reduction,insert-bottleneck"])):
        data = json.loads(run("plan", "net.py", flag, *passes, "--format", "json").stdout)
        assert data["ops"][0]["pass"] == passes[0].split(",")[0]
    for flag in ("--pass", "--passes"):
        assert run("fuse", "net.py", flag, "merge-pointwise,channels-last", "--no-verify").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fuse", "net.py", "--passes", "fold-batchnorm"), "did you mean fold-batch-norm?"),
        (("analyze", "net.py", "--device", "rtx4090"), "82.6T,1008G"),
        (("analyze", "net.py", "--top", "-1"), "--top makes no sense\n  expected: a whole number from 0"),
        (("analyze", "net.py", "--top", "x"), "--top makes no sense"),
        (("rewrite", "net.py", "--multiple", "0"), "--multiple makes no sense"),
        (("rewrite", "net.py", "--seed", "9" * 30), "--seed makes no sense"),
        (("analyze", "net.py", "--device", "fast,slow"), "the peak of the device is not a number"),
        (("analyze", "net.py", "-v", "-q"), "--verbose and --quiet exclude each other"),
    ],
)
def test_a_mistyped_value_gets_a_sentence(run: Run, arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "DeviceProfile" not in result.stderr


def test_a_device_by_its_figures(run: Run) -> None:
    data = json.loads(run("analyze", "net.py", "--device", "82.6T,1008G", "--format", "json").stdout)
    assert "82.6T,1008G" in json.dumps(data)


def test_verbose_tells_the_steps_and_quiet_nothing(run: Run) -> None:
    verbose = run("rewrite", "net.py", "--no-verify", "-v").stderr
    for step in ("loading", "capturing", "proposing", "rewriting body.1"):
        assert step in verbose
    assert "nothing was saved" in verbose
    assert run("rewrite", "net.py", "--no-verify", "-q").stderr == ""
