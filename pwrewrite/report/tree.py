"""The module hierarchy with the cost of all that runs inside each module, as a tree with bars."""

from __future__ import annotations

from rich.table import Table

from ..analysis.records import Analysis
from ..core.numbers import count, percent
from . import rows
from .layout import Column, bar, fit

#: Levels shown unless the user says otherwise.
DEPTH = 2


def tree(analysis: Analysis, *, depth: int = DEPTH, width: int = 100) -> Table:
    """The hierarchy from the model down; modules without parameters and MACs are left out.

    Args:
        analysis: The analysis.
        depth: How many levels below the model itself.
        width: Terminal cells there are.

    Returns:
        A table of module, class, parameters, MACs, share and a bar.
    """
    names, kinds, params, macs, shares = [], [], [], [], []
    for node, lasts, more in rows.walk(analysis.tree, depth):
        name = rows.plain(node.name) or "(model)"
        names.append(_stem(lasts) + name + (" …" if more else ""))
        kinds.append(rows.plain(node.kind))
        params.append(count(node.params))
        macs.append(count(node.macs))
        shares.append(rows.share_of(node.macs, analysis.macs))
    return fit(
        [
            Column("module", names, right=False, style="cyan", shrink=24),
            Column("class", kinds, right=False, style="dim", shrink=12, keep=2),
            Column("params", params),
            Column("MACs", macs),
            Column("share", [percent(share) for share in shares], style="bold"),
            Column("", [bar(share, 20) for share in shares], right=False, style="blue", keep=1),
        ],
        width,
    )


def _stem(lasts: tuple[bool, ...]) -> str:
    """The lines left of a name: one stroke per ancestor that has more children to come."""
    if not lasts:
        return ""
    return "".join("   " if last else "│  " for last in lasts[:-1]) + ("└─ " if lasts[-1] else "├─ ")
