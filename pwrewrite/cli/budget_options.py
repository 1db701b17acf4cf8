"""Options of planning under a budget, which ``plan`` and ``rewrite`` share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..workflows.budget_by_target import BudgetRequest

BUDGET = "Budget and calibration"


class Sensitivity(StrEnum):
    """The values of ``--sensitivity``."""

    LOSS = "loss"
    ACTIVATIONS = "activations"
    WEIGHTS = "weights"


class Refit(StrEnum):
    """The values of ``--refit``."""

    FULL = "full"
    BIAS = "bias"
    NONE = "none"


class Gate(StrEnum):
    """The values of ``--gate``."""

    LATENCY = "latency"


BudgetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="KIND=LIMIT",
        help="Instead of passes: what the result may cost, of the original or absolute: macs=0.5, params=12M, "
        "bytes=40MiB, latency=8ms; repeatable. Layers, forms and widths are chosen so that the least is lost.",
        rich_help_panel=BUDGET,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="DATA",
        help="A few hundred unlabelled inputs: .npy, .npz, .safetensors, a folder of images, or file.py:NAME, an "
        "iterable of batches.",
        rich_help_panel=BUDGET,
    ),
]
Preprocess = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="file.py:NAME",
        help="Function from a batch of arrays, or an image, to what the model takes.",
        rich_help_panel=BUDGET,
    ),
]
CalibrationSize = Annotated[
    int | None,
    typer.Option("--calibration-size", metavar="N", min=1, help="Use at most so many inputs.", rich_help_panel=BUDGET),
]
Forms = Annotated[
    str | None,
    typer.Option(
        "--forms",
        metavar="NAMES",
        help=r"What layers may become: all, 1x1 (reduce, expand, bottleneck, pair) or a list of forms. "
        r"[dim]\[default: all][/]",
        rich_help_panel=BUDGET,
    ),
]
SensitivityOption = Annotated[
    Sensitivity | None,
    typer.Option(
        "--sensitivity",
        help=r"In what norm an error counts. [dim]\[default: loss, or weights without --calibration][/]",
        show_choices=True,
        rich_help_panel=BUDGET,
    ),
]
RefitOption = Annotated[
    Refit | None,
    typer.Option(
        "--refit",
        help="What is fitted to the original on the calibration inputs: everything, biases and norms, or nothing. "
        r"[dim]\[default: full][/]",
        show_choices=True,
        rich_help_panel=BUDGET,
    ),
]
MaxLayerError = Annotated[
    str | None,
    typer.Option(
        "--max-layer-error",
        metavar="E",
        help="Largest relative error of one layer, in the norm of --sensitivity: 0.3 or 30%.",
        rich_help_panel=BUDGET,
    ),
]
GateOption = Annotated[
    Gate | None,
    typer.Option(
        "--gate",
        help="Use only candidates that are measured to be faster than the layer on this device.",
        rich_help_panel=BUDGET,
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="file.py:NAME",
        help="Function of a model, larger is better; told before and after.",
        rich_help_panel=BUDGET,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="FILE",
        help="Class of each calibration input (.npy, .npz, .txt, .csv, .safetensors): accuracy on those held out.",
        rich_help_panel=BUDGET,
    ),
]
MaxDrop = Annotated[
    str | None,
    typer.Option(
        "--max-drop",
        metavar="D",
        help="With --metric: the smallest model whose metric falls by no more than that: 0.01, or 1% for the same.",
        rich_help_panel=BUDGET,
    ),
]
Pareto = Annotated[
    bool,
    typer.Option(
        "--pareto",
        help="Show the least loss at every budget of MACs instead, within the --budget of other kinds; "
        "--output takes .csv, .svg, .json, .md.",
        rich_help_panel=BUDGET,
    ),
]


def budget_request_of(
    budget: list[str] | None,
    calibration: str | None,
    preprocess: str | None,
    calibration_size: int | None,
    forms: str | None,
    sensitivity: Sensitivity | None,
    refit: Refit | None,
    max_layer_error: str | None,
    gate: Gate | None,
    metric: str | None,
    labels: Path | None,
    max_drop: str | None = None,
    pareto: bool = False,
) -> BudgetRequest | None:
    """The options about a budget as one; None where none was given.

    Raises:
        UsageError: If they make no sense together.
    """
    given = {
        "--preprocess": preprocess,
        "--calibration-size": calibration_size,
        "--forms": forms,
        "--sensitivity": sensitivity,
        "--refit": refit,
        "--max-layer-error": max_layer_error,
        "--gate": gate,
        "--metric": metric,
        "--labels": labels,
        "--max-drop": max_drop,
    }
    from ..core.errors import UsageError

    fits = ("--refit",) if refit is not Refit.NONE else ()
    for name in ("--preprocess", "--calibration-size", "--labels", *fits):
        if given[name] is not None and calibration is None:
            raise UsageError(f"{name} goes with --calibration")
    if pareto:
        for name in ("--max-drop", "--metric", "--labels"):
            if given[name] is not None:
                raise UsageError(
                    f"--pareto and {name} exclude each other", hint="--pareto shows predictions, and makes no model"
                )
    if not (budget or calibration or pareto or max_drop is not None):
        first = next((name for name, value in given.items() if value is not None), None)
        if first is not None:
            raise UsageError(f"{first} goes with --budget or --calibration")
        return None
    from ..core.numbers import parse_share
    from ..planning.budget import parse_budget
    from ..workflows.budget_by_target import BudgetRequest, parse_drop

    return BudgetRequest(
        parse_budget(budget or ()),
        calibration,
        preprocess,
        calibration_size,
        tuple(part.strip() for part in ("all" if forms is None else forms).split(",")),
        sensitivity.value if sensitivity is not None else None,
        (refit or Refit.FULL).value,
        parse_share(max_layer_error, "--max-layer-error") if max_layer_error is not None else None,
        metric,
        labels,
        parse_drop(max_drop) if max_drop is not None else None,
        gate.value if gate is not None else None,
    )
