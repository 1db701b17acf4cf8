"""``pwrewrite plan``: what a rewrite would do, written down, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .options import OUT, Format, Init
from .progress import progressing
from .running import handled, interruptible, quiet
from .showing import show, tell


def plan(
    target: o.Target,
    passes: o.Pass_ = None,
    rank: o.Rank = None,
    rank_in: o.RankIn = None,
    rank_out: o.RankOut = None,
    energy: o.Energy = None,
    vbmf: o.Vbmf = False,
    include: o.Include = None,
    exclude: o.Exclude = None,
    sets: o.Set = None,
    min_share: o.MinShare = None,
    multiple: o.Multiple = None,
    allow_growth: o.AllowGrowth = False,
    replan: o.Replan = False,
    init: o.InitOption = Init.WEIGHTS,
    norm: o.Norm = None,
    activation: o.Activation = None,
    allow_output_change: o.AllowOutputChange = False,
    arg: o.Arg = None,
    weights: o.Weights = None,
    weights_lenient: o.WeightsLenient = False,
    inputs: o.Inputs = None,
    model: o.Base = None,
    trust_target: o.TrustTarget = False,
    seed: o.Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the plan there, whole or not at all, for rewrite --plan.", rich_help_panel=OUT
        ),
    ] = None,
    form: o.FormatOption = Format.TABLE,
    everything: o.All = False,
    debug: o.Debug = False,
) -> None:
    """Writes down what rewrite would do, as JSON made to be edited; [bold]rewrite --plan[/] does exactly that.

    [dim]pwrewrite plan model.py --pass insert-bottleneck --rank 0.5 --out plan.json[/]
    """
    with handled(debug):
        with quiet(debug), interruptible(), progressing() as progress:
            from ..by_target import plan_target
            from ..report import files
            from ..report import rewrite as table
            from ..report import rewrite_markdown as markdown

            choices = o.choices_of(
                passes, rank, rank_in, rank_out, energy, vbmf, include, exclude, sets, min_share, multiple,
                allow_growth, replan, init, norm, activation, allow_output_change,
            )  # fmt: skip
            request = o.request_of(target, arg, weights, weights_lenient, inputs, model, trust_target, seed)
            if out is not None:
                files.check_writable(out)
            planned = plan_target(request, choices, progress=progress)
        show(
            form.value,
            None,
            page=lambda width: table.page(planned.report, width=width, everything=everything, planned=True),
            markdown=lambda: markdown.render(planned.report, everything=everything, planned=True),
            data=planned.plan.to_json,
        )
        if out is None:
            tell("the plan was not written: give --out plan.json")
            return
        files.write_text(out, planned.plan.to_json())
        tell(f"written to {out}")
