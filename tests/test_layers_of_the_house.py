"""Data goes down the house and never back up: a module imports only from lower levels.

`LEVELS` is the table. A part of the package that it does not know fails: give it the lowest level that is above all
that it imports.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pwrewrite"

LEVELS = {
    "errors": 0,
    "convolution": 1,
    "plan": 1,
    "verification": 1,
    "cost": 2,
    "decompose": 2,
    "forms": 3,
    "modules": 4,
    "fused": 4,
    "capture": 5,
    "loading": 5,
    "code_trace": 4,
    "graph_edit": 5,
    "swap": 5,
    "freezing": 6,
    "graph": 6,
    "eligibility": 6,
    "conventions": 6,
    "actions": 7,
    "analysis": 7,
    "apply": 8,
    "survival": 9,
    "passes": 10,
    "planning": 11,
    "storage": 11,
    "verify": 11,
    "report": 12,
    "choices": 12,
    "opening": 12,
    "export": 12,
    "steps": 13,
    "budgeting": 14,
    "rewriting": 15,
    "fusing": 16,
    "by_target": 16,
    "fuse_by_target": 17,
    "budget_by_target": 17,
    "api": 17,
    "cli": 18,
    "__init__": 19,
    "__main__": 19,
}
"""Top-level module or package to its level; parts of one package may import each other."""


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(file: Path) -> list[tuple[int, str]]:
    """Line and part of every import from the package itself, those inside functions included."""
    package = ["pwrewrite", *file.relative_to(PACKAGE).parent.parts]
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[list[str]] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names] if len(base) == 1 else [base]
        found += [(node.lineno, name[1]) for name in names if name[0] == "pwrewrite" and len(name) > 1]  # type: ignore[attr-defined]
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_has_a_level() -> None:
    unknown = {part_of(file) for file in FILES} - set(LEVELS)
    assert not unknown, f"give {', '.join(sorted(unknown))} a level in LEVELS"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    own = part_of(file)
    for line, part in imported(file):
        if part in LEVELS and own in LEVELS and part != own:
            assert LEVELS[part] < LEVELS[own], f"{file.name}, line {line}: {own} imports {part}"


def test_imports_are_seen() -> None:
    seen = {part for file in FILES for _, part in imported(file)}
    assert seen >= {"errors", "plan", "capture", "decompose", "passes", "apply"}
