"""``unfuse``: a fused layer becomes a plain layer and its activation again, for passes that look for plain layers."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import PlanError
from ...core.plan import Edit, Op
from ...layers import PointwiseActivation
from ..unfuse import adds_residuals, plain_modules
from .bench import Bench, param_count


@dataclass(frozen=True)
class UnfuseSettings:
    """Settings of ``unfuse``: none."""


def unfuse_layer(bench: Bench, op: Op, settings: UnfuseSettings) -> Edit:
    """Carries out an ``unfuse`` op.

    Raises:
        PlanError: If there is no such module, or it is no fused layer.
        Refused: If something else refers to it.
    """
    fused = bench.find(op, op.path)
    if not isinstance(fused, PointwiseActivation):
        raise PlanError(
            "the plan unfuses a layer that is not fused here",
            where=op.where("path"),
            expected="a fused layer",
            got=type(fused).__name__,
            hint="the plan was made for another model, or was carried out already",
        )
    bench.check_held(op.path, fused)
    plain = plain_modules(fused, id(fused) in adds_residuals(bench.model))
    aliases = bench.replace(fused, plain, op.path)
    inner = f"{op.path}." if op.path else ""
    places = {name.rpartition(".")[2]: name for name, _ in plain.named_parameters()}
    return Edit(
        op,
        "module",
        "unfuse",
        params_before=param_count(fused),
        params_after=param_count(plain),
        exact="eval",
        renamed={f"{inner}{name}": (f"{inner}{places[name]}",) for name, _ in fused.named_parameters()},
        aliases=aliases,
    )
