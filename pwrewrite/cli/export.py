"""``pwrewrite export``: a model as other runtimes take it, each run in its own and compared."""

from __future__ import annotations

from ..core.options import ExportOptions, TargetOptions
from .options import Reported
from .running import working
from .showing import show, tell


def export(target: TargetOptions, options: ExportOptions, reported: Reported) -> None:
    """Exports a model, and runs every export in its [bold]own runtime[/] at two batch sizes against the model.

    [dim]pwrewrite export model.py --weights w.pt --to onnx,openvino --out DIR[/]

    [dim]pwrewrite export model.py --dynamic x:2=height --dynamic x:3=width --out DIR[/]
    """
    with working(reported) as progress:
        from ..report.exported import page
        from ..workflows.export import differing_error, export_target

        result = export_target(target, options, progress=progress)
    show(reported, page(result), json=result.to_json)
    written = [row.format for row in result.formats if row.files]
    tell(f"{', '.join(written)} saved in {options.out}" if written else "nothing was saved", reported)
    if not result.passed:
        raise differing_error(result.formats)
