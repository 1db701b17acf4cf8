"""``pwrewrite plan``: what a rewrite would do, written down, without doing it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import budget_options as b
from . import options as o
from .options import OUT, Format, Init
from .progress import progressing
from .running import handled, interruptible, quiet
from .showing import show, tell

if TYPE_CHECKING:
    from ..report.frontier import Frontier


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
    max_drop: b.MaxDrop = None,
    pareto: b.Pareto = False,
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
    output: o.Output = None,
    debug: o.Debug = False,
) -> None:
    """Writes down what rewrite would do, as JSON made to be edited; [bold]rewrite --plan[/] does exactly that.

    [dim]pwrewrite plan model.py --pass insert-bottleneck --rank 0.5 --out plan.json ·
    pwrewrite plan model.py --weights w.pt --budget macs=0.5 --calibration images.npy --out plan.json[/]
    """
    with handled(debug):
        with quiet(debug), interruptible(), progressing() as progress:
            from ..core import files
            from ..report import rewrite as table
            from ..report import rewrite_markdown as markdown
            from ..workflows.budget_by_target import frontier_of, plan_budget
            from ..workflows.by_target import plan_target

            choices = o.choices_of(
                passes, rank, rank_in, rank_out, energy, vbmf, include, exclude, sets, min_share, multiple,
                allow_growth, replan, init, norm, activation, allow_output_change,
            )  # fmt: skip
            request = o.request_of(target, arg, weights, weights_lenient, inputs, model, trust_target, seed)
            asked = b.budget_request_of(
                budget, calibration, preprocess, calibration_size, forms, sensitivity, refit, max_layer_error, gate,
                metric, labels, max_drop, pareto,
            )  # fmt: skip
            _check_measures(metric, labels, max_drop)
            for place in (out, output):
                if place is not None:
                    files.check_writable(place)
            if pareto:
                assert asked is not None
                _check_pareto(out)
                found = frontier_of(request, choices, asked, progress=progress)
            elif asked is not None:
                planned = plan_budget(request, choices, asked, progress=progress)
            else:
                planned = plan_target(request, choices, progress=progress)
        if pareto:
            _show_frontier(found, form, output)
            return
        show(
            form.value,
            output,
            page=lambda width: table.page(planned.report, width=width, everything=everything, planned=True),
            markdown=lambda: markdown.render(planned.report, everything=everything, planned=True),
            data=planned.plan.to_json,
        )
        if out is None:
            tell("the plan was not written: give --out plan.json")
            return
        files.write_file(out, planned.plan.to_json())
        tell(f"written to {out}")


def _check_measures(metric: str | None, labels: Path | None, max_drop: str | None) -> None:
    """Refuses what only a rewrite can measure."""
    from ..core.errors import UsageError

    for name, value in (("--metric", None if max_drop is not None else metric), ("--labels", labels)):
        if value is not None:
            raise UsageError(
                f"a plan makes no model that {name} could measure",
                hint="give it to rewrite" + (", or add --max-drop" if name == "--metric" else ""),
            )


def _check_pareto(out: Path | None) -> None:
    from ..core.errors import UsageError

    if out is not None:
        raise UsageError("--pareto makes no plan for --out", hint="--output frontier.csv writes the frontier")


def _show_frontier(found: Frontier, form: Format, output: Path | None) -> None:
    """Shows a frontier, or writes it in the form that the file's name asks for."""
    from ..core import files
    from ..report import frontier

    written: dict[str, Callable[[Frontier], str]] = {
        ".csv": frontier.comma_separated,
        ".svg": frontier.picture,
        ".md": frontier.markdown,
        ".json": type(found).to_json,
    }
    if output is not None and output.suffix.lower() in written:
        files.write_file(output, written[output.suffix.lower()](found))
        tell(f"written to {output}")
        return
    show(
        form.value,
        output,
        page=lambda width: frontier.page(found, width=width),
        markdown=lambda: frontier.markdown(found),
        data=found.to_json,
    )
