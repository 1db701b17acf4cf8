"""``--format html``: whatever a command shows, as a file for a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (("analyze", "net.py", "--tree"), "analysis"),
        (("rewrite", "net.py", "--rank", "0.5", "--all"), "rewrite"),
        (("rewrite", "net.py", "--rank", "0.5", "--dry-run"), "plan"),
        (("plan", "net.py", "--budget", "macs=0.6"), "plan"),
        (("plan", "net.py", "--pareto"), "frontier"),
        (("fuse", "net.py"), "rewrite"),
    ],
)
def test_pictures_and_words(run: Run, folder: Path, command: tuple[str, ...], kind: str) -> None:
    result = run(*command, "--format", "html", "--report", "report.html")
    assert result.exit_code == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert f'"kind":"{kind}"' in text
    assert '"target":"net.py' in text
    assert "<table>" in text.partition('id="words"')[2]
    assert text.endswith("</html>\n")


def test_what_has_no_model_to_draw_is_there_in_words(run: Run) -> None:
    for command in (("check", "net.py", "--max-params", "1M"), ("diff", "net.py", "net.py"), ("passes",)):
        text = run(*command, "--format", "html").stdout
        assert text.startswith("<!doctype html>")
        assert "<script" not in text
        assert "<td" in text


@pytest.mark.parametrize(
    ("command", "file", "begins"),
    [
        (("plan", "net.py", "--pareto"), "frontier.HTML", "<!doctype html>"),
        (("plan", "net.py", "--pareto"), "frontier.json", "{"),
        (("plan", "net.py", "--pareto", "--format", "markdown"), "frontier.svg", "# "),
        (("plan", "net.py", "--pareto"), "frontier.csv", "params,macs,"),
        (("analyze", "net.py"), "net.html", "<!doctype html>"),
        (("analyze", "net.py"), "net.csv", "path,"),
        (("analyze", "net.py", "--format", "json"), "net.csv", "{"),
        (("rewrite", "net.py", "--rank", "0.5"), "half.md", "# `net.py`"),
        (("rewrite", "net.py", "--rank", "0.5"), "half.txt", "net.py"),
        (("diff", "net.py", "net.py"), "diff.json", "{"),
        (("check", "net.py", "--max-params", "1M"), "check.xml", "<?xml"),
        (("check", "net.py", "--max-params", "1M", "--format", "table"), "check.xml", "net.py"),
    ],
)
def test_the_name_of_a_file_says_the_form_where_nothing_else_does(
    run: Run, folder: Path, command: tuple[str, ...], file: str, begins: str
) -> None:
    result = run(*command, "--report", file)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"written to {file}" in result.stderr
    assert (folder / file).read_text(encoding="utf-8").startswith(begins)


@pytest.mark.parametrize(
    ("command", "file", "known"),
    [
        (("plan", "net.py", "--pareto"), "frontier.pdf", ".csv, .svg"),
        (("plan", "net.py", "--rank", "0.5"), "plan.csv", ".html, or .txt"),
        (("analyze", "net.py"), "net.SVG", ".csv"),
        (("check", "net.py", "--max-params", "1M"), "check.yaml", ".xml"),
    ],
)
def test_a_form_that_there_is_not_is_refused(
    run: Run, folder: Path, command: tuple[str, ...], file: str, known: str
) -> None:
    result = run(*command, "--report", file)
    assert result.exit_code == 2
    assert known in result.stderr
    assert not (folder / file).exists()


def test_a_compression_is_drawn(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", str(folder / "cache"))
    options = ("--budget", "macs=0.6", "--report", "report.html")
    assert run("compress", "net.py", *options).exit_code == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert '"kind":"compress"' in text
    assert '"name":"before"' in text
    assert '"name":"after"' in text
    assert '"frontier":{"cost":"macs"' in text
