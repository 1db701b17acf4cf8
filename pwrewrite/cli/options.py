"""Options that only the command has: what of a report is shown, and where things go."""
# ruff: noqa: RUF009 (`option` makes a dataclass field)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..core.declaring import option, path
from ..core.errors import UsageError
from ..core.numbers import parse_share
from ..core.options import BUDGET, PASSES, PROOF, engine_option

_of_output, _of_view = partial(option, panel="Output"), partial(option, panel="What is shown")

FORMATS = ("table", "json", "markdown", "html")
_ENDINGS = {".json": "json", ".md": "markdown", ".html": "html"}
"""The forms that the name of a file asks for."""
_OTHERS = frozenset(
    f".{name}"
    for name in (
        *("csv", "svg", "xml", "pdf", "png", "jpg", "jpeg", "gif", "webp", "ps", "eps", "yaml", "yml", "toml", "htm"),
        *("markdown", "rst", "tex", "tsv", "xls", "xlsx", "ods", "doc", "docx", "odt", "jsonl", "parquet"),
    )
)
"""Endings of forms that a report may not have; in a file of any other name it is a table in plain text."""
TOOLS = ("torch", "fvcore", "thop", "ptflops", "torchinfo")


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    verbose: bool = option(False, "Show every step, and what the library logs.", "--verbose", "-v")
    quiet: bool = option(False, "Show errors and the report only.", "--quiet", "-q")
    debug: bool = option(False, "Show warnings and tracebacks.", "--debug")


def _form(more: str, choices: tuple[str, ...]) -> Any:
    default = f"as the name of --report ends (.json, .md, .html{more}), else table"
    return _of_output(None, rf"Form of the report. [dim]\[default: {default}][/]", "--format", choices=choices)


@dataclass(frozen=True)
class Listed(Common):
    """The form of what is shown."""

    wanted: str | None = _of_output(None, r"Form of the report. [dim]\[default: table][/]", "--format", choices=FORMATS)

    @property
    def form(self) -> str:
        """The form of what is shown: the one that was asked for, or else a table."""
        return self.wanted or "table"


@dataclass(frozen=True)
class Reported(Listed):
    """The form of a report, and where it goes."""

    endings: ClassVar[Mapping[str, str]] = _ENDINGS
    wanted: str | None = _form("", FORMATS)
    output: Path | None = _of_output(
        None, "Write the report there, whole or not at all.", "--report", "--output FILE", read=path
    )

    @property
    def form(self) -> str:
        """The form of the report: the one that was asked for, or that the file's name asks for, or else a table."""
        ending = self.output.suffix.lower() if self.output is not None else ""
        return self.wanted or self.endings.get(ending, "table")

    def check_ending(self, *more: str) -> None:
        """Raises `UsageError` where the file's name asks for a form that there is not; ``more`` are further endings."""
        ending = self.output.suffix.lower() if self.output is not None and self.wanted is None else ""
        known = (*self.endings, *more)
        if ending in _OTHERS and ending not in known:
            raise UsageError(
                f"no report of this kind is written as {ending}",
                where=str(self.output),
                expected=f"a name that ends in {', '.join(known)}, or .txt for the table",
                hint="--format says the form whatever the name",
            )


@dataclass(frozen=True)
class Detailed(Reported):
    """The same, with how much of it is shown."""

    everything: bool = _of_output(False, "Every layer, and for every layer that stays the reason in full.", "--all")


@dataclass(frozen=True)
class AnalysisReported(Reported):
    """The form of an analysis, and where it goes."""

    endings = {**_ENDINGS, ".csv": "csv"}
    wanted: str | None = _form(", .csv", (*FORMATS, "csv"))
    output: Path | None = _of_output(
        None, "Write the report there, whole or not at all.", "--report", "--output", "--out FILE", read=path
    )


@dataclass(frozen=True)
class CheckReported(Reported):
    """The form of a gate, and where it goes."""

    endings = {**_ENDINGS, ".xml": "junit"}
    wanted: str | None = _form(", .xml for junit", (*FORMATS, "github", "junit"))


