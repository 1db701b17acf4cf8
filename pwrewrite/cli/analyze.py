"""``pwrewrite analyze``: where the work goes, on any model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .printing import show
from .running import handled, interruptible, quiet, uncollected, waiting

_MODEL, _SHOW, _OUT, _CHECK = "Model and inputs", "What is shown", "Output", "Checks"


class Format(StrEnum):
    """The formats of ``--format``."""

    TABLE = "table"
    JSON = "json"
    MARKDOWN = "markdown"
    CSV = "csv"


class Sort(StrEnum):
    """The orders of ``--sort``."""

    MACS = "macs"
    PARAMS = "params"
    MEMORY = "memory"
    NAME = "name"
    ORDER = "order"


class Tool(StrEnum):
    """The tools of ``--as``."""

    TORCH = "torch"
    FVCORE = "fvcore"
    THOP = "thop"
    PTFLOPS = "ptflops"
    TORCHINFO = "torchinfo"


def analyze(
    target: Annotated[
        str,
        typer.Argument(
            help="[bold]model.py[/], [bold]model.py:NAME[/], [bold]package.module:NAME[/], "
            "[bold]torchvision:NAME[/], [bold]timm:NAME[/] or a [bold]folder[/] that rewrite saved.",
            show_default=False,
        ),
    ],
    arg: Annotated[
        list[str] | None,
        typer.Option(
            "--arg", metavar="K=V", help="Argument for what makes the model; repeatable.", rich_help_panel=_MODEL
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Checkpoint to fill in (.safetensors, .pt, .pth), read safely.", rich_help_panel=_MODEL
        ),
    ] = None,
    weights_lenient: Annotated[
        bool,
        typer.Option("--weights-lenient", help="Accept a checkpoint that fits in part.", rich_help_panel=_MODEL),
    ] = False,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE",
            help=r"Example input such as 1x3x224x224, 1x77:int64 or mask=1x1x64x64; repeatable. "
            "Without it: what the file, the zoo or the first layer tells.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="TARGET",
            help="For a saved folder: the model that it was rewritten from.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    trust_target: Annotated[
        bool,
        typer.Option(
            "--trust-target",
            help="For a saved folder: import the model that its plan names, which runs that code.",
            rich_help_panel=_MODEL,
        ),
    ] = False,
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            metavar="N",
            min=0,
            help="At most N layers. [dim]\\[default: 15 hotspots][/]",
            rich_help_panel=_SHOW,
        ),
    ] = None,
    sort: Annotated[Sort, typer.Option(help="Order of the layers.", rich_help_panel=_SHOW)] = Sort.MACS,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="All layers, 1×1 and linear ones too, each with the reason why it stays.",
            rich_help_panel=_SHOW,
        ),
    ] = False,
    tree: Annotated[
        bool,
        typer.Option(
            "--tree", help="The module hierarchy with cumulative cost in place of the layers.", rich_help_panel=_SHOW
        ),
    ] = False,
    depth: Annotated[
        int | None,
        typer.Option(
            "--depth",
            metavar="N",
            min=0,
            help="Levels of the tree; implies --tree. [dim]\\[default: 2][/]",
            rich_help_panel=_SHOW,
        ),
    ] = None,
    hotspot_share: Annotated[
        str,
        typer.Option(
            metavar="SHARE",
            help="Part of the MACs that makes a k×k layer a hotspot: 1% or 0.01.",
            rich_help_panel=_SHOW,
        ),
    ] = "1%",
    device: Annotated[
        str,
        typer.Option(
            metavar="PROFILE",
            help="Device profile for the roofline: cpu, server-cpu, t4, v100, a100, h100, jetson-orin.",
            rich_help_panel=_SHOW,
        ),
    ] = "cpu",
    convention: Annotated[
        Tool | None,
        typer.Option("--as", help="The total as that tool would count it, to the last digit.", rich_help_panel=_SHOW),
    ] = None,
    explain_count: Annotated[
        bool,
        typer.Option(
            "--explain-count",
            help="What each of these tools would say, and what makes the difference.",
            rich_help_panel=_SHOW,
        ),
    ] = False,
    form: Annotated[Format, typer.Option("--format", help="Form of the report.", rich_help_panel=_OUT)] = Format.TABLE,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the report there, whole or not at all.", rich_help_panel=_OUT),
    ] = None,
    max_params: Annotated[
        str | None,
        typer.Option(metavar="N", help="Fail if the model has more parameters (25M).", rich_help_panel=_CHECK),
    ] = None,
    max_macs: Annotated[
        str | None, typer.Option(metavar="N", help="Fail if the model has more MACs (4.1G).", rich_help_panel=_CHECK)
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if an operation has no cost formula.", rich_help_panel=_CHECK)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show warnings and tracebacks.")] = False,
) -> None:
    """Says where the work of a model goes: [bold]hotspots first[/], then memory, paths and coverage.

    [dim]pwrewrite analyze model.py · pwrewrite analyze torchvision:resnet50 --tree ·
    pwrewrite analyze timm:convnext_tiny --format json --output report.json[/]
    """
    with handled(debug):
        with uncollected(), quiet(debug), waiting(f"analysing {target}"):
            with interruptible():
                from ..analysis.roofline import device_profile
                from ..core import files
                from ..core.numbers import parse_count, parse_share
                from ..report import View, gates, render
                from ..report.tree import DEPTH
                from ..targets import parse_arg
                from ..workflows.analyze import analyze_captured, capture_target

            view = View(top, sort.value, everything, DEPTH if tree and depth is None else depth)
            view.check(form.value)
            share = parse_share(hotspot_share, "--hotspot-share")
            limits = {
                "max_params": parse_count(max_params, "--max-params") if max_params is not None else None,
                "max_macs": parse_count(max_macs, "--max-macs") if max_macs is not None else None,
            }
            if output is not None:
                files.check_writable(output)
            device_profile(device)  # what is cheap to refuse is refused before a model is built
            with interruptible():
                captured = capture_target(
                    target,
                    args=dict(parse_arg(text) for text in arg or ()),
                    weights=weights,
                    weights_lenient=weights_lenient,
                    inputs=inputs or (),
                    base=model,
                    trust_target=trust_target,
                )
                analysis = analyze_captured(captured, hotspot_share=share, device=device)
            counts = None
            if convention is not None or explain_count:
                from .counting import counts_of, show_counts, text_of

                with interruptible():
                    counts = counts_of(
                        captured.capture,
                        tool=convention.value if convention is not None else None,
                        explained=explain_count,
                    )
        if counts is not None and output is not None:
            files.write_file(output, text_of(analysis, form.value, view, counts))
        elif counts is not None:
            show_counts(analysis, form.value, view, counts)
        elif output is not None:
            files.write_file(output, render(analysis, form.value, view))
        else:
            show(analysis, form.value, view)
        gates.check(analysis, strict=strict, **limits)
