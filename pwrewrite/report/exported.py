"""The page of an export: each format with what was compared, its size and its time beside the model's."""

from __future__ import annotations

from ..core.exports import Exports
from ..core.numbers import duration, plural, size
from .page import Block, Column, Facts, Line, Page, Section, Table, Title, notes_part


def page(exports: Exports) -> Page:
    """The whole page."""
    rows = exports.formats
    marks = ["", *("✗" if not row.passed else "✓" if row.files else "–" for row in rows)]
    styles = ["", *("green" if row.passed else "red" for row in rows)]
    times = [exports.seconds, *(row.seconds for row in rows)]
    errors = ["", *("–" if row.error is None else f"{row.error:.1e}" for row in rows)]
    blocks: list[Block] = [
        Title(exports.target, [headline(exports)]),
        Table(
            [
                Column("", marks, right=False, styles=styles),
                Column("format", ["model", *(row.format for row in rows)], right=False),
                Column("size", [size(n) if n else "–" for n in (exports.bytes, *(row.bytes for row in rows))]),
                Column("time", ["–" if s is None else duration(s) for s in times]),
                Column("error", errors, keep=2),
                Column("run by", ["torch", *(row.engine for row in rows)], right=False, keep=1, shrink=12),
            ]
        ),
    ]
    if quantized := [(row.format, row.detail, "") for row in rows if row.passed and row.layers]:
        blocks += [Section("int8", "against float32 in the same runtime"), Facts(quantized)]
    for row in (row for row in rows if not row.passed):
        place = [("first at", row.differs_at, "")] if row.differs_at else []
        blocks += [Section(row.format, "nothing is left of it"), Facts([("differs", row.detail, ""), *place])]
    named = [*exports.inputs.items(), *(("→ " + name, form) for name, form in exports.outputs.items())]
    blocks += [Section("Inputs and outputs"), Facts([(name, form, "") for name, form in named]), Line("")]
    return (*blocks[:-1], *notes_part(exports.notes))


def headline(exports: Exports) -> str:
    """The verdict in a sentence."""
    failed = [row.format for row in exports.formats if not row.passed]
    if failed:
        return f"{', '.join(failed)} of {plural(len(exports.formats), 'format')} differ from the model"
    exact = [row.format for row in exports.formats if not row.layers]
    static = all(row.detail.startswith("agrees at other values") for row in exports.formats)
    where = "for two inputs of its one size" if static else "at two sizes"
    return f"{', '.join(exact)}: every output agrees {where}, in its own runtime"
