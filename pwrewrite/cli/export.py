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
        from ..core import files
        from ..core.errors import VerificationError
        from ..report.exported import page
        from ..workflows.export import export_target

        if reported.output is not None:
            files.check_writable(reported.output)
        result = export_target(target, options, progress=progress)
    show(reported, page(result), json=result.to_json)
    failed = [row for row in result.formats if not row.passed]
    written = [row.format for row in result.formats if row.files]
    tell(f"{', '.join(written)} saved in {options.out}" if written else "nothing was saved", reported)
    if failed:
        first = failed[0]
        raise VerificationError(
            f"the {first.format} export does not do what the model does", where=first.differs_at, got=first.detail
        )
