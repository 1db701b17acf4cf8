"""The frontier of loss against cost: a table, CSV, JSON, Markdown and a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..core.numbers import count, duration, exact, percent, size
from .layout import Column, fit, shorten
from .markdown import code, pipe_table
from .rows import plain

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 400, 70, 50


@dataclass(frozen=True, slots=True)
class Point:
    """One budget.

    Attributes:
        costs: What the model then costs, by kind.
        loss: The least predicted loss.
        layers: How many layers are rewritten.
    """

    costs: Mapping[str, float]
    loss: float
    layers: int


@dataclass(frozen=True)
class Frontier:
    """The least loss at every budget.

    Attributes:
        target: What was planned for.
        kind: What the budgets limit.
        original: What the model costs now, by kind.
        sensitivity: In what norm errors count.
        points: From the original down.
    """

    target: str
    kind: str
    original: Mapping[str, float]
    sensitivity: str
    points: tuple[Point, ...]

    def share(self, point: Point, kind: str) -> float:
        """A cost as a share of the original's."""
        return point.costs[kind] / self.original[kind] if self.original[kind] else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {
            "target": self.target,
            "kind": self.kind,
            "sensitivity": self.sensitivity,
            "original": dict(self.original),
            "points": [{**one.costs, "loss": one.loss, "layers": one.layers} for one in self.points],
        }

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


def page(found: Frontier, *, width: int) -> RenderableType:
    """The frontier as a table."""
    cells = _cells(found)
    header = Text(shorten(plain(found.target), width), style="bold").append("\n")
    header.append(f"least predicted loss at every budget, by {found.sensitivity}", style="not bold")
    names = _names(found)
    # The narrower the page, the fewer kinds beside the one that the budgets limit.
    keep = [None, None, *(i // 2 + 1 for i in reversed(range(len(names) - 4))), None, None]
    columns = [Column(name, [row[i] for row in cells], keep=keep[i]) for i, name in enumerate(names)]
    return Group(header, Text(), fit(columns, width))


def markdown(found: Frontier) -> str:
    """The frontier as Markdown."""
    names = _names(found)
    told = f"Least predicted loss at every budget, by {found.sensitivity}."
    table = pipe_table(names, _cells(found), "r" * len(names))
    return f"# {code(found.target)}\n\n{told}\n\n{table}\n"


def comma_separated(found: Frontier) -> str:
    """The frontier as CSV: integers unscaled, CRLF line ends."""
    made = io.StringIO()
    writer = csv.writer(made)
    kinds = list(found.original)
    writer.writerow([*kinds, *(f"{kind}_share" for kind in kinds), "loss", "layers"])
    for one in found.points:
        costs = [int(one.costs[k]) if float(one.costs[k]).is_integer() else one.costs[k] for k in kinds]
        writer.writerow([*costs, *(round(found.share(one, k), 6) for k in kinds), one.loss, one.layers])
    return made.getvalue()


def picture(found: Frontier) -> str:
    """The frontier as an SVG: loss over the share of what the budgets limit."""
    most = max((one.loss for one in found.points), default=0.0) or 1.0

    def at(one: Point) -> tuple[float, float]:
        x = _LEFT + found.share(one, found.kind) * (_WIDTH - _LEFT - 20)
        return x, _HEIGHT - _BOTTOM - (one.loss / most) ** 0.5 * (_HEIGHT - _BOTTOM - 40)

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, found.points))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(found.target)}</text>',
        f'<polyline points="{path}" fill="none" stroke="#1f6feb" stroke-width="2"/>',
    ]
    for one in found.points:
        x, y = at(one)
        told = f"{percent(found.share(one, found.kind))} of the {found.kind}: loss {one.loss:.3g}, {one.layers} layers"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#1f6feb"><title>{escape(told)}</title></circle>')
    base = _HEIGHT - _BOTTOM
    parts.append(f'<line x1="{_LEFT}" y1="{base}" x2="{_WIDTH - 20}" y2="{base}" stroke="black"/>')
    parts.append(f'<line x1="{_LEFT}" y1="40" x2="{_LEFT}" y2="{base}" stroke="black"/>')
    for i in range(6):
        x = _LEFT + i / 5 * (_WIDTH - _LEFT - 20)
        parts.append(f'<text x="{x:.0f}" y="{base + 18}" text-anchor="middle">{20 * i}%</text>')
        loss, y = most * (i / 5) ** 2, base - i / 5 * (base - 40)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{loss:.2g}</text>')
    parts.append(f'<text x="{(_WIDTH + _LEFT) / 2:.0f}" y="{base + 38}" text-anchor="middle">{found.kind}</text>')
    parts.append('<text x="14" y="34">predicted loss (root scale)</text></svg>')
    return "\n".join(parts) + "\n"


def _kinds(found: Frontier) -> list[str]:
    """What is limited first, then the rest."""
    return [found.kind, *(kind for kind in found.original if kind != found.kind)]


def _names(found: Frontier) -> list[str]:
    return [*(name for kind in _kinds(found) for name in (kind, "of all")), "loss", "layers"]


def _cells(found: Frontier) -> list[tuple[str, ...]]:
    kinds = _kinds(found)
    return [
        (
            *(text for kind in kinds for text in (_amount(kind, one.costs[kind]), percent(found.share(one, kind)))),
            f"{one.loss:.3g}",
            exact(one.layers),
        )
        for one in found.points
    ]


def _amount(kind: str, cost: float) -> str:
    if kind == "latency":
        return duration(cost)
    return size(int(cost)) if kind == "bytes" else count(int(cost))
