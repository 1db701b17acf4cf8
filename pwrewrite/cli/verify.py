"""``pwrewrite verify``: whether two models are still the same model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from . import options as o
from .options import PROOF, Format
from .progress import progressing
from .running import handled, interruptible, quiet
from .showing import show


def verify(
    first: Annotated[
        str,
        typer.Argument(metavar="A", help="The original: a target, or a folder that rewrite saved.", show_default=False),
    ],
    second: Annotated[
        str,
        typer.Argument(
            metavar="B",
            help="The other: a target, or a folder; of a folder, A is taken for the original.",
            show_default=False,
        ),
    ],
    arg: o.Arg = None,
    weights: o.Weights = None,
    weights_lenient: o.WeightsLenient = False,
    inputs: o.Inputs = None,
    model: o.Base = None,
    trust_target: o.TrustTarget = False,
    seed: o.Seed = 0,
    max_error: o.MaxError = None,
    allow_output_change: Annotated[
        bool,
        typer.Option("--allow-output-change", help="Outputs may differ in shape; it is told.", rich_help_panel=PROOF),
    ] = False,
    form: o.FormatOption = Format.TABLE,
    output: o.Output = None,
    debug: o.Debug = False,
) -> None:
    """Compares two models in what can be observed: outputs, shapes, modes, sizes, gradients, reloading.

    [dim]pwrewrite verify model.py DIR --weights w.pt --max-error 0.1 · pwrewrite verify DIR1 DIR2 --model model.py[/]
    """
    with handled(debug):
        with quiet(debug), interruptible(), progressing() as progress:
            from ..core import files
            from ..core.errors import VerificationError
            from ..report import rewrite as table
            from ..report import rewrite_markdown as markdown
            from ..workflows.by_target import verify_targets

            bound = o.error_bound(max_error)
            request = o.request_of(first, arg, weights, weights_lenient, inputs, model, trust_target, seed)
            if output is not None:
                files.check_writable(output)
            proof = verify_targets(
                request, second, max_error=bound, allow_output_change=allow_output_change, progress=progress
            )
        names = (first, second)
        show(
            form.value,
            output,
            page=lambda width: table.verification_page(proof, names, width=width),
            markdown=lambda: markdown.verification(proof, names),
            data=lambda: json.dumps(proof.to_dict(), indent=2, ensure_ascii=False) + "\n",
        )
        if not proof.passed:
            raise VerificationError(
                f"{second} does not do what {first} does", where=proof.diverges_at, got=proof.failures[0].detail or None
            )
