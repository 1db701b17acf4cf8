"""Results as they print: ``print(result)`` is what the command shows, a notebook's cell the same as HTML.

A result's ``repr`` is a line that says what it is; its fields are there to be read one by one.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import fields, is_dataclass

from ..analysis.costs import Difference
from ..analysis.gates import GateResult
from ..analysis.records import Analysis
from ..core.errors import shortened
from ..core.exports import Exports
from ..core.numbers import count, plural
from ..core.plan import Plan
from ..core.verification import Verification
from . import (
    analysis,
    compressed,
    costs,
    exported,
    frontier,
    fused,
    rewrite,
    rewrite_rows as rows,
    terminal,
    to_html,
    web,
)
from .page import Facts, Line, Page, Title
from .records import Compression, Frontier, Report


def page(result: object) -> Page:
    """The page of a result; that of its report where it has one."""
    match result:
        case Analysis():
            return analysis.page(result)
        case Report():
            return rewrite.page(result) if result.fusing is None else fused.page(result)
        case Verification():
            return rewrite.verification_page(result)
        case Plan():
            return rewrite.plan_page(result)
        case Frontier():
            return frontier.page(result)
        case GateResult():
            return costs.check_page(result)
        case Difference():
            return costs.difference_page(result)
        case Exports():
            return exported.page(result)
        case Compression():
            return compressed.page(result)
    report = getattr(result, "report", None)
    if isinstance(report, Compression):
        return compressed.page(report)
    if not isinstance(report, Report):
        return (Title(_heading(result)), Line(""), Facts(_fields(result)))
    return page(report) if hasattr(result, "model") else rewrite.page(report, planned=True)


def summary(result: object) -> str:
    """A result in one line."""
    return f"<{type(result).__name__}{_summary(result)}>"


def _summary(result: object) -> str:
    match result:
        case Analysis(target=target, params=params, macs=macs, layers=layers, hotspots=hotspots):
            layers_ = f"{plural(len(layers), 'layer')}, {plural(len(hotspots), 'hotspot')}"
            return f" of {target}: {count(params)} params, {count(macs)} MACs, {layers_}"
        case Report(target=target):
            return f" of {target}: {rows.headline(result)}; {_proof(result.verification)}"
        case Verification():
            return f": {_proof(result)}"
        case Plan(ops=ops, skips=skips):
            return f": {plural(len(ops), 'op')}, {plural(len(skips), 'skip')}"
        case Frontier(target=target, kind=kind, points=points):
            return f" of {target}: {plural(len(points), 'point')} by {kind}"
        case GateResult(target=target):
            return f" of {target}: {costs.headline(result)}"
        case Exports(target=target):
            return f" of {target}: {exported.headline(result)}"
        case Compression(target=target):
            return f" of {target}: {compressed.headline(result)}"
        case Difference(before=before, after=after, layers=layers):
            return f" of {before.target} and {after.target}: {plural(len(layers), 'layer')} differ"
    report = getattr(result, "report", None)
    if isinstance(report, Compression):
        return _summary(report)
    if not isinstance(report, Report):
        return _heading(result).removeprefix(type(result).__name__)
    if hasattr(result, "model"):
        return _summary(report)
    return f" of {report.target}: {rows.headline(report, planned=True)}"


def _heading(result: object) -> str:
    """What a result is of: ``Capture of ResNet``."""
    about = next((getattr(result, name) for name in ("target", "tool", "model", "kind") if hasattr(result, name)), None)
    return f"{type(result).__name__} of {_short(about)}" if about else type(result).__name__


def _fields(result: object) -> list[tuple[str, str, str]]:
    shown = fields(result) if is_dataclass(result) and not isinstance(result, type) else ()
    return [(field.name, text, "") for field in shown if (text := _short(getattr(result, field.name)))]


def _short(value: object) -> str:
    """A value in a few words: the class of a module, how many entries a collection has."""
    if isinstance(value, Sized) and not isinstance(value, str):
        if isinstance(value, (tuple, list)) and len(value) <= 4 and all(isinstance(v, (str, int)) for v in value):
            return ", ".join(map(str, value))
        return plural(len(value), "entry", "entries")
    return shortened(str(value)) if value is None or isinstance(value, (str, int, float)) else type(value).__name__


def _proof(proof: Verification | None) -> str:
    return (
        "not verified" if proof is None else f"structure {rows.verdict(proof)}; outputs {rows.outputs_text(proof)[0]}"
    )


def text(result: object) -> str:
    """The report as the command prints it, without line breaks around it."""
    return terminal.text(page(result)).strip("\n")


def html(result: object) -> str:
    """The report as an HTML fragment."""
    return to_html.html(page(result))


def file(result: object) -> str:
    """The report as an HTML file."""
    report = result if isinstance(result, (Report, Compression)) else getattr(result, "report", None)
    match result:
        case Analysis():
            return web.analysis(result)
        case Frontier():
            return web.frontier(result)
    if isinstance(report, Compression):
        return web.compression(report)
    if isinstance(report, Report):
        return web.report(report, planned=report is not result and not hasattr(result, "model"))
    return web.document(page(result))
