"""``substitute``: one 1×1 convolution, or nothing, takes the place of a whole module.

The map is the one that is nearest to what the module does on calibration inputs (`decompose.nearest_map`); without
calibration inputs there is none, and only a module that is dropped can be substituted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import nn

from ...core.convolution import ConvSpec
from ...core.errors import RefusedError
from ...core.plan import Edit, Op
from ...decompose.nearest_map import NearestMap
from ...forms.specs import pointwise_spec
from ..swap import stem
from .bench import ELSEWHERE, Bench, layer_like, param_count, train_like
from .settings import one_of, wrong

RANGES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}
"""What brings the outputs of a map into the range of those of the module."""


@dataclass(frozen=True)
class SubstituteSettings:
    """Settings of ``substitute``."""

    layer: ConvSpec  # shape facts of the 1×1 convolution or linear map
    drop: bool = False  # whether nothing takes the place of the module: its input goes on
    activation: Annotated[str | None, one_of(*RANGES)] = None  # what is behind the map, in a sequence with it


def substitute_module(bench: Bench, op: Op, settings: SubstituteSettings) -> Edit:
    """Carries out a ``substitute`` op; a `RefusedError` says that nothing gives the weights of the map."""
    spec, module = settings.layer, bench.find(op, op.path)
    if spec != replace(pointwise_spec(spec.dims, spec.in_channels, spec.out_channels, bias=True), stride=spec.stride):
        expected = "a 1×1 convolution or linear map with a bias, without groups and padding"
        raise wrong(op, "layer", "no such layer is put in a module's place", expected, str(spec))
    if settings.drop and (spec.in_channels != spec.out_channels or any(step != 1 for step in spec.stride)):
        raise wrong(op, "drop", "only a module whose output has the shape of its input is dropped", "false", "true")
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None or not op.path:
        got = type(module).__name__
        raise wrong(op, "path", "the plan was made for another module", "one with weights", got, ELSEWHERE)
    for each in module.modules():
        bench.check_removable(op, op.path, each)
    names, before = [name for name, _ in module.named_parameters()], param_count(module)
    edit = Edit(op, "module", "drop" if settings.drop else "substitute", params_before=before)
    inner = stem(op.path)
    if settings.drop:
        renamed: dict[str, tuple[str, ...]] = {f"{inner}{name}": () for name in names}
        return replace(edit, renamed=renamed, aliases=bench.remove(module, op.path))
    new = layer_like(weight, op.path, spec, initialised=False)
    if bench.fill and not weight.is_meta:
        found = bench.once(op, lambda: None if bench.decomposer is None else bench.decomposer(op, weight))
        if not isinstance(found, NearestMap):
            message = "what takes the place of a whole module is fitted on calibration inputs, and there are none"
            hint = "rewrite with the plan and --calibration, or load the folder that the result was saved in"
            raise RefusedError(message, where=op.path, hint=hint)
        with torch.no_grad():
            new.weight.copy_(found.kernel.reshape(new.weight.shape))
            assert new.bias is not None
            new.bias.copy_(found.bias)
    for parameter in new.parameters():
        train_like(parameter, *module.parameters())
    put_in: nn.Module = new
    if settings.activation is not None:
        put_in, inner = nn.Sequential(new, RANGES[settings.activation]()), f"{inner}0."
    put_in.train(module.training)
    renamed = {f"{stem(op.path)}{name}": (f"{inner}weight", f"{inner}bias") for name in names}
    after = replace(edit, params_after=param_count(new), renamed=renamed)
    return replace(after, aliases=bench.replace(module, put_in, op.path))
