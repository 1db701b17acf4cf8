"""``pwrewrite analyze``: where the work goes, on any model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from ..core.collector import no_collection
from ..core.options import GateOptions, TargetOptions
from .bridge import Only
from .options import AnalysisReported, AnalysisShown
from .running import interruptible, working
from .showing import show

if TYPE_CHECKING:
    from ..capturing.records import Capture
    from ..report import View
    from ..report.counts import Counts


def analyze(
    target: Annotated[TargetOptions, Only(("seed",), but=True)],
    shown: AnalysisShown,
    reported: AnalysisReported,
    limits: Annotated[GateOptions, Only(("max_params", "max_macs", "strict"))],
) -> None:
    """Says where the work of a model goes: [bold]hotspots first[/], then memory, paths and coverage.

    [dim]pwrewrite analyze model.py[/]

    [dim]pwrewrite analyze torchvision:resnet50 --tree[/]

    [dim]pwrewrite analyze timm:convnext_tiny --report report.json[/]
    """
    with no_collection(), working(reported) as progress:
        from ..analysis.devices import device_profile
        from ..analysis.gates import judge
        from ..report import costs, render
        from ..report.analysis import page
        from ..workflows.analyze import analyze_captured, capture_target

        view = _view(shown, reported.form)
        device_profile(shown.device)  # what is cheap to refuse is refused before a model is built
        progress(f"analysing {target.target}", None)
        with interruptible():
            loaded, captured = capture_target(target)
            analysis = analyze_captured(loaded, captured, hotspot_share=shown.hotspot_share, device=shown.device)
            counts = _counts(shown, captured)
    show(
        reported,
        page(analysis, view, counts),
        json=lambda: render(analysis, "json", view, counts),
        csv=lambda: render(analysis, "csv", view, counts),
        html=lambda: render(analysis, "html", view, counts),
    )
    costs.hold(judge(analysis, limits))


def _view(shown: AnalysisShown, form: str) -> View:
    from ..report import View
    from ..report.analysis import DEPTH

    depth = DEPTH if shown.tree and shown.depth is None else shown.depth
    view = View(shown.top, shown.sort, shown.everything, depth, shown.receptive_field)
    view.check(form)
    return view


def _counts(shown: AnalysisShown, captured: Capture) -> Counts:
    from ..report.counts import Counts

    if shown.convention is None and not shown.explain_count:
        return Counts()
    from ..analysis.conventions import count, explain

    chosen = count(captured, shown.convention) if shown.convention is not None else None
    return Counts(chosen, explain(captured) if shown.explain_count else ())
