"""One row per layer, in CSV as RFC 4180 has it: CRLF line ends, quotes where needed, integers unscaled."""

from __future__ import annotations

import csv
import io

from ..analysis.records import Analysis, LayerReport
from .rows import View, sort_layers

COLUMNS = (
    "path",
    "aliases",
    "op",
    "kernel",
    "stride",
    "dilation",
    "groups",
    "in_channels",
    "out_channels",
    "calls",
    "input_shape",
    "output_shape",
    "params",
    "macs",
    "flops",
    "share",
    "hotspot",
    "weight_bytes",
    "activation_bytes",
    "receptive_field",
    "bound",
    "intensity",
    "break_even_macs_rank_in",
    "break_even_macs_rank_out",
    "break_even_params_rank_in",
    "break_even_params_rank_out",
    "half_macs",
    "half_params",
    "skip_reason",
    "skip_detail",
)
"""The columns; new ones are added at the end."""


def render(analysis: Analysis, view: View) -> str:
    """The layers: all of them unless ``view.top`` says otherwise.

    Args:
        analysis: The analysis.
        view: Their order and number.

    Returns:
        CSV text with a head. Sizes are joined by ``x``, several paths by blanks; shapes are those of the first call.
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    reports = sort_layers(analysis, analysis.layers, view.sort)
    writer.writerows(_row(report) for report in reports[: view.top])
    return out.getvalue()


def _row(report: LayerReport) -> list[object]:
    layer, found, skip = report.layer, report.break_even, report.skip
    spec, call = layer.spec, layer.calls[0] if layer.calls else None
    ranks: list[object] = [""] * 6
    if found is not None:
        ranks = [
            found.macs_rank_in,
            found.macs_rank_out,
            found.params_rank_in,
            found.params_rank_out,
            found.half_macs,
            found.half_params,
        ]
    return [
        layer.path,
        " ".join(layer.aliases),
        layer.op,
        _sizes(spec.kernel_size if spec else None),
        _sizes(spec.stride if spec else None),
        _sizes(spec.dilation if spec else None),
        spec.groups if spec else "",
        layer.in_channels,
        layer.out_channels,
        len(layer.calls),
        _sizes(call.input_shape if call else None),
        _sizes(call.output_shape if call else None),
        layer.params,
        layer.macs,
        2 * layer.macs,
        repr(report.share),
        str(report.hotspot).lower(),
        layer.weight_bytes,
        report.activation_bytes,
        _sizes(report.receptive_field),
        report.bound,
        repr(report.intensity),
        *ranks,
        str(skip.reason) if skip else "",
        skip.detail if skip else "",
    ]


def _sizes(sizes: tuple[int, ...] | None) -> str:
    return "x".join(str(n) for n in sizes) if sizes is not None else ""
