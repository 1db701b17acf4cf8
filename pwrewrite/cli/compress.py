"""``pwrewrite compress``: from a model to files that serve, in one go."""

from __future__ import annotations

from typing import Annotated

from ..core.options import Budget, CompressOptions, ExportOptions, Proof, TargetOptions
from .bridge import Only
from .options import Reported
from .running import working
from .showing import show, tell


def compress(
    target: TargetOptions,
    budget: Budget,
    proof: Annotated[Proof, Only(("max_error",))],
    options: CompressOptions,
    exporting: Annotated[ExportOptions, Only(("dynamic", "static", "int8"))],
    reported: Reported,
) -> None:
    """Plans, rewrites, refits, fuses, verifies and exports within a budget, [bold]in one go[/]; what was done is kept.

    [dim]pwrewrite compress model.py --weights w.pt --budget latency=0.5 --calibration x.npz --export onnx --out DIR[/]

    [dim]pwrewrite compress[/]  with the options in pwrewrite.toml
    """
    with working(reported) as progress:
        from ..report.compressed import page
        from ..workflows.compress import compress_target

        result = compress_target(target, budget, proof, options, exporting, progress=progress).report
    show(reported, page(result), json=result.to_json, html=result.to_html)
    tell(f"saved in {options.out}" if options.out is not None else "nothing was saved: give --out DIR", reported)
