"""The frontier of loss against cost: a table, CSV, JSON, Markdown and a picture."""

from __future__ import annotations

from html import escape

from ..core.numbers import count, duration, exact, percent, plural, size
from ..core.text import plain
from . import spreadsheet
from .budget_rows import NORMS, caveat
from .page import Column, Line, Page, Table, Title
from .records import Frontier, Point

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 400, 80, 50
_KINDS = {"macs": "MACs", "flops": "FLOPs", "params": "parameters", "bytes": "bytes of weights"}


def page(frontier: Frontier) -> Page:
    """The frontier as a table: what the budgets limit first, then the other costs, the loss and the layers."""
    kinds = [frontier.kind, *(kind for kind in frontier.original if kind != frontier.kind)]
    columns: list[Column] = []
    for i, kind in enumerate(kinds):
        keep = len(kinds) - i if i else None  # the narrower the page, the fewer kinds beside the one that is limited
        columns += [
            Column(kind, [_amount(kind, point.costs[kind]) for point in frontier.points], keep=keep),
            Column("of all", [percent(frontier.share(point, kind)) for point in frontier.points], keep=keep),
        ]
    columns.append(Column("loss", [f"{point.loss:.3g}" for point in frontier.points]))
    columns.append(Column("layers", [exact(point.layers) for point in frontier.points]))
    line = f"least predicted loss at every budget, {NORMS.get(frontier.sensitivity, frontier.sensitivity)}"
    line += caveat(frontier.random, frontier.sensitivity != "weights")
    return (Title(frontier.target, [line]), Line(""), Table(columns))


def comma_separated(frontier: Frontier) -> str:
    """The frontier as CSV: integers unscaled, CRLF line ends."""
    kinds = list(frontier.original)
    body = [
        [
            *(int(cost) if float(cost := point.costs[k]).is_integer() else cost for k in kinds),
            *(round(frontier.share(point, k), 6) for k in kinds),
            point.loss,
            point.layers,
        ]
        for point in frontier.points
    ]
    return spreadsheet.table([*kinds, *(f"{kind}_share" for kind in kinds), "loss", "layers"], body)


def picture(frontier: Frontier) -> str:
    """The frontier as an SVG: loss over the share of what the budgets limit."""
    most = max((point.loss for point in frontier.points), default=0.0) or 1.0

    def at(point: Point) -> tuple[float, float]:
        x = _LEFT + frontier.share(point, frontier.kind) * (_WIDTH - _LEFT - 20)
        return x, _HEIGHT - _BOTTOM - (point.loss / most) ** 0.5 * (_HEIGHT - _BOTTOM - 40)

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, frontier.points))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(plain(frontier.target))}</text>',
        f'<polyline points="{path}" fill="none" stroke="#1f6feb" stroke-width="2"/>',
    ]
    for point in frontier.points:
        x, y = at(point)
        share = percent(frontier.share(point, frontier.kind))
        line = f"{share} of the {frontier.kind}: loss {point.loss:.3g}, {plural(point.layers, 'layer')}"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#1f6feb"><title>{escape(line)}</title></circle>')
    original = _amount(frontier.kind, frontier.original[frontier.kind])
    label = escape(f"{_KINDS.get(frontier.kind, frontier.kind)} left, of {original}")
    base = _HEIGHT - _BOTTOM
    parts.append(f'<line x1="{_LEFT}" y1="{base}" x2="{_WIDTH - 20}" y2="{base}" stroke="black"/>')
    parts.append(f'<line x1="{_LEFT}" y1="40" x2="{_LEFT}" y2="{base}" stroke="black"/>')
    for i in range(6):
        x = _LEFT + i / 5 * (_WIDTH - _LEFT - 20)
        parts.append(f'<text x="{x:.0f}" y="{base + 18}" text-anchor="middle">{20 * i}%</text>')
        loss, y = most * (i / 5) ** 2, base - i / 5 * (base - 40)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{loss:.2g}</text>')
    parts.append(f'<text x="{(_WIDTH + _LEFT) / 2:.0f}" y="{base + 38}" text-anchor="middle">{label}</text>')
    title = "least predicted loss (square-root scale)"
    parts.append(f'<text transform="translate(14 {base / 2 + 20:.0f}) rotate(-90)" text-anchor="middle">{title}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _amount(kind: str, cost: float) -> str:
    if kind == "latency":
        return duration(cost)
    return size(int(cost)) if kind == "bytes" else count(int(cost))
