"""``remove``: a module that does nothing in evaluation becomes an identity.

With the kind ``code`` it is the code of the module that has something to remove (`pwrewrite.edit.actions.simplify`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import PlanError, shortened
from ...core.plan import Edit, Op, Skip, SkipReason
from ...layers.known import drops, hooked
from .bench import Bench, Refused


@dataclass(frozen=True)
class RemoveSettings:
    """Settings of ``remove``.

    Attributes:
        kind: Name of the module's class.
    """

    kind: str


def remove_module(bench: Bench, op: Op, settings: RemoveSettings) -> Edit:
    """Carries out a ``remove`` op.

    Raises:
        PlanError: If there is no such module, or it does something in evaluation.
        Refused: If something else refers to it.
    """
    kind = settings.kind
    module = bench.find(op, op.path)
    if type(module).__name__ != kind or not drops(module):
        raise PlanError(
            "the plan removes a module that does something here",
            where=op.where("path"),
            expected=f"a {kind} that drops only in training",
            got=shortened(str(module), 80),
        )
    bench.check_held(op.path, module)
    if hooked(module):
        raise Refused(Skip(op.path, SkipReason.HOOKS, "has a hook, which would no longer be called"))
    return Edit(op, "module", "remove", exact="eval", aliases=bench.remove(module, op.path))
