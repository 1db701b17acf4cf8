"""The report of fusing: what it saves, the proof, what was fused, what was left and why; in three forms."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Group, RenderableType
from rich.text import Text

from ..core.numbers import exact, plural, size
from ..core.plan import Edit
from . import rewrite_rows as rows
from .layout import Column, fit, shorten
from .markdown import code, escape, pipe_table, sentence
from .records import Report
from .rewrite import checks
from .rows import plain
from .table import WIDTH

_SHOWN = 5
_WORDS = {"fold": "batch norm folded", "remove": "module without effect removed", "channels-last": "channels_last"}


class Measured(Protocol):
    """What a report of fusing is made from: the result of `pwrewrite.workflows.fuse_by_target.fuse_target`."""

    @property
    def report(self) -> Report:
        """What changed, and the proof."""

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What was done."""

    @property
    def before(self) -> Mapping[str, int]:
        """Nodes, kernels and bytes moved, before."""

    @property
    def after(self) -> Mapping[str, int]:
        """The same, after."""

    @property
    def seconds_before(self) -> float | None:
        """Median seconds of one run before; None where not measured."""

    @property
    def seconds_after(self) -> float | None:
        """The same after."""

    @property
    def seconds_frozen(self) -> float | None:
        """The same frozen."""

    @property
    def not_frozen(self) -> str:
        """Why it was not frozen, where that was tried."""


def page(result: Measured, *, width: int = WIDTH, everything: bool = False) -> RenderableType:
    """The report for a terminal.

    Args:
        result: What `pwrewrite.workflows.fuse_by_target.fuse_target` returned.
        width: Terminal cells there are.
        everything: Whether to name every layer.
    """
    report = result.report
    head = Text(shorten(plain(report.target), width), style="bold").append("\n")
    saving = _saving(result)
    table = fit(
        [
            Column("", [line[0] for line in saving], right=False, style="bold"),
            Column("before", [line[1] for line in saving]),
            Column("after", [line[2] for line in saving]),
            Column("change", [line[3] for line in saving]),
        ],
        width,
    )
    verdict, good = rows.verdict(report)
    parts: list[RenderableType] = [head.append(_headline(result), style="not bold"), Text(), table]
    parts.append(_section("Proof", verdict, "green" if good else "bold red"))
    if report.verification is not None:
        parts.append(checks(report.verification))
    parts += [_section("Fused", ""), _lines(_done(result.edits, everything), width)]
    if report.skips:
        parts.append(_section("Left as they are", plural(len(report.skips), "place")))
        parts.append(_lines(_left(result, everything), width))
    for note in _notes(result):
        parts.append(Text(f"note: {note}"))
    return Group(*parts)


def markdown(result: Measured, *, everything: bool = False) -> str:
    """The report as GitHub-flavoured Markdown."""
    report = result.report
    verdict, _ = rows.verdict(report)
    blocks = [f"# {code(report.target)}", sentence(_headline(result))]
    blocks.append(pipe_table(("", "before", "after", "change"), _saving(result), "lrrr"))
    blocks += ["## Proof", sentence(verdict)]
    if report.verification is not None:
        lines = rows.check_lines(report.verification)
        blocks.append(
            "\n".join(f"- {'✓' if ok else '✗'} {escape(name)}: {escape(detail)}" for ok, name, detail in lines)
        )
    for title, found in (("Fused", _done(result.edits, everything)), ("Left as they are", _left(result, everything))):
        if found:
            cells = [(number, escape(what), escape(where)) for number, what, where in found]
            blocks += [f"## {title}", pipe_table(("", "what", "where"), cells, "rll")]
    if _notes(result):
        blocks.append("\n".join(f"- {escape(note)}" for note in _notes(result)))
    return "\n\n".join(blocks) + "\n"


def _notes(result: Measured) -> list[str]:
    found = list(rows.notes(result.report))
    if result.not_frozen:
        found.append(f"not measured frozen (pwrewrite.freeze): {result.not_frozen}")
    return found


def to_json(result: Measured) -> str:
    """The report as JSON: that of a rewrite, with ``fusing`` beside it."""
    data: dict[str, Any] = result.report.to_dict()
    data["fusing"] = {
        "before": dict(result.before),
        "after": dict(result.after),
        "done": dict(Counter(edit.method for edit in result.edits)),
        "left": dict(Counter(str(skip.reason) for skip in result.report.skips)),
        "seconds_before": result.seconds_before,
        "seconds_after": result.seconds_after,
        "seconds_frozen": result.seconds_frozen,
        "not_frozen": result.not_frozen,
    }
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _section(title: str, note: str, style: str = "") -> Text:
    return Text("\n").append(title, style="bold").append(f"  {note}" if note else "", style=style)


def _headline(result: Measured) -> str:
    done = Counter(edit.op.action for edit in result.edits)
    parts = [f"{plural(done['fold'], 'norm')} folded", f"{plural(done['fuse'], 'layer')} fused"]
    if done["merge"]:
        parts.append(f"{plural(done['merge'], 'pair')} merged")
    if done["channels-last"]:
        parts.append("channels_last")
    return ", ".join(parts)


def _saving(result: Measured) -> list[tuple[str, str, str, str]]:
    report = result.report
    found: list[tuple[str, str, str, str]] = []
    for name, seconds in (("latency", result.seconds_after), ("latency, frozen", result.seconds_frozen)):
        if result.seconds_before is not None and seconds is not None:
            before, after = f"{result.seconds_before * 1e3:.1f} ms", f"{seconds * 1e3:.1f} ms"
            found.append((name, before, after, f"{result.seconds_before / seconds:.2f}× as fast"))
    for key, name in (("kernels", "kernels"), ("nodes", "nodes"), ("bytes_moved", "bytes moved")):
        first, then = result.before[key], result.after[key]
        shown = size if key == "bytes_moved" else exact
        found.append((name, shown(first), shown(then), rows.change(first, then)))
    for key, name in (("params", "parameters"), ("macs", "MACs")):
        first, then = report.before[key], report.after[key]
        found.append((name, exact(first), exact(then), rows.change(first, then)))
    return found


def _done(edits: Sequence[Edit], everything: bool) -> list[tuple[str, str, str]]:
    """How many, what, where."""
    groups: dict[str, list[str]] = {}
    for edit in edits:
        what = _WORDS.get(edit.method, edit.method)
        if edit.op.action == "fuse":
            what = f"{edit.method.replace('add+', 'addition and ').replace('none', 'nothing')} fused"
        groups.setdefault(what, []).append(edit.path or "(the model)")
    return [(str(len(paths)), what, _paths(paths, everything)) for what, paths in groups.items()]


def _left(result: Measured, everything: bool) -> list[tuple[str, str, str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for skip in result.report.skips:
        groups.setdefault((str(skip.reason), plain(skip.detail)), []).append(skip.path or "(the model)")
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [(str(len(paths)), f"{reason}: {detail}", _paths(paths, everything)) for (reason, detail), paths in ordered]


def _paths(paths: Sequence[str], everything: bool) -> str:
    shown = paths if everything else paths[:_SHOWN]
    more = len(paths) - len(shown)
    return ", ".join(plain(path) for path in shown) + (f" and {more} more" if more else "")


def _lines(found: Sequence[tuple[str, str, str]], width: int) -> RenderableType:
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="cyan")
    for number, what, where in found:
        table.add_row(Text(number), Text(what), Text(where))
    return table
