"""The report of fusing: what it saves, the proof, what was fused, what was left and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..core.numbers import exact, plural, size
from ..core.plan import Edit
from . import rewrite_rows as rows
from .page import Block, Column, Line, Listing, Page, Section, Table, Title, notes_part
from .records import FusingReport, Report
from .rewrite import saving, verdicts

_SHOWN = 5
_WORDS = {
    "fold": "batch norm folded",
    "branches": "branches and their sum merged",
    "scale": "scale in code folded",
    "remove": "module without effect removed",
    "canonicalize": "activation written out, now torch's own",
    "channels-last": "channels_last",
    "reshape": "view made a reshape, which takes channels_last",
}


def page(report: Report, *, everything: bool = False) -> Page:
    """The whole report of a model that was fused; with ``everything`` it names every layer."""
    fusing = report.fusing
    assert fusing is not None
    blocks: list[Block] = [Title(report.target, [_headline(report)]), Line(""), _saving(report, fusing)]
    blocks += verdicts(report.verification)
    if report.edits:
        blocks += [Section("Fused"), _done_listing(_done(report), everything)]
    if report.skips:
        blocks.append(Section("Left as they are", plural(len(report.skips), "place")))
        blocks.append(_left_listing(report, everything))
    notes = rows.notes(report)
    if fusing.engine:
        notes.append(f"the latency is that in {fusing.engine}")
    if fusing.not_frozen:
        notes.append(f"not measured frozen (pwrewrite.freeze): {fusing.not_frozen}")
    return (*blocks, *notes_part(notes))


def _headline(report: Report) -> str:
    done = Counter(row.edit.op.action for row in report.edits)
    baked = sum(_bakes(row.edit) for row in report.edits)
    padded = sum(_pads(row.edit) for row in report.edits)
    parts = [f"{plural(done['fold'] - baked - padded, 'norm')} folded", f"{plural(done['fuse'], 'layer')} fused"]
    if padded:
        parts.append(f"{plural(padded, 'layer')} made plain")
    if baked:
        parts.append(f"{plural(baked, 'weight')} baked")
    if done["merge"]:
        parts.append(f"{plural(done['merge'], 'pair')} merged")
    merged = Counter(row.edit.method for row in report.edits if row.edit.op.action == "merge-branches")
    if merged["branches"]:
        parts.append(f"{plural(merged['branches'], 'sum')} of branches merged")
    if merged["scale"]:
        parts.append(f"{plural(merged['scale'], 'scale')} folded")
    if done["channels-last"]:
        parts.append("channels_last")
    return ", ".join(parts) + rows.and_outputs(report.verification)


def _saving(report: Report, fusing: FusingReport) -> Table:
    times = [("latency", fusing.seconds_before, fusing.seconds_after)]
    times += [("latency, frozen", fusing.seconds_before, fusing.seconds_frozen)]
    times += [(f"latency in {name}", before, after) for name, (before, after) in fusing.engines.items()]
    lines = [
        (name, f"{first * 1e3:.1f} ms", f"{then * 1e3:.1f} ms", f"{first / then:.2f}× as fast")
        for name, first, then in times
        if first is not None and then is not None
    ]
    totals = [("kernels", "kernels", exact), ("nodes", "nodes", exact), ("bytes_moved", "bytes moved", size)]
    counted = [(name, fusing.before[key], fusing.after[key], shown) for key, name, shown in totals]
    counted += [(n, report.before[k], report.after[k], exact) for k, n in (("params", "parameters"), ("macs", "MACs"))]
    lines += [(name, text(first), text(then), rows.change(first, then)) for name, first, then, text in counted]
    return saving(lines)


def _bakes(edit: Edit) -> bool:
    """Whether an edit folds what a layer's own code makes of its weight, and no norm."""
    return edit.op.action == "fold" and edit.op.settings.get("side") == "weight" and not _pads(edit)


def _pads(edit: Edit) -> bool:
    """Whether an edit makes a plain layer of one whose own code pads."""
    return edit.op.action == "fold" and bool(edit.op.settings.get("pads"))


Groups = dict[str, list[str]]
"""What was done, and the paths of it."""


def _done(report: Report) -> Groups:
    groups: Groups = {}
    for edit in (row.edit for row in report.edits):
        what = _WORDS.get(edit.method, edit.method)
        if _pads(edit):
            what = "layer whose own code only pads made plain"
        elif _bakes(edit):
            what = "weight baked that the layer's code computed"
        elif edit.op.action == "fuse":
            what = f"{edit.method.replace('add+', 'addition and ').replace('none', 'nothing')} fused"
        groups.setdefault(what, []).append(edit.path)
    return groups


def _left_listing(report: Report, everything: bool) -> Listing:
    groups: dict[tuple[str, str], list[str]] = {}
    for skip in report.skips:
        groups.setdefault((skip.reason, skip.detail), []).append(skip.path)
    groups = dict(sorted(groups.items(), key=lambda item: -len(item[1])))
    return Listing(
        [
            Column("places", [exact(len(paths)) for paths in groups.values()]),
            Column("reason", [reason for reason, _ in groups], right=False, style="yellow"),
            _where(groups.values(), everything),
            Column("why", [detail for _, detail in groups], right=False, joined=True),
        ]
    )


def _done_listing(groups: Groups, everything: bool) -> Listing:
    return Listing(
        [
            Column("places", [exact(len(paths)) for paths in groups.values()]),
            Column("what", list(groups), right=False),
            _where(groups.values(), everything),
        ]
    )


def _where(groups: Iterable[list[str]], everything: bool) -> Column:
    named = [rows.few(paths, len(paths) if everything else _SHOWN) for paths in groups]
    return Column("where", named, right=False, style="cyan")
