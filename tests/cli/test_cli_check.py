"""`pwrewrite check` and `pwrewrite diff`: exit codes, formats, and files that nobody should trust."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from messages import messages
from typer.testing import Result

Run = Callable[..., Result]

pytest_plugins = ["pytester"]


def test_within_the_limits(run: Run) -> None:
    result = run("check", "net.py", "--max-params", "5k", "--max-macs", "2M", "--max-peak-memory", "1MB")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("net.py\nwithin all 3 limits\n")
    assert result.stdout.count("✓") == 3


def test_over_a_limit_is_exit_code_1_and_names_the_layers(run: Run) -> None:
    result = run("check", "net.py", "--max-params", "1k", "--max-macs", "2M")
    assert result.exit_code == 1
    assert "1 of 2 limits exceeded: parameters" in result.stdout
    assert "body.1  2.32 k" in result.stdout
    assert messages(result.stderr).startswith("error: net.py: 1 of 2 limits exceeded: parameters\n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "there is no limit to check"),
        (["--max-increase", "macs=2%"], "needs a --baseline"),
        (["--max-increase", "speed=2%", "--baseline", "a.json"], "--max-increase makes no sense"),
        (["--max-increase", "macs=fast", "--baseline", "a.json"], "--max-increase makes no sense"),
        (["--max-peak-memory", "much"], "--max-peak-memory is no size"),
        (["--max-macs", "1M", "--warn-at", "3"], "--warn-at"),
        (["--baseline", "none.json"], "none.json"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Run, options: list[str], says: str) -> None:
    result = run("check", "net.py", *options)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_against_a_baseline(run: Run) -> None:
    assert run("analyze", "net.py", "--format", "json", "--output", "main.json").exit_code == 0
    assert run("check", "net.py", "--baseline", "main.json").exit_code == 0
    grown = run("check", "net.py", "--arg", "width=24", "--baseline", "main.json", "--max-increase", "macs=2%")
    assert grown.exit_code == 1
    assert "MACs  what grew most against the baseline" in grown.stdout
    assert "body.1  +" in grown.stdout
    allowed = run("check", "net.py", "--arg", "width=24", "--baseline", "main.json", "--max-increase", "macs=200%")
    assert allowed.exit_code == 0


def test_a_target_as_the_baseline(run: Run) -> None:
    assert run("check", "net.py", "--baseline", "net.py:Net").exit_code == 0


def test_for_github(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    (folder / "summary.md").write_text("before\n")
    result = run(
        "check", "net.py", "--max-params", "1k", "--max-macs", "700k", "--warn-at", "90%", "--format", "github"
    )
    assert result.exit_code == 1
    first, second = result.stdout.splitlines()
    assert first.startswith("::error file=net.py,title=net.py%3A parameters::parameters: 2,938, at most 1,000; most: ")
    assert second.startswith(("::warning file=net.py", "::error file=net.py", "::notice file=net.py"))
    summary = (folder / "summary.md").read_text()
    assert summary.startswith("before\n# `net.py`")
    assert "| limit |" in summary.replace("|  |", "|")


def test_a_summary_that_cannot_be_written_is_an_error(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder))
    result = run("check", "net.py", "--max-params", "5k", "--format", "github")
    assert result.exit_code == 2
    assert messages(result.stderr).startswith("error: cannot write")


def test_for_junit(run: Run) -> None:
    result = run("check", "net.py", "--max-params", "1k", "--max-macs", "2M", "--format", "junit")
    suite = ElementTree.fromstring(result.stdout)
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert [case.get("name") for case in suite] == ["parameters", "MACs"]
    assert suite[0].find("failure") is not None
    assert suite[1].find("failure") is None


def test_json_and_a_file(run: Run, folder: Path) -> None:
    result = run("check", "net.py", "--max-params", "5k", "--format", "json", "--output", "check.json")
    assert result.exit_code == 0
    data = json.loads((folder / "check.json").read_text())
    assert data["findings"][0]["value"] == 2938


def test_a_difference(run: Run, folder: Path) -> None:
    run("analyze", "net.py", "--format", "json", "--output", "main.json")
    (folder / "wide.py").write_text((folder / "net.py").read_text().replace("width=16", "width=24"))
    result = run("diff", "main.json", "wide.py")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("main.json → wide.py\n3 changed, 0 layers the same\n")
    assert "| layer |" in run("diff", "main.json", "wide.py", "--format", "markdown").stdout.replace("|  |", "|")
    same = run("diff", "main.json", "net.py", "--format", "json")
    assert json.loads(same.stdout)["layers"] == []


def test_a_saved_folder_beside_its_original(run: Run) -> None:
    saved = run("rewrite", "net.py", "--pass", "insert-bottleneck", "--rank", "4", "--out", "small")
    assert saved.exit_code == 0, saved.stderr
    result = run("diff", "net.py", "small")
    assert result.exit_code == 0, result.stderr
    assert "1×1 conv2d" in result.stdout
    run("analyze", "net.py", "--format", "json", "--output", "main.json")
    again = run("diff", "main.json", "small", "--model", "net.py")
    assert again.stdout.splitlines()[3:] == result.stdout.splitlines()[3:]
    lost = run("diff", "main.json", "small")
    assert lost.exit_code == 2
    assert "Traceback" not in lost.stderr


def test_crafted_names_reach_no_terminal_and_no_command(run: Run, folder: Path) -> None:
    run("analyze", "net.py", "--format", "json", "--output", "main.json")
    data = json.loads((folder / "main.json").read_text())
    evil = "\x1b[2J\r\n::set-output name=x::y<script>|`"
    data["layers"][0]["path"] = evil
    data["layers"][0]["op"] = "=cmd\x07"
    (folder / "evil.json").write_text(json.dumps(data))
    for form in ("table", "markdown"):
        text = run("diff", "evil.json", "net.py", "--format", form).stdout
        assert "\x1b" not in text
        assert "\x07" not in text
    github = run("check", "net.py", "--baseline", "evil.json", "--max-params", "1", "--format", "github").stdout
    assert all(line.startswith(("::error ", "::notice ", "::warning ")) for line in github.splitlines())


@pytest.mark.parametrize(
    "change",
    [
        lambda data: "[" * 100_000,
        lambda data: json.dumps({**data, "layers": [1, 2]}),
        lambda data: json.dumps(
            {**data, "layers": [{**data["layers"][0], "path": {"a": 1}}], "modules": [{"path": []}]}
        ),
        lambda data: json.dumps({**data, "layers": [{**data["layers"][0], "in_channels": "9" * 5000}]}),
        lambda data: json.dumps(data).replace('"macs": ', '"macs": NaN, "x": '),
        lambda data: '{"schema": "pwrewrite.analysis/1", "totals": {"macs": ' + "9" * 100_000 + "}}",
    ],
    ids=["deep", "numbers", "dicts", "digits", "nan", "huge"],
)
def test_a_crafted_analysis_is_refused(run: Run, folder: Path, change: Callable[[Any], str]) -> None:
    run("analyze", "net.py", "--format", "json", "--output", "main.json")
    (folder / "evil.json").write_text(change(json.loads((folder / "main.json").read_text())))
    result = run("diff", "evil.json", "main.json")
    assert result.exit_code == 2
    assert "internal error" not in result.stderr
    assert len(result.stderr) < 2_000


def test_the_fixture_of_pytest(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import torch
        from torch import nn

        def test_small(model_budget):
            assert model_budget(nn.Conv2d(3, 8, 3), torch.empty(1, 3, 8, 8, device="meta"), max_macs="8k").passed

        def test_large(model_budget):
            model_budget(nn.Conv2d(3, 80, 3), torch.empty(1, 3, 8, 8, device="meta"), max_macs="8k")
        """
    )
    installed = "pwrewrite" in entry_points(group="pytest11").names  # else this is a working tree that is not
    loaded = () if installed else ("-p", "pwrewrite.cli.pytest_plugin")
    result = pytester.runpytest_subprocess(*loaded, "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*1 of 1 limit exceeded: MACs*"])


def test_the_fixture_imports_nothing_heavy() -> None:
    code = "import sys, pwrewrite.cli.pytest_plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
