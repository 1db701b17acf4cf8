"""``pwrewrite rewrite``: bottlenecks in place of expensive layers, verified and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import budget_options as b
from . import options as o
from .options import OUT, PASSES, PROOF, Format, Init
from .progress import progressing
from .running import handled, interruptible, quiet
from .showing import show, tell


def rewrite(
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
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Instead of passes: carry out what `pwrewrite plan` wrote.", rich_help_panel=PASSES
        ),
    ] = None,
    min_share: o.MinShare = None,
    multiple: o.Multiple = None,
    allow_growth: o.AllowGrowth = False,
    replan: o.Replan = False,
    init: o.InitOption = Init.WEIGHTS,
    norm: o.Norm = None,
    activation: o.Activation = None,
    allow_output_change: o.AllowOutputChange = False,
    budget: b.BudgetOption = None,
    calibration: b.Calibration = None,
    preprocess: b.Preprocess = None,
    calibration_size: b.CalibrationSize = None,
    forms: b.Forms = None,
    sensitivity: b.SensitivityOption = None,
    refit: b.RefitOption = None,
    max_layer_error: b.MaxLayerError = None,
    gate: b.GateOption = None,
    metric: b.Metric = None,
    labels: b.Labels = None,
    arg: o.Arg = None,
    weights: o.Weights = None,
    weights_lenient: o.WeightsLenient = False,
    inputs: o.Inputs = None,
    model: o.Base = None,
    trust_target: o.TrustTarget = False,
    seed: o.Seed = 0,
    max_error: o.MaxError = None,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            help="Leave the verification out; then nothing is saved without --save-unverified.",
            rich_help_panel=PROOF,
        ),
    ] = False,
    save_unverified: Annotated[
        bool,
        typer.Option("--save-unverified", help="Save all the same; the README says so.", rich_help_panel=PROOF),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Save there: weights, plan, report, README; whole or not at all. Without it nothing is saved.",
            rich_help_panel=OUT,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that rewrite saved.", rich_help_panel=OUT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and do nothing else.", rich_help_panel=OUT)
    ] = False,
    form: o.FormatOption = Format.TABLE,
    everything: o.All = False,
    output: o.Output = None,
    debug: o.Debug = False,
) -> None:
    """Puts 1×1 bottlenecks in place of expensive layers, [bold]proves[/] that the rest is as it was, and saves.

    [dim]pwrewrite rewrite model.py --weights w.pt --pass insert-bottleneck --rank 0.5 --out DIR ·
    pwrewrite rewrite model.py --weights w.pt --budget macs=0.5 --calibration images.npy --out DIR ·
    pwrewrite rewrite torchvision:resnet50 --dry-run[/]
    """
    with handled(debug):
        with quiet(debug), interruptible(), progressing() as progress:
            from ..core import files
            from ..core.errors import UsageError
            from ..core.plan import Plan
            from ..report import rewrite as table
            from ..report import rewrite_markdown as markdown
            from ..targets.storage import check_place
            from ..workflows.budget_by_target import plan_budget, rewrite_budget
            from ..workflows.by_target import plan_target, rewrite_target
            from ..workflows.rewrite import unverified_error

            if no_verify and max_error is not None:
                raise UsageError("--no-verify and --max-error exclude each other")
            if no_verify and out is not None and not save_unverified and not dry_run:
                raise UsageError("--no-verify saves nothing", hint="add --save-unverified, or leave --no-verify out")
            bound = o.error_bound(max_error)
            choices = o.choices_of(
                passes, rank, rank_in, rank_out, energy, vbmf, include, exclude, sets, min_share, multiple,
                allow_growth, replan, init, norm, activation, allow_output_change,
            )  # fmt: skip
            request = o.request_of(target, arg, weights, weights_lenient, inputs, model, trust_target, seed)
            asked = b.budget_request_of(
                budget, calibration, preprocess, calibration_size, forms, sensitivity, refit, max_layer_error, gate,
                metric, labels,
            )  # fmt: skip
            if out is not None:
                check_place(out, force=force)
            if output is not None:
                files.check_writable(output)
            given = Plan.read(plan) if plan is not None else None
            if dry_run and asked is not None and given is None:
                planned = plan_budget(request, choices, asked, progress=progress)
            elif dry_run:
                planned = plan_target(request, choices, given, progress=progress)
            elif asked is not None:
                result = rewrite_budget(
                    request, choices, asked, given, verify=not no_verify, max_error=bound, progress=progress
                )
            else:
                result = rewrite_target(
                    request, choices, given, verify=not no_verify, max_error=bound, progress=progress
                )
        if dry_run:
            show(
                form.value,
                output,
                page=lambda width: table.page(planned.report, width=width, everything=everything, planned=True),
                markdown=lambda: markdown.render(planned.report, everything=everything, planned=True),
                data=planned.plan.to_json,
            )
            tell("nothing was done: this is a dry run")
            return
        show(
            form.value,
            output,
            page=lambda width: table.page(result.report, width=width, everything=everything),
            markdown=lambda: markdown.render(result.report, everything=everything),
            data=result.report.to_json,
        )
        failed = result.report.verification is not None and not result.report.passed
        if out is None:
            tell("nothing was saved: give --out DIR")
        elif not failed or save_unverified:
            with quiet(debug), interruptible(), progressing() as progress:
                progress("saving", None)
                result.save(out, force=force, unverified=save_unverified)
            tell(f"saved in {out}" + ("" if result.report.passed else ", UNVERIFIED"))
        else:
            tell("nothing was saved")
        if failed:
            raise unverified_error(result.report)
