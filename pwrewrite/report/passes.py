"""The list of passes: what there is, each with one line and whether it is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..forms import FORMS
from ..passes import ALL, FUSING, LayerPass, ProjectBranch
from .layout import HEAD_RULE
from .markdown import code, escape, pipe_table
from .table import WIDTH

_EXACT = {
    "no": "approximate; exact at full width",
    "eval": "exact in eval mode",
    "train": "exact in train mode",
    "both": "exact",
}


_FUSE = "(pwrewrite fuse)"


@dataclass(frozen=True, slots=True)
class PassRow:
    """A pass.

    Attributes:
        name: As for ``--pass``.
        summary: What it does.
        exact: ``no``, ``eval``, ``train`` or ``both``.
        set: How ``--set`` asks for it, or which command runs it.
    """

    name: str
    summary: str
    exact: str
    set: str

    def to_dict(self) -> dict[str, str]:
        """The same as plain JSON data."""
        return asdict(self)


def rows() -> list[PassRow]:
    """Every pass there is."""
    return [PassRow(kind.name, kind.summary, kind.exact, _set(kind)) for kind in (*ALL, *FUSING)]


def _set(kind: type) -> str:
    if issubclass(kind, LayerPass):
        return f"{kind.form}:{','.join(name.removeprefix('rank_').upper() for name in FORMS[kind.form])}"
    if issubclass(kind, ProjectBranch):
        return "project:CHANNELS"
    return _FUSE


def page(found: Sequence[PassRow], *, width: int = WIDTH) -> RenderableType:
    """As a table."""
    table = Table(
        box=HEAD_RULE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", width=width
    )
    table.add_column("pass", style="cyan", no_wrap=True)
    table.add_column("what it does", ratio=1, overflow="fold")
    table.add_column("exact", no_wrap=True)
    table.add_column("as --set PATH=", no_wrap=True)
    for row in found:
        table.add_row(*(Text(cell) for cell in (row.name, row.summary, _short(row.exact), row.set)))
    return Group(table, Text("\nno*: an approximation with its error reported; exact at full width", style="dim"))


def _short(exact: str) -> str:
    return {"no": "no*", "both": "yes"}.get(exact, exact)


def markdown(found: Sequence[PassRow]) -> str:
    """As a Markdown table."""
    cells = [
        (code(r.name), escape(r.summary), _EXACT[r.exact], r.set if r.set == _FUSE else code(f"PATH={r.set}"))
        for r in found
    ]
    return pipe_table(("pass", "what it does", "exact", "as --set"), cells, "llll") + "\n"
