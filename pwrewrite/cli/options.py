"""Options that several commands share: how a target is opened, what is asked of the passes, where reports go."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..targets import TargetOptions
    from ..workflows.choices import Choices

MODEL, PASSES, PROOF, OUT = "Model and inputs", "What is rewritten", "Proof", "Output"


class Format(StrEnum):
    """The formats of ``--format``."""

    TABLE = "table"
    JSON = "json"
    MARKDOWN = "markdown"


class Init(StrEnum):
    """The values of ``--init``."""

    WEIGHTS = "weights"
    FRESH = "fresh"


Target = Annotated[
    str,
    typer.Argument(
        help="[bold]model.py[/], [bold]model.py:NAME[/], [bold]package.module:NAME[/], [bold]torchvision:NAME[/], "
        "[bold]timm:NAME[/] or a [bold]folder[/] that rewrite saved.",
        show_default=False,
    ),
]
Arg = Annotated[
    list[str] | None,
    typer.Option("--arg", metavar="K=V", help="Argument for what makes the model; repeatable.", rich_help_panel=MODEL),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Checkpoint to fill in (.safetensors, .pt, .pth), read safely.",
        rich_help_panel=MODEL,
    ),
]
WeightsLenient = Annotated[
    bool, typer.Option("--weights-lenient", help="Accept a checkpoint that fits in part.", rich_help_panel=MODEL)
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Example input such as 1x3x224x224, 1x77:int64 or mask=1x1x64x64; repeatable. "
        "Without it: what the file, the folder, the zoo or the first layer tells.",
        rich_help_panel=MODEL,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="TARGET",
        help="For a saved folder: the model that it was rewritten from.",
        rich_help_panel=MODEL,
    ),
]
TrustTarget = Annotated[
    bool,
    typer.Option(
        "--trust-target",
        help="For a saved folder: import the model that its plan names, which runs that code.",
        rich_help_panel=MODEL,
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", min=0, help="Seed of weights that the model draws.", rich_help_panel=MODEL),
]

Pass_ = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        metavar="NAME",
        help="Pass to run, see `pwrewrite passes`; repeatable, in order. Without --pass, --set and --plan: "
        "insert-bottleneck on layers with at least 1% of the MACs.",
        rich_help_panel=PASSES,
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(
        "--rank",
        metavar="R",
        help=r"Width of the new layers: 32, or 0.5 or 50% of the channels. [dim]\[default: the pass's own][/]",
        rich_help_panel=PASSES,
    ),
]
RankIn = Annotated[
    str | None,
    typer.Option("--rank-in", metavar="R", help="The same, of the reduction only.", rich_help_panel=PASSES),
]
RankOut = Annotated[
    str | None,
    typer.Option("--rank-out", metavar="R", help="The same, of the expansion only.", rich_help_panel=PASSES),
]
Energy = Annotated[
    str | None,
    typer.Option(
        "--energy",
        metavar="SHARE",
        help="Instead of --rank: part of ‖W‖² to keep, 0.95 or 95%.",
        rich_help_panel=PASSES,
    ),
]
Vbmf = Annotated[
    bool,
    typer.Option("--vbmf", help="Instead of --rank: ranks by empirical variational Bayes.", rich_help_panel=PASSES),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        help="Only these layers, such as 'layer3.*'; repeatable.",
        rich_help_panel=PASSES,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Not these layers; repeatable.", rich_help_panel=PASSES),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=FORM:W",
        help="A form for one layer (or pattern), over --pass; repeatable: b3=reduce:96, 'layer4.*=bottleneck:64,32', "
        "pool=project:32, fc=keep. Forms: bottleneck, reduce, expand, spatial, depthwise, pair, project, keep.",
        rich_help_panel=PASSES,
    ),
]
MinShare = Annotated[
    str | None,
    typer.Option(
        "--min-share", metavar="SHARE", help="Only layers with this part of the MACs.", rich_help_panel=PASSES
    ),
]
Multiple = Annotated[
    int | None,
    typer.Option(
        "--multiple",
        metavar="N",
        min=1,
        help=r"What computed widths are rounded to. [dim]\[default: 8 from 64 channels on, else 1][/]",
        rich_help_panel=PASSES,
    ),
]
AllowGrowth = Annotated[
    bool, typer.Option("--allow-growth", help="Also where it costs more than it saves.", rich_help_panel=PASSES)
]
Replan = Annotated[
    bool, typer.Option("--replan", help="Also inside what an earlier rewrite put in.", rich_help_panel=PASSES)
]
InitOption = Annotated[
    Init,
    typer.Option(
        "--init", help="New layers from the old weights, or fresh ones that are to be trained.", rich_help_panel=PASSES
    ),
]
Norm = Annotated[
    str | None,
    typer.Option(
        "--norm",
        metavar="NAME",
        help="With --init fresh: norm after every new layer but the last: batch_norm, instance_norm.",
        rich_help_panel=PASSES,
    ),
]
Activation = Annotated[
    str | None,
    typer.Option(
        "--activation",
        metavar="NAME",
        help="With --init fresh: activation there, such as relu.",
        rich_help_panel=PASSES,
    ),
]
AllowOutputChange = Annotated[
    bool,
    typer.Option(
        "--allow-output-change", help="An output may change its shape; the report tells.", rich_help_panel=PASSES
    ),
]
FormatOption = Annotated[Format, typer.Option("--format", help="Form of the report.", rich_help_panel=OUT)]
All = Annotated[
    bool,
    typer.Option("--all", help="Every layer, and for every layer that stays the reason in full.", rich_help_panel=OUT),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="Write the report there, whole or not at all.", rich_help_panel=OUT),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show warnings and tracebacks.")]
MaxError = Annotated[
    str | None,
    typer.Option(
        "--max-error",
        metavar="E",
        help="Fail if the relative output error is larger: 0.1 or 10%.",
        rich_help_panel=PROOF,
    ),
]


def request_of(
    target: str,
    arg: list[str] | None,
    weights: Path | None,
    weights_lenient: bool,
    inputs: list[str] | None,
    model: str | None,
    trust_target: bool,
    seed: int,
) -> TargetOptions:
    """The options about a target as one."""
    from ..targets import TargetOptions, parse_arg

    args = dict(parse_arg(text) for text in arg or ())
    return TargetOptions(target, args, weights, weights_lenient, tuple(inputs or ()), model, trust_target, seed)


def choices_of(
    passes: list[str] | None,
    rank: str | None,
    rank_in: str | None,
    rank_out: str | None,
    energy: str | None,
    vbmf: bool,
    include: list[str] | None,
    exclude: list[str] | None,
    sets: list[str] | None,
    min_share: str | None,
    multiple: int | None,
    allow_growth: bool,
    replan: bool,
    init: Init,
    norm: str | None,
    activation: str | None,
    allow_output_change: bool,
) -> Choices:
    """The options about passes as one."""
    from ..core.numbers import parse_share
    from ..workflows.choices import Choices, parse_set, parse_width

    def width(text: str | None, what: str) -> int | float | None:
        return parse_width(text, what) if text is not None else None

    return Choices(
        tuple(passes or ()),
        tuple(parse_set(text) for text in sets or ()),
        width(rank, "--rank"),
        width(rank_in, "--rank-in"),
        width(rank_out, "--rank-out"),
        parse_share(energy, "--energy") if energy is not None else None,
        vbmf,
        tuple(include or ()),
        tuple(exclude or ()),
        parse_share(min_share, "--min-share") if min_share is not None else None,
        multiple,
        allow_growth,
        replan,
        init.value,
        norm,
        activation,
        allow_output_change,
    )


def error_bound(text: str | None) -> float | None:
    """Reads ``--max-error``; unlike a share it may be above 1."""
    from ..core.errors import UsageError

    if text is None:
        return None
    stripped = text.strip()
    try:
        value = float(stripped[:-1]) / 100 if stripped.endswith("%") else float(stripped)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(
            "--max-error is not a relative error", expected="a number from 0 such as 0.1 or 10%", got=repr(text)
        )
    return value
