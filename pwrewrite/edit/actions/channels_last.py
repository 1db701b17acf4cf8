"""``channels-last``: 2-D convolutions compute in channels_last. Settings: ``layers``, path to shape facts."""

from __future__ import annotations

from typing import Any

from ...core.errors import PlanError
from ...core.plan import Edit, Op
from ...forms.specs import spec_from_dict
from ...layers import PointwiseActivation
from .bench import Bench


def use_channels_last(bench: Bench, op: Op) -> Edit:
    """Carries out a ``channels-last`` op.

    Raises:
        PlanError: If a layer is none, or another one.
        Refused: If a layer must stay as it is.
    """
    layers = op.settings.get("layers")
    if not isinstance(layers, dict):
        raise PlanError(
            "layers is an object", where=op.where("layers"), expected="path to shape facts", got=repr(layers)
        )
    chosen: list[tuple[Any, Any]] = []
    for path, facts in layers.items():
        spec = spec_from_dict(facts, op.where("layers"))
        module: Any = bench.find(op, path, "layers")
        if isinstance(module, PointwiseActivation):
            if module.spec != spec:
                raise PlanError("the plan was made for another layer", where=op.where("layers"), got=path)
        else:
            module = bench.layer(op, path, spec, "layers")
        chosen.append((module, spec))
    for module, spec in chosen:
        if isinstance(module, PointwiseActivation):
            module.channels_last = True
        else:
            bench.replace(module, PointwiseActivation.of_layer(module, spec, "none", channels_last=True))
    return Edit(
        op=op,
        kind="module",
        method="channels-last",
        rank_in=None,
        rank_out=None,
        params_before=0,
        params_after=0,
        relative_error=None,
        exact="both",
    )
