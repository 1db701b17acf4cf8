"""CSV as RFC 4180 has it: CRLF line ends, quotes where needed, integers unscaled.

What comes from a model is text to a spreadsheet: control characters are spelt out, and a text that would start a
formula has an apostrophe before it (OWASP, *CSV injection*).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from ..analysis.records import Analysis, LayerReport
from ..core.text import plain
from .rows import View, sort_layers

LAYER_COLUMNS = (
    *("path", "aliases", "op", "kernel", "stride", "dilation", "groups", "in_channels", "out_channels", "calls"),
    *("input_shape", "output_shape", "params", "macs", "flops", "share", "hotspot", "weight_bytes"),
    *("activation_bytes", "receptive_field", "bound", "intensity", "break_even_macs_rank_in"),
    *("break_even_macs_rank_out", "break_even_params_rank_in", "break_even_params_rank_out", "half_macs"),
    *("half_params", "skip_reason", "skip_detail", "sees_whole_input"),
)
"""The columns for layers, by the names of the JSON; new ones are added at the end."""


def layers(analysis: Analysis, view: View) -> str:
    """One row per layer, up to ``view.top``: sizes joined by ``x``, paths by blanks, shapes those of the first call."""
    reports = sort_layers(analysis, analysis.layers, view.sort)[: view.top]
    return table(LAYER_COLUMNS, (_row(report) for report in reports))


def _row(report: LayerReport) -> list[object]:
    """A row of the JSON without its nesting."""
    data: dict[str, Any] = report.to_dict()
    calls, ranks, skip = data["calls"], data["break_even"] or {}, data["skip"] or {}
    data |= calls[0] if calls else {}
    data |= {key if key.startswith("half") else f"break_even_{key}": value for key, value in ranks.items()}
    data |= {f"skip_{key}": value for key, value in skip.items()}
    data |= {"calls": len(calls), "macs": report.layer.macs, "aliases": " ".join(report.layer.aliases)}
    return [data.get(name) for name in LAYER_COLUMNS]


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """CSV text."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(head)
    writer.writerows([_cell(value) for value in row] for row in body)
    return out.getvalue()


def _cell(value: object) -> object:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "x".join(str(n) for n in value)
    if isinstance(value, str):
        text = plain(value)
        return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
    return repr(value) if isinstance(value, float) else value
