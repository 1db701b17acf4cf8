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
from ..core.recovery import Recovery
from ..core.verification import Verification
from . import (
    analysis,
    budget_rows,
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
from .page import Facts, Line, Notes, Page, Title
from .records import Compression, Frontier, Report


def _shown(result: object) -> tuple[object, bool]:
    """A result, or the report that it has, and whether that is of what was not carried out."""
    report = getattr(result, "report", None)
    if not isinstance(report, (Report, Compression, Recovery)):
        return result, False
    return report, not hasattr(result, "model")


def page(result: object) -> Page:
    """The page of a result; that of its report where it has one."""
    shown, planned = _shown(result)
    match shown:
        case Analysis():
            return analysis.page(shown)
        case Report():
            return rewrite.page(shown, planned=planned) if shown.fusing is None else fused.page(shown)
        case Verification():
            return rewrite.verification_page(shown)
        case Plan():
            return rewrite.plan_page(shown)
        case Frontier():
            return frontier.page(shown)
        case GateResult():
            return costs.check_page(shown)
        case Difference():
            return costs.difference_page(shown)
        case Exports():
            return exported.page(shown)
        case Compression():
            return compressed.page(shown)
        case Recovery():
            facts = Facts([(name, text, "") for name, text in budget_rows.recovered(shown)])
            return (Title("Recovery", [_recovered(shown)]), Line(""), facts, Notes(getattr(result, "notes", ())))
    return (Title(_heading(shown)), Line(""), Facts(_fields(shown)))


def summary(result: object) -> str:
    """A result in one line."""
    return f"<{type(result).__name__}{_summary(*_shown(result))}>"


def _summary(shown: object, planned: bool) -> str:
    match shown:
        case Analysis(target=target, params=params, macs=macs, layers=layers, hotspots=hotspots):
            layers_ = f"{plural(len(layers), 'layer')}, {plural(len(hotspots), 'hotspot')}"
            return f" of {target}: {count(params)} params, {count(macs)} MACs, {layers_}"
        case Report(target=target):
            proof = "" if planned else f"; {_proof(shown.verification)}"
            return f" of {target}: {rows.headline(shown, planned=planned)}{proof}"
        case Verification():
            return f": {_proof(shown)}"
        case Plan(ops=ops, skips=skips):
            return f": {plural(len(ops), 'op')}, {plural(len(skips), 'skip')}"
        case Frontier(target=target, kind=kind, points=points):
            return f" of {target}: {plural(len(points), 'point')} by {kind}"
        case GateResult(target=target):
            return f" of {target}: {costs.headline(shown)}"
        case Exports(target=target):
            return f" of {target}: {exported.headline(shown)}"
        case Recovery():
            return f": {_recovered(shown)}"
        case Compression(target=target):
            return f" of {target}: {compressed.headline(shown)}"
        case Difference(before=before, after=after, layers=layers):
            return f" of {before.target} and {after.target}: {plural(len(layers), 'layer')} differ"
    return _heading(shown).removeprefix(type(shown).__name__)


def _recovered(recovery: Recovery) -> str:
    lost = f"held-out loss {recovery.before:.3g} → {recovery.after:.3g}"
    return f"{lost} in {plural(recovery.steps, 'step')}" + ("" if recovery.kept else ", kept as before")


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
    shown, planned = _shown(result)
    match shown:
        case Analysis():
            return web.analysis(shown)
        case Frontier():
            return web.frontier(shown)
        case Compression():
            return web.compression(shown)
        case Report():
            return web.report(shown, planned=planned)
    return web.document(page(shown))