@dataclass(frozen=True)
class AnalysisShown:
    """What is shown of an analysis."""

    top: int | None = _of_view(None, r"At most N layers. [dim]\[default: 15 hotspots][/]", "--top N", least=0)
    sort: str = _of_view(
        "macs", "Order of the layers.", "--sort", choices=("macs", "params", "memory", "name", "order")
    )
    everything: bool = _of_view(
        False, "All layers, 1×1 and linear ones too, each with the reason why it stays.", "--all"
    )
    tree: bool = _of_view(False, "The module hierarchy with cumulative cost in place of the layers.", "--tree")
    depth: int | None = _of_view(
        None, r"Levels of the tree; implies --tree. [dim]\[default: 2][/]", "--depth N", least=0
    )
    receptive_field: bool = _of_view(
        False, "A column with what a position of each layer's output sees of the input.", "--receptive-field"
    )
    hotspot_share: float = _of_view(
        0.01,
        r"Part of the MACs that makes a k×k layer a hotspot: 1% or 0.01. [dim]\[default: 1%][/]",
        "--hotspot-share SHARE",
        read=parse_share,
    )
    device: str = _of_view(
        "cpu",
        "Device for the roofline: cpu, server-cpu, t4, v100, a100, h100, jetson-orin, or its peak FLOP/s and bytes/s: "
        "82.6T,1008G.",
        "--device PROFILE",
    )
    convention: str | None = _of_view(
        None, "The total as that tool would count it, to the last digit.", "--as", choices=TOOLS
    )
    explain_count: bool = _of_view(
        False, "What each of these tools would say, and what makes the difference.", "--explain-count"
    )


@dataclass(frozen=True)
class Saved:
    """Where a model is saved."""

    out: Path | None = _of_output(
        None,
        "Save there: weights, plan, report, README; whole or not at all. Without it nothing is saved.",
        "--out DIR",
        read=path,
    )
    force: bool = _of_output(False, "Replace a folder that an earlier run saved.", "--force")
    save_unverified: bool = option(
        False, "Save also what is not verified or failed; the README says so.", "--save-unverified", panel=PROOF
    )


@dataclass(frozen=True)
class FuseOptions:
    """What is fused, and whether it is measured."""

    passes: tuple[str, ...] = option(
        (),
        "Pass to run; repeatable, in order: remove-inference-noise, canonicalize-activations, fold-batch-norm, "
        r"merge-branches, merge-pointwise, fuse-activation, channels-last. [dim]\[default: all of them][/]",
        "--pass",
        "--passes NAME",
        panel=PASSES,
        split=True,
    )
    keep_nan: bool = option(
        False,
        "Keep NaN behind ReLU-like activations also where that costs more than 2% of the time.",
        "--keep-nan",
        panel=PASSES,
    )
    benchmark: bool = option(
        False, "Measure the latency before, after, and frozen (pwrewrite.freeze).", "--benchmark", panel=PROOF
    )
    engine: str | None = engine_option(panel=PROOF)


@dataclass(frozen=True)
class Carried:
    """What only `rewrite` does with a plan."""

    plan: Path | None = option(
        None, "Instead of passes: carry out what `pwrewrite plan` wrote.", "--plan FILE", panel=PASSES, read=path
    )
    dry_run: bool = _of_output(False, "Show the plan and do nothing else.", "--dry-run")


@dataclass(frozen=True)
class Planned:
    """What only `plan` does."""

    pareto: bool = option(
        False,
        "Show the least loss at every budget of MACs instead, within the --budget of other kinds; "
        "--report takes .csv, .svg, .json, .md, .html.",
        "--pareto",
        panel=BUDGET,
    )
    out: Path | None = _of_output(
        None, "Write the plan there, whole or not at all, for rewrite --plan.", "--out FILE", read=path
    )


@dataclass(frozen=True)
class Other:
    """The second model of a comparison."""

    other: str = option(MISSING, "The second model; where it is a saved folder, the first one serves as its original.")
