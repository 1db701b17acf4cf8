"""``pwrewrite passes``: what there is."""

from __future__ import annotations

import json

from .options import Listed
from .showing import show


def passes(listed: Listed) -> None:
    """Lists the passes, each with what it does and whether it is exact."""
    from ..report import passes as listing

    rows = listing.rows()
    show(
        listed,
        listing.page(rows),
        json=lambda: json.dumps([row.to_dict() for row in rows], indent=2, ensure_ascii=False) + "\n",
    )
