"""The pages of gates and of differences, and a gate as GitHub's annotations and as JUnit XML."""

from __future__ import annotations

from xml.etree import ElementTree

from ..analysis.costs import BYTES, KINDS, NAMES, Difference, LayerDifference
from ..analysis.gates import Finding, GateResult
from ..core.errors import GateError
from ..core.numbers import count, exact, plural, size
from ..core.text import plain
from . import rewrite_rows as rows
from .page import Block, Column, Facts, Line, Page, Section, Table, Title, notes_part

_SIGNS = {"added": "+", "removed": "-", "changed": "~"}
_MARKS = {"passed": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red")}


def amount(kind: str, value: int) -> str:
    """A cost as people read it."""
    return size(value) if kind in BYTES else count(value)


def signed(kind: str, value: int) -> str:
    """A growth as people read it."""
    return ("+" if value > 0 else "") + amount(kind, value)


def check_page(check: GateResult) -> Page:
    """A gate: each limit with what the model costs, and the layers to blame where it is exceeded or nearly so."""
    shown = check.findings
    marks, styles = zip(*(_MARKS[finding.severity] for finding in shown))
    blocks: list[Block] = [
        Title(check.target, [headline(check)]),
        Table(
            [
                Column("", marks, right=False, styles=styles),
                Column("limit", [finding.name for finding in shown], right=False),
                Column("model", [_distinct(f)[0] for f in shown]),
                Column("at most", [_distinct(f)[1] for f in shown]),
                Column("used", [_used(f) for f in shown], keep=2),
                Column("baseline", ["–" if f.baseline is None else amount(f.kind, f.baseline) for f in shown], keep=3),
            ]
        ),
    ]
    for finding in shown:
        if finding.layers:
            note = "what costs most" if finding.baseline is None else "what grew most against the baseline"
            blocks.append(Section(finding.name[:1].upper() + finding.name[1:], note))
            sign = amount if finding.baseline is None else signed
            blocks.append(Facts([(path or rows.ROOT, sign(finding.kind, n), "") for path, n in finding.layers]))
    if check.difference is not None:
        blocks += difference_page(check.difference)[1:]
    return (*blocks, *notes_part(check.notes))


def _distinct(finding: Finding) -> tuple[str, str]:
    """What the model costs and what it may, with all their digits where rounding hides which is more."""
    value, limit = (amount(finding.kind, n) for n in (finding.value, finding.limit))
    if finding.value <= finding.limit or value != limit:
        return value, limit
    unit = " B" if finding.kind in BYTES else ""
    return f"{exact(finding.value)}{unit}", f"{exact(finding.limit)}{unit}"


def _used(finding: Finding) -> str:
    if not finding.limit:
        return "–"
    text = f"{100 * finding.value / finding.limit:.1f}%"
    return f">{text}" if text == "100.0%" and finding.value > finding.limit else text


def headline(check: GateResult) -> str:
    """The verdict in a sentence."""
    failed, warned = check.of("failed"), check.of("warning")
    if failed:
        return f"{len(failed)} of {plural(len(check.findings), 'limit')} exceeded: {', '.join(f.name for f in failed)}"
    near = f"; nearly: {', '.join(f.name for f in warned)}" if warned else ""
    return f"within {'its limit' if len(check.findings) == 1 else f'all {len(check.findings)} limits'}{near}"


def sentence(finding: Finding) -> str:
    """A finding in a sentence: ``MACs: 4,089,184,256, at most 4,000,000,000; most: layer1.0.conv2 (116 M)``."""
    text = f"{finding.name}: {exact(finding.value)}, at most {exact(finding.limit)}"
    if finding.baseline is not None:
        text += f", {exact(finding.baseline)} in the baseline"
    sign = amount if finding.baseline is None else signed
    layers = ", ".join(f"{path or rows.ROOT} ({sign(finding.kind, n)})" for path, n in finding.layers)
    return f"{text}; {'most' if finding.baseline is None else 'grown'}: {layers}" if layers else text


def hold(check: GateResult) -> None:
    """Raises `GateError` where a limit is exceeded: what the model costs, and what costs most."""
    if failed := check.of("failed"):
        unpriced = any(finding.kind == "unpriced" for finding in failed)
        hint = "pwrewrite.register_formula gives an operation its cost" if unpriced else None
        raise GateError(f"{check.target}: {headline(check)}", got="; ".join(map(sentence, failed)), hint=hint)


def difference_page(difference: Difference) -> Page:
    """Two models side by side: totals, then every layer that is not the same in both."""
    before, after = difference.before, difference.after
    names = [NAMES[kind] for kind in KINDS]
    pairs = [(kind, int(getattr(before, kind)), int(getattr(after, kind))) for kind in KINDS]
    totals = Table(
        [
            Column("", names, right=False),
            Column("before", [amount(kind, old) for kind, old, _ in pairs]),
            Column("after", [amount(kind, new) for kind, _, new in pairs]),
            rows.change_column([rows.change(old, new) for _, old, new in pairs]),
        ]
    )
    head = Title(f"{before.target} → {after.target}", [_summary(difference)])
    blocks: list[Block] = [head, Section("Costs", silent=True), totals]
    if difference.layers:
        blocks += [Section("Layers that differ", plural(len(difference.layers), "layer")), _layers(difference.layers)]
    if before.inputs != after.inputs:
        blocks.append(Line(f"inputs: {', '.join(before.inputs)} before, {', '.join(after.inputs)} after", "yellow"))
    return tuple(blocks)


def _summary(difference: Difference) -> str:
    kinds = [layer.change for layer in difference.layers]
    parts = [f"{kinds.count(change)} {change}" for change in ("added", "removed", "changed") if change in kinds]
    return ", ".join([*parts, f"{plural(difference.same, 'layer')} the same"])


def _layers(layers: tuple[LayerDifference, ...]) -> Table:
    whats = [
        layer.after.what if layer.change == "added" or layer.before.what == layer.after.what
        else layer.before.what if layer.change == "removed"
        else f"{layer.before.what} → {layer.after.what}"
        for layer in layers
    ]  # fmt: skip
    macs, params = ([(getattr(x.before, kind), getattr(x.after, kind)) for x in layers] for kind in ("macs", "params"))
    return Table(
        [
            Column("", [_SIGNS[layer.change] for layer in layers], right=False),
            rows.layer_column(layer.path for layer in layers),
            Column("what", whats, right=False, shrink=16, keep=2),
            Column("params", [f"{count(old)} → {count(new)}" for old, new in params], keep=3),
            Column("MACs", [f"{count(old)} → {count(new)}" for old, new in macs]),
            rows.change_column([rows.change(*pair) for pair in macs]),
        ]
    )


def github(check: GateResult, file: str | None = None) -> str:
    """A gate as workflow commands that point to a file: an error or a warning for each limit exceeded or nearly so."""
    commands = {"failed": "error", "warning": "warning", "passed": "notice"}
    place = f"file={_escaped(file, ':,')}," if file else ""
    titles = [_escaped(f"{check.target}: {finding.name}", ":,") for finding in check.findings]
    return "".join(
        f"::{commands[finding.severity]} {place}title={title}::{_escaped(sentence(finding))}\n"
        for finding, title in zip(check.findings, titles)
    )


def _escaped(text: str, more: str = "") -> str:
    """Text in a workflow command: what would end it is spelt in percent signs."""
    text = plain(text)
    for character in ("%", "\r", "\n", *more):
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def junit(check: GateResult) -> str:
    """A gate as JUnit XML, a test case for each limit."""
    count_ = {"tests": str(len(check.findings)), "failures": str(len(check.of("failed")))}
    suite = ElementTree.Element("testsuite", {"name": "pwrewrite check", **count_, "errors": "0", "skipped": "0"})
    for finding in check.findings:
        case = ElementTree.SubElement(suite, "testcase", {"classname": plain(check.target), "name": finding.name})
        if finding.severity == "failed":
            ElementTree.SubElement(case, "failure", {"message": plain(sentence(finding))})
        else:
            ElementTree.SubElement(case, "system-out").text = plain(sentence(finding))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"
