"""``pwrewrite check`` and ``pwrewrite diff``: gates for a build, and what changed for a pull request."""

from __future__ import annotations

import os
from typing import Annotated

from ..core.collector import no_collection
from ..core.options import GateOptions, TargetOptions
from .bridge import Only
from .options import CheckReported, Other, Reported
from .running import working
from .showing import show

_OPENING = ("weights", "weights_lenient", "seed")
"""What does not change what a model costs."""


def check(
    target: Annotated[TargetOptions, Only(_OPENING, but=True)], gate: GateOptions, reported: CheckReported
) -> None:
    """Fails where a model costs more than it may, and says [bold]which layers[/] are to blame.

    [dim]pwrewrite check model.py --max-params 5M --max-macs 600M[/]

    [dim]pwrewrite check model.py --baseline main.json --max-increase macs=2% --format github[/]
    """
    with no_collection(), working(reported) as progress:
        from ..core import files
        from ..report import costs, markdown
        from ..workflows.check import check_target

        progress(f"checking {target.target}", None)
        result = check_target(target, gate)
        page = costs.check_page(result)
    show(
        reported,
        page,
        json=result.to_json,
        junit=lambda: costs.junit(result),
        github=lambda: costs.github(result, _file_of(target.target)),
    )
    summary = os.environ.get("GITHUB_STEP_SUMMARY") if reported.form == "github" else None
    if summary:
        try:
            with open(summary, "a", encoding="utf-8") as file:
                file.write(markdown(page))
        except OSError as error:
            raise files.unwritable(summary, error) from None
    costs.hold(result)


def _file_of(target: str) -> str | None:
    file = target.rpartition(":")[0] or target
    return next((name for name in (target, file) if name.endswith(".py") and os.path.isfile(name)), None)


def diff(target: Annotated[TargetOptions, Only(_OPENING, but=True)], second: Other, reported: Reported) -> None:
    """Compares what two models cost, layer by layer: targets, saved folders or analyses as JSON.

    [dim]pwrewrite diff main.json model.py --format markdown[/]

    [dim]pwrewrite diff model.py DIR[/]
    """
    with no_collection(), working(reported) as progress:
        from ..report.costs import difference_page
        from ..workflows.check import diff as compared

        progress(f"comparing {target.target} with {second.other}", None)
        difference = compared(target.target, second.other, target)
    show(reported, difference_page(difference), json=difference.to_json)
