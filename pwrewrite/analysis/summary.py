"""An `Analysis` in about fifteen lines, as text and as an HTML fragment for notebooks.

This is what ``print(analysis)`` and a notebook cell show. The full tables live in ``pwrewrite.report``. Everything that
comes from the model (paths, class names, notes) is escaped in the HTML.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .records import Analysis, LayerReport

TOP = 5
"""Hotspots that the summary lists."""


def scaled(value: float, unit: str = "") -> str:
    """A number with an SI prefix and about three digits: ``scaled(4089184256, "MACs")`` is ``4.09 GMACs``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def binary(nbytes: float) -> str:
    """Bytes with a binary prefix: ``binary(1536)`` is ``1.5 KiB``."""
    for factor, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes:.0f} B"


def facts(analysis: Analysis) -> list[tuple[str, str]]:
    """The totals as ``(name, value)`` pairs, ready to print."""
    coverage, roofline, critical = analysis.coverage, analysis.roofline, analysis.critical_path
    inputs = ", ".join(
        f"{'×'.join(str(n) for n in _shape(entry))} {entry.get('dtype', '')}".strip() for entry in analysis.inputs
    )
    return [
        ("input", inputs or "none"),
        ("params", f"{analysis.params:,} ({binary(analysis.weight_bytes)} of weights)"),
        ("MACs", f"{analysis.macs:,} ({scaled(analysis.flops, 'FLOPs')})"),
        (
            "activations",
            f"{binary(analysis.activation_bytes)} written, peak {binary(analysis.peak.nbytes)}"
            + (f" at {analysis.peak.path or analysis.peak.node}" if analysis.peak.node else ""),
        ),
        ("critical path", f"{scaled(critical.macs, 'MACs')}, {critical.off_path_share:.1%} of the MACs lie off it"),
        (
            "roofline",
            f"≥ {roofline.seconds * 1e3:.3g} ms on {roofline.device}, {roofline.memory_bound_share:.0%} memory-bound",
        ),
        (
            "coverage",
            f"{coverage.capture}, {coverage.in_graph} of {coverage.convolutions} convolutions in the graph"
            + (f", {len(coverage.unpriced)} operations unpriced" if coverage.unpriced else ""),
        ),
    ]


def remark(report: LayerReport) -> str:
    """What could be done with a layer, in a few words."""
    if report.skip is not None:
        return str(report.skip.reason)
    if report.break_even is None:
        return ""
    return f"gains below ranks {report.break_even.macs_rank_in}/{report.break_even.macs_rank_out}"


def text(analysis: Analysis) -> str:
    """The summary as plain text."""
    lines = [f"{analysis.target} ({analysis.model_class})"]
    lines += [f"  {name:<14}{value}" for name, value in facts(analysis)]
    hotspots = analysis.hotspots
    if hotspots:
        share = sum(report.share for report in hotspots)
        lines.append(f"  {len(hotspots)} hotspots with {share:.1%} of the MACs:")
        width = max(len(report.layer.path) for report in hotspots[:TOP])
        for report in hotspots[:TOP]:
            lines.append(
                f"    {report.layer.path:<{width}}  {_kernel(report):<9}{report.share:>6.1%}"
                f"{scaled(report.layer.macs, 'MACs'):>12}  {remark(report)}".rstrip()
            )
    else:
        lines.append("  no hotspots")
    lines += [f"  note: {note}" for note in analysis.notes[:3]]
    return "\n".join(lines)


def html(analysis: Analysis) -> str:
    """The summary as an HTML fragment; every string of the model's is escaped."""
    head = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in facts(analysis)
    )
    parts = [
        f"<p><b>{escape(analysis.target)}</b> <code>{escape(analysis.model_class)}</code></p>",
        f"<table>{head}</table>",
    ]
    if analysis.hotspots:
        rows = "".join(
            f"<tr><td style='text-align:left'><code>{escape(report.layer.path)}</code></td>"
            f"<td>{escape(_kernel(report))}</td><td>{report.share:.1%}</td>"
            f"<td>{escape(scaled(report.layer.macs, 'MACs'))}</td>"
            f"<td style='text-align:left'>{escape(remark(report))}</td></tr>"
            for report in analysis.hotspots[: 2 * TOP]
        )
        parts.append(
            "<table><tr><th>hotspot</th><th>kernel</th><th>share</th><th>MACs</th><th>bottleneck</th></tr>"
            f"{rows}</table>"
        )
    parts += [f"<p>{escape(note)}</p>" for note in analysis.notes]
    return f"<div>{''.join(parts)}</div>"


def _shape(entry: dict[str, object]) -> list[int]:
    shape = entry.get("shape")
    return list(shape) if isinstance(shape, (list, tuple)) else []


def _kernel(report: LayerReport) -> str:
    spec = report.layer.spec
    if spec is None:
        return report.layer.op
    stride = "" if all(s == 1 for s in spec.stride) else f" /{max(spec.stride)}"
    return "×".join(str(k) for k in spec.kernel_size) + stride
