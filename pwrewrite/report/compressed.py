"""The page of a compression, to be read in ten seconds: what is saved, what it costs, the files, what is proven."""

from __future__ import annotations

from dataclasses import replace

from ..core.numbers import duration, percent, plural, size
from . import budget_rows, rewrite_rows as rows
from .page import Block, Column, Facts, Page, Section, Table, Title, notes_part
from .records import Compression
from .rewrite import saving


def page(result: Compression) -> Page:
    """The whole page."""
    return (Title(result.target, [headline(result)]), *body(result))


def headline(result: Compression) -> str:
    """What is saved and what is lost, in a sentence."""
    budget, seconds = result.budget, result.seconds
    shares = {"time": seconds["after"] / seconds["before"]}
    shares |= {name: result.after[key] / result.before[key] for key, name in _SHARES.items() if result.before[key]}
    lost = "" if budget.measured is None else f"; loss {budget.measured:.3g}"
    if budget.agreement is not None:
        lost = f"; same class for {percent(budget.agreement)} of {plural(budget.held_out, 'held-out input')}"
    return f"{', '.join(f'{name} {share:.2f}×' for name, share in shares.items())}{lost}"


_SHARES = {"macs": "MACs", "weight_bytes": "size"}


def body(result: Compression) -> Page:
    """The page without its title."""
    pairs = {"time": (result.seconds["before"], result.seconds["after"])}
    pairs |= {f"time in {name}": pair for name, pair in result.engines.items()}
    times = [(name, duration(b), duration(a), f"{100 * (a / b - 1):+.1f}%") for name, (b, a) in pairs.items()]
    proven = [f"{name}: {plural(len(proof['checks']), 'check')} passed" for name, proof in result.proofs.items()]
    same = [each.format for each in result.exports if each.loss is None]
    proven += [f"{', '.join(same)}: the same outputs in its own runtime"] if same else []
    took = [f"{name} {'as before' if s is None else duration(s)}" for name, s in result.stages.items()]
    budget = replace(result.budget, latency=None, engine="", engines={})  # what was measured in the end stands above
    facts = [*budget_rows.lines(budget), ("timed in", result.engine)]
    facts += [(each.format, each.detail) for each in result.exports if each.loss is not None]
    facts += [("verified", " · ".join(proven)), ("stages", " · ".join(took))]
    blocks: list[Block] = [Section("Before and after", silent=True), saving([*rows.totals(result), *times])]
    blocks += [Section("Budget and proof"), Facts([(*fact, "") for fact in facts])]
    if result.files:
        exports = {f"export/{name}": each for each in result.exports for name in each.files[:1]}
        own = [exports.get(name) for name in result.files]
        took_each = ["" if each is None or each.seconds is None else duration(each.seconds) for each in own]
        engines = ["" if each is None else each.engine for each in own]
        columns = [
            Column("file", list(result.files), right=False),
            Column("size", [size(nbytes) for nbytes in result.files.values()]),
        ]
        if exports:
            columns += [Column("time", took_each), Column("run by", engines, right=False, keep=1, shrink=12)]
        blocks += [Section("Files"), Table(columns)]
    return (*blocks, *notes_part(result.notes))
