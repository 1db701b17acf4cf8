"""Options that only the command has: what of a report is shown, and where things go. The others are the library's own."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from ..core.numbers import parse_count, parse_share
from ..core.options import BUDGET, PASSES, PROOF, option, path

OUT, SHOWN, CHECKS = "Output", "What is shown", "Checks"
FORMATS = ("table", "json", "markdown")


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    debug: bool = option(False, "Show warnings and tracebacks.", "--debug")


@dataclass(frozen=True)
class Listed(Common):
    """The form of what is shown."""

    form: str = option("table", "Form of the report.", "--format", panel=OUT, choices=FORMATS)


@dataclass(frozen=True)
class Reported(Listed):
    """The form of a report, and where it goes."""

    output: Path | None = option(
        None,
        "Write the report there, whole or not at all.",
        "--report",
        "--output",
        panel=OUT,
        metavar="FILE",
        read=path,
    )


@dataclass(frozen=True)
class Detailed(Reported):
    """The same, with how much of it is shown."""

    everything: bool = option(
        False, "Every layer, and for every layer that stays the reason in full.", "--all", panel=OUT
    )


@dataclass(frozen=True)
class AnalysisReported(Common):
    """The form of an analysis, and where it goes."""

    form: str = option("table", "Form of the report.", "--format", panel=OUT, choices=(*FORMATS, "csv"))
    output: Path | None = option(
        None,
        "Write the report there, whole or not at all.",
        "--report",
        "--output",
        "--out",
        panel=OUT,
        metavar="FILE",
        read=path,
    )


@dataclass(frozen=True)
class AnalysisShown:
    """What is shown of an analysis."""

    top: int | None = option(
        None, r"At most N layers. [dim]\[default: 15 hotspots][/]", "--top", panel=SHOWN, metavar="N", least=0
    )
    sort: str = option(
        "macs",
        "Order of the layers.",
        "--sort",
        panel=SHOWN,
        choices=("macs", "params", "memory", "name", "order"),
    )
    everything: bool = option(
        False, "All layers, 1×1 and linear ones too, each with the reason why it stays.", "--all", panel=SHOWN
    )
    tree: bool = option(
        False, "The module hierarchy with cumulative cost in place of the layers.", "--tree", panel=SHOWN
    )
    depth: int | None = option(
        None,
        r"Levels of the tree; implies --tree. [dim]\[default: 2][/]",
        "--depth",
        panel=SHOWN,
        metavar="N",
        least=0,
    )
    hotspot_share: float = option(
        0.01,
        r"Part of the MACs that makes a k×k layer a hotspot: 1% or 0.01. [dim]\[default: 1%][/]",
        "--hotspot-share",
        panel=SHOWN,
        metavar="SHARE",
        read=parse_share,
    )
    device: str = option(
        "cpu",
        "Device profile for the roofline: cpu, server-cpu, t4, v100, a100, h100, jetson-orin.",
        "--device",
        panel=SHOWN,
        metavar="PROFILE",
    )
    convention: str | None = option(
        None,
        "The total as that tool would count it, to the last digit.",
        "--as",
        panel=SHOWN,
        choices=("torch", "fvcore", "thop", "ptflops", "torchinfo"),
    )
    explain_count: bool = option(
        False, "What each of these tools would say, and what makes the difference.", "--explain-count", panel=SHOWN
    )


@dataclass(frozen=True)
class Limits:
    """What an analysed model may cost."""

    max_params: int | None = option(
        None,
        "Fail if the model has more parameters (25M).",
        "--max-params",
        panel=CHECKS,
        metavar="N",
        read=parse_count,
    )
    max_macs: int | None = option(
        None, "Fail if the model has more MACs (4.1G).", "--max-macs", panel=CHECKS, metavar="N", read=parse_count
    )
    strict: bool = option(False, "Fail if an operation has no cost formula.", "--strict", panel=CHECKS)


@dataclass(frozen=True)
class Saved:
    """Where a model is saved."""

    out: Path | None = option(
        None,
        "Save there: weights, plan, report, README; whole or not at all. Without it nothing is saved.",
        "--out",
        panel=OUT,
        metavar="DIR",
        read=path,
    )
    force: bool = option(False, "Replace a folder that an earlier run saved.", "--force", panel=OUT)
    save_unverified: bool = option(
        False, "Save also what is not verified or failed; the README says so.", "--save-unverified", panel=PROOF
    )


@dataclass(frozen=True)
class Carried:
    """What only `rewrite` does with a plan."""

    plan: Path | None = option(
        None,
        "Instead of passes: carry out what `pwrewrite plan` wrote.",
        "--plan",
        panel=PASSES,
        metavar="FILE",
        read=path,
    )
    dry_run: bool = option(False, "Show the plan and do nothing else.", "--dry-run", panel=OUT)


@dataclass(frozen=True)
class Planned:
    """What only `plan` does."""

    pareto: bool = option(
        False,
        "Show the least loss at every budget of MACs instead, within the --budget of other kinds; "
        "--report takes .csv, .svg, .json, .md.",
        "--pareto",
        panel=BUDGET,
    )
    out: Path | None = option(
        None,
        "Write the plan there, whole or not at all, for rewrite --plan.",
        "--out",
        panel=OUT,
        metavar="FILE",
        read=path,
    )


@dataclass(frozen=True)
class Other:
    """The second model of a comparison."""

    other: str = option(
        MISSING, "The other: a target, or a folder; of a folder, the first is taken for the original."
    )
