"""Data goes through the rooms in one direction and never back.

A room imports only rooms before it in `ROOMS`, no files inside a room import each other in a circle, and no file of
the package is loose at its top. Imports inside functions count too; those under ``TYPE_CHECKING`` count for rooms.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).parents[1] / "pwrewrite"

ROOMS = (
    "core",
    "decompose",
    "forms",
    "layers",
    "capturing",
    "analysis",
    "edit",
    "passes",
    "targets",
    "engines",
    "verifying",
    "planning",
    "report",
    "workflows",
    "cli",
)
"""From the bottom up: a room imports only rooms that stand before it."""

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> tuple[str, ...]:
    """Dotted name of a file inside the package, a package's own name for its ``__init__``."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_of(file): file for file in FILES}


def imports(file: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and module of every import from the package itself, those inside functions included."""
    module = module_of(file)
    package = module if file.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = tuple(alias.name.split("."))
                if name[0] == "pwrewrite":
                    yield node.lineno, name[1:]
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            elif base[:1] == ("pwrewrite",):
                base = base[1:]
            else:
                continue
            for alias in node.names:
                yield node.lineno, (*base, alias.name) if (*base, alias.name) in MODULES else base


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_rooms_import_only_rooms_before_them(file: Path) -> None:
    module = module_of(file)
    if not module or module == ("__main__",):
        return
    assert module[0] in ROOMS, f"{file.name} stands loose at the package's top, or its room is missing in ROOMS"
    for line, imported in imports(file):
        assert imported, f"{file.name}, line {line}: imports the package's top, whose names are for users"
        if imported[0] != module[0]:
            before = ROOMS[: ROOMS.index(module[0])]
            assert imported[0] in before, f"{file.name}, line {line}: {module[0]} imports {imported[0]}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_inside_a_room(room: str) -> None:
    graph = nx.DiGraph()
    for module, file in MODULES.items():
        if module[:1] == (room,):
            graph.add_edges_from((module, other) for _, other in imports(file) if other[:1] == (room,))
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    circles = [" → ".join(".".join(m) for m in circle) for circle in nx.simple_cycles(graph)]
    assert not circles


def test_imports_are_seen() -> None:
    seen = {module[0] for file in FILES for _, module in imports(file) if module}
    assert seen >= {"core", "capturing", "decompose", "passes", "edit"}


def test_at_most_fifteen_rooms() -> None:
    assert len(ROOMS) <= 15
    assert {p.name for p in PACKAGE.iterdir() if p.suffix == ".py"} == {"__init__.py", "__main__.py"}
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(ROOMS)
