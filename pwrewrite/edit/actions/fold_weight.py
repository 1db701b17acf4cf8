"""``fold`` of a norm of a weight: a convolution that normalises its weight in each call keeps the normalised one.

Weight standardisation (Qiao et al. 2019, Brock et al. 2021) runs ``F.batch_norm`` over the weight before each
convolution. In evaluation the result is always the same, so the layer becomes an ordinary one that holds it: a stock
``nn.Conv2d``, or `SamePadded` where its code pads as TensorFlow does. What it computes is read off its own call, in
float64, and tried out at two sizes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.convolution import ConvSpec
from ...core.plan import Edit, Op, SkipReason
from ...layers.factorized import make_layer
from ...layers.known import hooked
from ..swap import stem
from .bench import Bench, Refused, param_count
from .evaluation import Watching

WEIGHT = "weight"
"""The side of such an op."""

_SIZES = ((13, 16), (18, 15))


@dataclass(frozen=True)
class FoldWeightSettings:
    """Settings of a ``fold`` with the side ``weight``.

    Attributes:
        side: ``weight``.
        spec: The layer's shape facts.
        layer: Its path.
        same: Whether its code pads as TensorFlow does.
    """

    side: str
    spec: ConvSpec
    layer: str = ""
    same: bool = False


def fold_weight(bench: Bench, op: Op, settings: FoldWeightSettings) -> Edit:
    """Carries out a ``fold`` op with the side ``weight``."""
    layer, refused = own_convolution(bench, op, settings.spec, "does more than normalise its weight")
    new = make_layer(settings.spec, same=settings.same, device="meta", dtype=layer.weight.dtype)
    fill = bench.fill and not layer.weight.is_meta
    try:
        values = _weight(layer) if fill else torch.empty_like(layer.weight)
    except Exception as error:
        raise refused from error
    weight = nn.Parameter(values, requires_grad=layer.weight.requires_grad)
    new._parameters.update(weight=weight, bias=layer._parameters.get("bias"))
    if fill and not agree(copy.deepcopy(layer).eval(), new.eval()):
        raise refused
    inner = stem(op.path)
    gone = [name for name, _ in layer.named_parameters() if name not in ("weight", "bias")]
    edit = Edit(op, "module", "fold", params_before=param_count(layer), params_after=param_count(new), exact="eval")
    aliases = bench.replace(layer, new.train(layer.training), op.path)
    return replace(edit, renamed={f"{inner}{name}": (f"{inner}weight",) for name in gone}, aliases=aliases)


def own_convolution(bench: Bench, op: Op, spec: ConvSpec, does: str) -> tuple[nn.Conv2d, Refused]:
    """A 2-D convolution with a forward of its own, and what to raise where that does something else."""
    layer: nn.Module = bench.same_layer(op, op.path, spec)
    detail = f"{type(layer).__qualname__} has a forward of its own that {does}"
    refused = Refused(op.path, SkipReason.OVERRIDDEN_FORWARD, detail)
    if not isinstance(layer, nn.Conv2d) or hooked(layer) or layer._parameters.get("weight") is None:
        raise refused
    return layer, refused


def _weight(layer: nn.Conv2d) -> Tensor:
    """The weight that a layer calls its convolution with; raises if it is not one of its shape, always the same."""
    wide, weights = copy.deepcopy(layer).double().eval(), list[Tensor]()

    def keep(function: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if function is F.conv2d:
            weights.append(args[1] if len(args) > 1 else kwargs["weight"])

    with torch.no_grad(), Watching(keep):
        for x in _random_inputs(wide):
            wide(x)
    first, second = weights
    if first.shape != layer.weight.shape or not torch.equal(first, second):
        raise ValueError("not one convolution with always the same weight")
    return torch.empty_like(layer.weight).copy_(first)


def agree(layer: nn.Conv2d, new: nn.Module) -> bool:
    """Whether a layer, whose code may fail, and another module give the same at two sizes."""
    try:
        with torch.no_grad():
            pairs = [(layer(x), new(x)) for x in _random_inputs(layer)]
        return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in pairs)
    except Exception:
        return False


def _random_inputs(layer: nn.Conv2d) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, layer.in_channels, *size, generator=generator).to(layer.weight) for size in _SIZES]
