"""``remove``: a module that does nothing in evaluation becomes an identity. Settings: ``kind``, its class's name.

With the kind ``code`` it is the code of the module that has something to remove (`pwrewrite.edit.actions.simplify`).
"""

from __future__ import annotations

from torch import nn

from ...core.errors import PlanError
from ...core.plan import Edit, Op, Skip, SkipReason
from ...layers.known import drops, hooked
from .bench import Bench, Refused
from .simplify import CODE, simplify_code


def remove_module(bench: Bench, op: Op) -> Edit:
    """Carries out a ``remove`` op.

    Raises:
        PlanError: If there is no such module, or it does something in evaluation.
        Refused: If something else refers to it.
    """
    if op.settings.get("kind") == CODE:
        return simplify_code(bench, op)
    module = bench.find(op, op.path)
    if type(module).__name__ != op.settings.get("kind") or not drops(module):
        raise PlanError(
            "the plan removes a module that does something here",
            where=op.where("path"),
            expected=f"a {op.settings.get('kind')} that drops only in training",
            got=str(module)[:80],
        )
    bench.check_held(op.path, module)
    if hooked(module):
        raise Refused(Skip(op.path, SkipReason.HOOKS, "has a hook, which would no longer be called"))
    names = bench.names_of(module)
    identity = nn.Identity()
    identity.train(module.training)
    bench.replace(module, identity)
    return Edit(
        op=op,
        kind="module",
        method="remove",
        rank_in=None,
        rank_out=None,
        params_before=0,
        params_after=0,
        relative_error=None,
        exact="eval",
        aliases=tuple(name for name in names if name != op.path),
    )
