"""``pwrewrite verify``: whether two models are still the same model."""

from __future__ import annotations

import json
from typing import Annotated

from ..core.options import Proof, TargetOptions
from .bridge import Only
from .options import Other, Reported
from .running import working
from .showing import show


def verify(
    target: TargetOptions, second: Other, proof: Annotated[Proof, Only(("verify",), but=True)], reported: Reported
) -> None:
    """Compares two models in what can be observed: outputs, shapes, modes, sizes, gradients, reloading.

    [dim]pwrewrite verify model.py DIR --weights w.pt --max-error 0.1[/]

    [dim]pwrewrite verify DIR1 DIR2 --model model.py[/]
    """
    with working(reported) as progress:
        from ..core import files
        from ..core.errors import VerificationError
        from ..report import rewrite as table
        from ..report import rewrite_markdown as markdown
        from ..workflows.verify import verify_targets

        if reported.output is not None:
            files.check_writable(reported.output)
        verification = verify_targets(target, second.other, proof, progress=progress)
    names = (target.target, second.other)
    show(
        reported,
        lambda width: table.verification_page(verification, names, width=width),
        markdown=lambda: markdown.verification(verification, names),
        json=lambda: json.dumps(verification.to_dict(), indent=2, ensure_ascii=False) + "\n",
    )
    if not verification.passed:
        raise VerificationError(
            f"{second.other} does not do what {target.target} does",
            where=verification.diverges_at,
            got=verification.failures[0].detail or None,
        )
