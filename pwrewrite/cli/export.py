"""``pwrewrite export``: files for other runtimes, each verified where it will run."""

from __future__ import annotations

from ..core.options import ExportOptions, TargetOptions
from .options import Reported
from .running import working
from .showing import show, tell


def export(target: TargetOptions, options: ExportOptions, reported: Reported) -> None:
    """Writes ONNX, PT2 or OpenVINO files, runs [bold]each in its own runtime[/] and keeps those that agree.

    [dim]pwrewrite export model.py --weights w.pt --to onnx,pt2 --out DIR[/]

    [dim]pwrewrite export FOLDER --model model.py --to openvino --out DIR[/]
    """
    with working(reported) as progress:
        from ..core import files
        from ..core.errors import UsageError
        from ..engines.exports import formats_of
        from ..report.exported import page
        from ..targets import open_target
        from ..workflows.export import check_export_place, export

        if options.out is None:
            raise UsageError("there is no place to export to", hint="give --out DIR")
        if reported.output is not None:
            files.check_writable(reported.output)
        formats_of(options.to)
        check_export_place(options.out, force=options.force)
        progress("loading", None)
        loaded = open_target(target)
        result = export(loaded, None, options, progress=progress, seed=target.seed)
    show(reported, page(result), json=result.to_json)
    tell(f"exported to {options.out}", reported)
