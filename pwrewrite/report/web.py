"""A report as one HTML file to look at: pictures and a table that a browser draws, and the page in words.

The file holds all that it needs: the scripts and the style of ``assets``, and the numbers as one JSON block. No request
leaves it: its own content security policy forbids them, and allows no script but these, by their hashes. Names from
models reach it as data in which nothing is markup (`_json`), and its scripts write them as text only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from ..analysis.records import Analysis
from ..core.records import Json
from . import analysis as analysis_page, compressed, frontier as frontier_page, fused, rewrite
from .budget_rows import NORMS
from .page import Page, Title
from .records import Compression, Frontier, Report
from .to_html import escape, html
from .web_data import frontier_data, model_data, pair_data, rewrite_data

SCRIPTS = ("dagre.min.js", "base.js", "treemap.js", "graph_layout.js", "graph.js", "charts.js", "table.js", "main.js")


def analysis(record: Analysis, words: Page | None = None) -> str:
    """The HTML file of an analysis; ``words`` in place of its usual page in words."""
    data = {"kind": "analysis", "target": record.target, "subtitle": record.model_class, "models": [model_data(record)]}
    return document(words or analysis_page.page(record), data)


def report(record: Report, words: Page | None = None, *, planned: bool = False) -> str:
    """The HTML file of a rewrite, or of a plan that was not carried out: the model before and after."""
    if words is None:
        words = rewrite.page(record, planned=planned) if record.fusing is None else fused.page(record)
    if record.models is None:
        return document(words)
    data = {"kind": "plan" if planned else "rewrite", **rewrite_data(record, planned=planned)}
    curve = record.frontier() if callable(record.frontier) else record.frontier
    return document(words, data | _drawn(curve))


def compression(record: Compression) -> str:
    """The HTML file of a compression: the original and the result, and what other budgets would have lost."""
    words, subtitle = compressed.page(record), compressed.headline(record)
    data = {"kind": "compress", **pair_data(record.target, subtitle, record.models, record.done)}
    return document(words, data | _drawn(record.frontier))


def frontier(record: Frontier) -> str:
    """The HTML file of a frontier."""
    norm = f"least predicted loss at every budget, {NORMS.get(record.sensitivity, record.sensitivity)}"
    data = {"kind": "frontier", "target": record.target, "subtitle": norm, "models": []}
    return document(frontier_page.page(record), data | _drawn(record))


def _drawn(curve: Frontier | None) -> dict[str, Json]:
    return {} if curve is None else {"frontier": frontier_data(curve)}


def document(words: Page, data: Mapping[str, Json] | None = None) -> str:
    """The file: style, scripts and their licences, the data, and the page in words; no more than words without data."""
    name = next((block.name for block in words if isinstance(block, Title)), "report")
    scripts, hashes, style, body, licence = _assets()
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; img-src data:"
    shown = f'<body>\n<main id="words">\n{html(words)}\n</main>\n'
    if data is not None:
        policy += f"; script-src {hashes}"
        shown = body.replace("<!--words-->", html(words))
        shown += f'<script type="application/json" id="data">{_json(data)}</script>\n<!--\n{licence}-->\n{scripts}'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(name)} · pwrewrite</title>\n<style>\n{style}</style>\n</head>\n{shown}</body>\n</html>\n"
    )


def _json(data: Mapping[str, Json]) -> str:
    """JSON in which nothing can end the script block that holds it or start another."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _assets() -> tuple[str, str, str, str, str]:
    """The script elements, their hashes, the style, the body, and the licence of what others wrote."""
    folder = files(__package__) / "assets"

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    texts = [read(name) for name in SCRIPTS]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    elements = "".join(f"<script>{text}</script>\n" for text in texts)
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    return elements, hashes, read("page.css"), read("body.html"), read("dagre.LICENSE.txt")
