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


def test_the_name_of_a_file_asks_for_a_frontier_to_look_at(run: Run, folder: Path) -> None:
    assert run("plan", "net.py", "--pareto", "--report", "frontier.html").exit_code == 0
    assert '"kind":"frontier"' in (folder / "frontier.html").read_text(encoding="utf-8")


def test_a_compression_is_drawn(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", str(folder / "cache"))
    options = ("--budget", "macs=0.6", "--format", "html", "--report", "report.html")
    assert run("compress", "net.py", *options).exit_code == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert '"kind":"compress"' in text
    assert '"name":"before"' in text
    assert '"name":"after"' in text
