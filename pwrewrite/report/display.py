"""Results as they print: ``print(result)`` is what the command shows, a notebook's cell the same as HTML.

A result's ``repr`` is a line that says what it is; its fields are there to be read one by one.
"""

from __future__ import annotations

from ..analysis.records import Analysis
from ..core.numbers import count, plural
from ..core.plan import Plan
from ..core.verification import Verification
from . import analysis, frontier, fused, rewrite, terminal, to_html
from . import rewrite_rows as rows
from .frontier import Frontier
from .page import Page, Title
from .records import Report


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
    report = getattr(result, "report", None)
    if not isinstance(report, Report):
        return (Title(type(result).__name__),)
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
    report = getattr(result, "report", None)
    return _summary(report) if isinstance(report, Report) else ""


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
