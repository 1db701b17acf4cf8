"""``pwrewrite fuse``: exact passes that make a model faster, verified and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .options import OUT, PASSES, PROOF, Format
from .progress import progressing
from .running import handled, interruptible, quiet
from .showing import show, tell


def fuse(
    target: o.Target,
    passes: Annotated[
        str | None,
        typer.Option(
            "--passes",
            metavar="NAME,…",
            help="Passes to run, in order: remove-inference-noise, fold-batch-norm, merge-pointwise, fuse-activation, "
            r"channels-last. [dim]\[default: all of them][/]",
            rich_help_panel=PASSES,
        ),
    ] = None,
    arg: o.Arg = None,
    weights: o.Weights = None,
    weights_lenient: o.WeightsLenient = False,
    inputs: o.Inputs = None,
    model: o.Base = None,
    trust_target: o.TrustTarget = False,
    seed: o.Seed = 0,
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help="Leave the verification out; then nothing is saved.", rich_help_panel=PROOF),
    ] = False,
    benchmark: Annotated[
        bool,
        typer.Option(
            "--benchmark",
            help="Measure the latency before, after, and frozen (pwrewrite.freeze).",
            rich_help_panel=PROOF,
        ),
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
        bool, typer.Option("--force", help="Replace a folder that an earlier run saved.", rich_help_panel=OUT)
    ] = False,
    form: o.FormatOption = Format.TABLE,
    everything: o.All = False,
    output: o.Output = None,
    debug: o.Debug = False,
) -> None:
    """Folds norms, fuses activations and additions into the layers before them: the [bold]same outputs[/], faster.

    [dim]pwrewrite fuse model.py --weights w.pt --benchmark --out DIR ·
    pwrewrite fuse torchvision:resnet50 --passes fold-batch-norm[/]
    """
    with handled(debug):
        with quiet(debug), interruptible(), progressing() as progress:
            from ..core import files
            from ..core.errors import UsageError
            from ..report import fused as table
            from ..targets.storage import check_place
            from ..workflows.fuse_by_target import fuse_target, passes_named
            from ..workflows.rewrite import unverified_error

            if no_verify and out is not None:
                raise UsageError("--no-verify saves nothing", hint="leave out --no-verify or --out")
            chosen = passes_named(passes.split(",")) if passes is not None else None
            request = o.request_of(target, arg, weights, weights_lenient, inputs, model, trust_target, seed)
            if out is not None:
                check_place(out, force=force)
            if output is not None:
                files.check_writable(output)
            result = fuse_target(request, chosen, verify=not no_verify, benchmark=benchmark, progress=progress)
        show(
            form.value,
            output,
            page=lambda width: table.page(result, width=width, everything=everything),
            markdown=lambda: table.markdown(result, everything=everything),
            data=lambda: table.to_json(result),
        )
        failed = result.report.verification is not None and not result.report.passed
        if out is None:
            tell("nothing was saved: give --out DIR")
        elif not failed:
            with quiet(debug), interruptible(), progressing() as progress:
                progress("saving", None)
                result.save(out, force=force)
            tell(f"saved in {out}")
        else:
            tell("nothing was saved")
        if failed:
            raise unverified_error(result.report)
