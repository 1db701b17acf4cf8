"""The list of passes: what there is, each with one line and whether it is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.records import Record
from ..passes import ALL, FUSING, LayerPass, Narrow, ProjectBranch
from .page import Column, Line, Page, Table


@dataclass(frozen=True, slots=True)
class PassRow(Record):
    """A pass: its ``--pass`` name, what it does, where it is exact, and the ``--set`` or command that runs it."""

    name: str
    summary: str
    exact: str
    set: str


def rows() -> list[PassRow]:
    """Every pass there is."""
    return [PassRow(kind.name, kind.summary, kind.exact, _set(kind)) for kind in (*ALL, *FUSING)]


def _set(kind: type) -> str:
    if issubclass(kind, LayerPass):
        return f"{kind.form.name}:{','.join(name.removeprefix('rank_').upper() for name in kind.form.widths)}"
    if issubclass(kind, ProjectBranch):
        return "project:CHANNELS"
    if issubclass(kind, Narrow):
        return "narrow:CHANNELS"
    return "(pwrewrite fuse)" if kind in FUSING else "(--pass)"


def page(passes: Sequence[PassRow]) -> Page:
    """As a table."""
    table = Table(
        [
            Column("pass", [row.name for row in passes], right=False, style="cyan", code=True),
            Column("what it does", [row.summary for row in passes], right=False, shrink=20, wrap=True),
            Column("exact", [{"no": "no*", "both": "yes"}.get(row.exact, row.exact) for row in passes], right=False),
            Column("as --set PATH=", [row.set for row in passes], right=False, code=True),
        ]
    )
    return (table, Line(""), Line("no*: an approximation with its error reported; exact at full width", "dim"))
