"""``pwrewrite plan``: what a rewrite would do, written down, without doing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from ..core.options import Budget, PassOptions, Proof, TargetOptions
from .bridge import Only
from .options import Detailed, Planned
from .rewrite import show_planned
from .running import working
from .showing import show, tell

if TYPE_CHECKING:
    from ..report.records import Frontier


def plan(
    target: TargetOptions,
    passes: PassOptions,
    budget: Budget,
    proof: Annotated[Proof, Only(("allow_output_change",))],
    planning: Planned,
    reported: Detailed,
) -> None:
    """Writes down what rewrite would do, as JSON made to be edited; [bold]rewrite --plan[/] does exactly that.

    [dim]pwrewrite plan model.py --pass insert-bottleneck --rank 0.5 --out plan.json[/]

    [dim]pwrewrite plan model.py --weights w.pt --budget macs=0.5 --calibration images.npy --out plan.json[/]
    """
    with working(reported, *((".csv", ".svg") if planning.pareto else ())) as progress:
        from ..core import files
        from ..targets import open_target
        from ..workflows.plan import frontier, make_plan
        from ..workflows.what import what_of

        if planning.pareto:
            _check_pareto(budget, planning)
            what = None
        else:
            what = what_of(passes, budget, None, proof.allow_output_change)
            _check_measures(budget)
        if planning.out is not None:
            files.check_writable(planning.out)
        progress("loading", None)
        loaded = open_target(target)
        if what is None:
            curve = frontier(loaded, None, budget, progress=progress)
        else:
            planned = make_plan(loaded, None, what, progress=progress)
    if what is None:
        _show_frontier(curve, reported)
        return
    show_planned(planned, reported)
    if planning.out is None:
        tell("the plan was not written: give --out plan.json", reported)
        return
    files.write_file(planning.out, planned.plan.to_json())
    tell(f"written to {planning.out}", reported)


def _check_measures(budget: Budget) -> None:
    """Refuses what only a rewrite can measure."""
    from ..core.errors import UsageError
    from ..planning.budget import budgets_of

    timed = budget.gate is not None or any(limit.kind == "latency" for limit in budgets_of(budget.limits))
    if budget.engine is not None and not timed:
        raise UsageError("--engine says where latencies are measured", hint="add --budget latency=… or --gate latency")
    for name, value in (
        ("--metric", None if budget.max_drop is not None else budget.metric),
        ("--labels", budget.labels),
        ("--recover", None if budget.max_drop is not None else budget.recover),
    ):
        if value is not None:
            raise UsageError(
                f"a plan makes no model for {name}",
                hint="give it to rewrite" + (", or add --max-drop" if name != "--labels" else ""),
            )


def _check_pareto(budget: Budget, planning: Planned) -> None:
    from ..core.declaring import flag_of
    from ..core.errors import UsageError

    if planning.out is not None:
        raise UsageError("--pareto makes no plan for --out", hint="--report frontier.csv writes the frontier")
    for name in ("max_drop", "metric", "labels", "recover"):
        flag, value = flag_of(Budget, name), getattr(budget, name)
        if value is not None:
            raise UsageError(
                f"--pareto and {flag} exclude each other", hint="--pareto shows predictions, and makes no model"
            )


def _show_frontier(curve: Frontier, reported: Detailed) -> None:
    """Shows a frontier; the name of its file may ask for two forms more than others know."""
    from ..core import files
    from ..report import frontier

    written: dict[str, Callable[[Frontier], str]] = {".csv": frontier.comma_separated, ".svg": frontier.picture}
    output = reported.output
    if output is not None and reported.wanted is None and output.suffix.lower() in written:
        files.write_file(output, written[output.suffix.lower()](curve))
        tell(f"written to {output}", reported)
        return
    show(reported, frontier.page(curve), json=curve.to_json, html=curve.to_html)
