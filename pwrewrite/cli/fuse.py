"""``pwrewrite fuse``: exact passes that make a model faster, verified and saved."""

from __future__ import annotations

from typing import Annotated

from ..core.options import Proof, TargetOptions
from .bridge import Only
from .options import Detailed, FuseOptions, Saved
from .rewrite import check_place_of, check_saving, save, show_report
from .running import working


def fuse(
    target: TargetOptions,
    options: FuseOptions,
    proof: Annotated[Proof, Only(("verify",))],
    saved: Saved,
    reported: Detailed,
) -> None:
    """Folds norms, fuses activations and additions into the layers before them: the [bold]same outputs[/], faster.

    [dim]pwrewrite fuse model.py --weights w.pt --benchmark --out DIR[/]

    [dim]pwrewrite fuse torchvision:resnet50 --pass fold-batch-norm[/]
    """
    with working(reported) as progress:
        from ..core.errors import RefusedError, UsageError
        from ..targets import open_target
        from ..workflows.fuse import fuse
        from ..workflows.fuse_timing import with_latency

        if options.engine is not None and not options.benchmark:
            raise UsageError("--engine says where --benchmark measures", hint="add --benchmark")
        check_saving(proof, saved)
        check_place_of(saved)
        progress("loading", None)
        loaded = open_target(target)
        passes, keep_nan = options.passes or None, options.keep_nan or None
        result = fuse(loaded, None, passes, keep_nan=keep_nan, verify=proof.verify, progress=progress)
        if not result.edits:
            skips = result.report.skips
            shown = skips if reported.everything else skips[:3]
            left = [f"{skip.path}: {skip.detail}" for skip in shown]
            left += [f"{len(skips) - len(shown)} more, which --all names"] if len(skips) > len(shown) else []
            raise RefusedError("there is nothing to fuse", where=target.target, got="; ".join(left) or None)
        if options.benchmark:
            progress("measuring", None)
            result = with_latency(result, loaded, options.engine)
    show_report(result.report, reported)
    save(result, saved, reported)
