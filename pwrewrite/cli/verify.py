"""``pwrewrite verify``: whether two models are still the same model."""

from __future__ import annotations

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
        from ..core.errors import VerificationError
        from ..report.rewrite import verification_page
        from ..workflows.verify import verify_targets

        verification = verify_targets(target, second.other, proof, progress=progress)
    show(reported, verification_page(verification, (target.target, second.other)), json=verification.to_json)
    if not verification.passed:
        raise VerificationError(
            f"{second.other} does not do what {target.target} does",
            where=verification.diverges_at,
            got=verification.failures[0].detail or None,
        )
