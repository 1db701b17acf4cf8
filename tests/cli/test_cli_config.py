"""A project's options: `pwrewrite.toml`, or a table in `pyproject.toml`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]


def test_a_command_without_arguments_does_what_the_project_says(run: Run, folder: Path) -> None:
    (folder / "pwrewrite.toml").write_text('[check]\ntarget = "net.py"\nmax-params = "1k"\nmax-macs = 2000000\n')
    result = run("check")
    assert result.exit_code == 1
    assert "1 of 2 limits exceeded: parameters" in result.stdout


def test_what_is_typed_wins(run: Run, folder: Path) -> None:
    (folder / "pwrewrite.toml").write_text('[check]\ntarget = "gone.py"\nmax-params = "1k"\n')
    assert run("check", "net.py", "--max-params", "5k").exit_code == 0


def test_pyproject_and_lists_tables_and_flags(run: Run, folder: Path) -> None:
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[tool.pwrewrite.check]\ntarget = "net.py"\nbaseline = "net.py"\n'
        'max-increase = { macs = "2%", params = 0 }\nstrict = true\narg = { width = 16 }\ninput = ["1x3x16x16"]\n'
    )
    result = run("check", "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert [line.split('"')[3] for line in result.stdout.splitlines() if '"kind"' in line] == [
        "macs",
        "params",
        "unpriced",
    ]
    (folder / "pwrewrite.toml").write_text('[check]\ntarget = "net.py"\nmax-params = 1\n')  # its own file goes first
    assert run("check").exit_code == 1


def test_one_text_stands_for_a_list_of_one(run: Run, folder: Path) -> None:
    text = '[check]\ntarget = "net.py"\nbaseline = "net.py"\nmax-increase = "macs=2%"\ninput = "1x3x16x16"\n'
    (folder / "pwrewrite.toml").write_text(text)
    result = run("check")
    assert result.exit_code == 0, result.stderr
    assert "within its limit" in result.stdout


def test_other_commands_and_files_without_our_table_are_left_alone(run: Run, folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[tool.other]\nx = 1\n")
    assert run("analyze", "net.py").exit_code == 0
    (folder / "pwrewrite.toml").write_text("[analyze]\ntop = 1\n[check]\nmax-params = 1\n")
    result = run("analyze", "net.py")
    assert result.exit_code == 0, result.stderr
    assert "(--top)" in result.stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[check]\nmax-parms = 3\n", "did you mean max-params?"),
        ("[chek]\nmax-params = 3\n", "did you mean check?"),
        ("check = 3\n", "[check] is not a table"),
        ("[check\n", "pwrewrite.toml cannot be read"),
        ("[check]\nmax-params = 1979-05-27\n", "no value of an option"),
        ("[check]\nmax-params = 'many'\n", "--max-params is not a number"),
        ("[check]\nmax-params = ['1k']\n", "one text or number"),
        ("[check]\nstrict = 'no'\n", "strict is on or off"),
        ("[check]\nmax-params = 'many'\n", "with: max-params of pwrewrite.toml"),
        ("[check]\nwarn-at = 0.9\nmax-increase = 'params=0'\n", "with: warn-at, max-increase of pwrewrite.toml"),
        ("[check]\ndebug = true\n", "no such option of check: debug"),
        (f"[check]\nmax-params = {'[' * 5000}{']' * 5000}\n", "pwrewrite.toml cannot be read"),
        (f"[check]\nmax-params = {'9' * 5000}\n", "pwrewrite.toml cannot be read"),
        ('["\\u001b[2J"]\nx = 1\n', "no such command"),
        ("[analyze]\nsort = 'colour'\n[check]\nmax-params = '1k'\n", ""),
    ],
)
def test_what_makes_no_sense_is_said(run: Run, folder: Path, text: str, says: str) -> None:
    (folder / "pwrewrite.toml").write_text(text)
    result = run("check", "net.py")
    assert result.exit_code in ((1, 2) if not says else (2,))
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    assert "\x1b[2J" not in result.stderr
    assert run("check", "--help").exit_code == 0


@pytest.mark.parametrize(("text", "code"), [("[tool]\npwrewrite = 3\n", 2), ("tool = 3\n", 0)])
def test_pyproject_without_tables(run: Run, folder: Path, text: str, code: int) -> None:
    (folder / "pyproject.toml").write_text(text)
    result = run("check", "net.py", "--max-params", "5k")
    assert result.exit_code == code
    assert "internal error" not in result.stderr


def test_a_choice_that_there_is_not(run: Run, folder: Path) -> None:
    (folder / "pwrewrite.toml").write_text("[analyze]\nsort = 'colour'\n")
    result = run("analyze", "net.py")
    assert result.exit_code == 2
    assert "colour" in result.stderr
