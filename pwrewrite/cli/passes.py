"""``pwrewrite passes``: what there is."""

from __future__ import annotations

import json

from . import options as o
from .options import Format
from .running import handled
from .showing import show


def passes(form: o.FormatOption = Format.TABLE, debug: o.Debug = False) -> None:
    """Lists the passes, each with what it does and whether it is exact."""
    with handled(debug):
        from ..report import passes as listing

        found = listing.rows()
        show(
            form.value,
            None,
            page=lambda width: listing.page(found, width=width),
            markdown=lambda: listing.markdown(found),
            data=lambda: json.dumps([row.to_dict() for row in found], indent=2, ensure_ascii=False) + "\n",
        )
