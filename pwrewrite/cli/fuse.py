"""``pwrewrite fuse``: exact passes that make a model faster, verified and saved."""

from __future__ import annotations

from typing import Annotated

from ..core.options import Proof, TargetOptions
from .bridge import Only
from .options import Detailed, FuseOptions, Saved
from .rewrite import check_places, check_saving, save
from .running import working
from .showing import show


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
        from ..report.fused import page
        from ..workflows.fuse_by_target import fuse_target

        check_saving(proof, saved)
        passes = options.passes or None
        check_places(saved, reported)
        result = fuse_target(
            target,
            passes,
            keep_nan=options.keep_nan or None,
            verify=proof.verify,
            benchmark=options.benchmark,
            progress=progress,
        )
    show(reported, page(result.report, everything=reported.everything), json=result.report.to_json)
    save(result, saved, reported)
