"""Results as they print: ``print(result)`` is what the command shows, a notebook's cell the same as HTML.

A result's ``repr`` is a line that says what it is; its fields are there to be read one by one.
"""

from __future__ import annotations

from functools import singledispatch

from ..analysis.records import Analysis
from ..core.numbers import count, plural
from ..core.plan import Plan
from ..core.verification import Verification
from . import analysis, frontier, fused, rewrite, terminal
from . import rewrite_rows as rows
from .frontier import Frontier
from .page import Page, Title
from .records import Report
from .to_html import html as html_of


@singledispatch
def page(result: object) -> Page:
    """The page of a result; that of its report where it has one."""
    report = getattr(result, "report", None)
    if not isinstance(report, Report):
        return (Title(type(result).__name__),)
    return page(report) if hasattr(result, "model") else rewrite.page(report, planned=True)


@page.register
def _(result: Analysis) -> Page:
    return analysis.page(result)


@page.register
def _(result: Report) -> Page:
    return rewrite.page(result) if result.fusing is None else fused.page(result)


@page.register
def _(result: Verification) -> Page:
    return rewrite.verification_page(result)


@page.register
def _(result: Plan) -> Page:
    return rewrite.plan_page(result)


@page.register
def _(result: Frontier) -> Page:
    return frontier.page(result)


@singledispatch
def summary(result: object) -> str:
    """A result in one line."""
    report = getattr(result, "report", None)
    return f"<{type(result).__name__}{f': {summary(report)[1:-1]}' if isinstance(report, Report) else ''}>"


@summary.register
def _(result: Analysis) -> str:
    hot = plural(len(result.hotspots), "hotspot")
    return (
        f"<Analysis of {result.target}: {count(result.params)} params, {count(result.macs)} MACs, "
        f"{plural(len(result.layers), 'layer')}, {hot}>"
    )


@summary.register
def _(result: Report) -> str:
    return f"<Report of {result.target}: {rows.headline(result)}; {rows.verdict(result)[0]}>"


@summary.register
def _(result: Verification) -> str:
    return f"<Verification: {rows.proof_text(result)}>"


@summary.register
def _(result: Plan) -> str:
    return f"<Plan: {plural(len(result.ops), 'op')}, {plural(len(result.skips), 'skip')}>"


@summary.register
def _(result: Frontier) -> str:
    return f"<Frontier of {result.target}: {plural(len(result.points), 'point')} by {result.kind}>"


def text(result: object) -> str:
    """The report as the command prints it, without line breaks around it."""
    return terminal.text(page(result)).strip("\n")


def html(result: object) -> str:
    """The report as an HTML fragment."""
    return html_of(page(result))
