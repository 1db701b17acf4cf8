"""The report as GitHub-flavoured Markdown, for an issue, a pull request or a wiki.

Whatever comes from the model stands in code spans or is escaped, so that no path turns into markup.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..analysis.records import Analysis
from ..core.numbers import count, exact, percent, size
from . import rows
from .layout import plain_text
from .rows import Selection, View
from .tree import tree


def render(analysis: Analysis, view: View) -> str:
    """The whole report."""
    selection = rows.select(analysis, view)
    blocks = [
        f"# {code(analysis.target)}",
        f"Class {code(analysis.model_class)}, input {', '.join(map(code, rows.input_texts(analysis)))}.",
        f"**{rows.totals_text(analysis)}**",
    ]
    if view.depth is not None:
        blocks += ["## Modules", _fenced(plain_text(tree(analysis, depth=view.depth, width=100), 100))]
    else:
        blocks += [
            f"## {'Hotspots' if selection.hotspots else 'Layers'}",
            sentence(rows.headline(analysis, selection)),
        ]
        if selection.reports:
            blocks.append(_hotspots(selection) if selection.hotspots else _layers(selection))
        if selection.left_out:
            blocks.append(f"… and {exact(selection.left_out)} more.")
    blocks += ["## Kinds of operation", _kinds(analysis), "## Facts", _facts(analysis)]
    return "\n\n".join(blocks) + "\n"


def _hotspots(selection: Selection) -> str:
    head = ("layer", "kernel", "channels", "output", "params", "MACs", "share", "cumulative")
    ranks = ("break-even rank (MACs)", "break-even rank (params)", "half width")
    body = [
        (
            code(rows.path_text(r)),
            rows.kernel_text(r),
            rows.channels_text(r),
            rows.output_text(r),
            count(r.layer.params),
            count(r.layer.macs),
            percent(r.share),
            percent(cumulative),
            rows.macs_ranks(r.break_even),
            rows.params_ranks(r.break_even),
            rows.saving_text(r),
        )
        for r, cumulative in zip(selection.reports, selection.cumulative, strict=True)
    ]
    return pipe_table((*head, *ranks), body, "lllrrrrrrrl")


def _layers(selection: Selection) -> str:
    head = (
        "layer",
        "kernel",
        "channels",
        "output",
        "params",
        "MACs",
        "share",
        "memory",
        "bound",
        "half width or why not",
    )
    body = [
        (
            code(rows.path_text(r)),
            rows.kernel_text(r),
            rows.channels_text(r),
            rows.output_text(r),
            count(r.layer.params),
            count(r.layer.macs),
            percent(r.share),
            size(r.activation_bytes),
            r.bound or "–",
            ": ".join(filter(None, (rows.saving_text(r), escape(rows.reason_text(r))))),
        )
        for r in selection.reports
    ]
    return pipe_table(head, body, "lllrrrrrll")


def _kinds(analysis: Analysis) -> str:
    body = [
        (
            code(total.op),
            exact(total.calls),
            count(total.params),
            count(total.macs),
            percent(rows.share_of(total.macs, analysis.macs)),
            size(total.read_bytes + total.write_bytes),
        )
        for total in rows.op_rows(analysis, None)[0]
    ]
    return pipe_table(("operation", "calls", "params", "MACs", "share", "bytes moved"), body, "lrrrrr")


def _facts(analysis: Analysis) -> str:
    facts = [
        ("Peak memory", rows.peak_text(analysis)),
        ("Critical path", rows.critical_path_text(analysis)),
        ("Roofline", rows.roofline_text(analysis)),
        ("Graph", rows.coverage_text(analysis)),
        *(("Note", note) for note in rows.notes_of(analysis)),
    ]
    return "\n".join(f"- {name}: {escape(fact)}" for name, fact in facts)


def pipe_table(head: Sequence[str], body: Sequence[Sequence[str]], sides: str) -> str:
    """A pipe table; ``sides`` has an ``l`` or an ``r`` for each column."""
    rules = [":--" if side == "l" else "--:" for side in sides]
    escaped = ([re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row] for row in body)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rules, *escaped))


def sentence(text: str) -> str:
    """A text as a sentence."""
    return f"{text[:1].upper()}{text[1:]}."


def code(text: str) -> str:
    """A code span, fenced by more backticks than the text has in a row."""
    shown = rows.plain(text)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"


def escape(text: str) -> str:
    """A text in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", text)
