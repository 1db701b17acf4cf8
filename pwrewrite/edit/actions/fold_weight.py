"""``fold`` of a norm of a weight: a convolution that normalises its weight in each call keeps the normalised one.

Weight standardisation (Qiao et al. 2019, Brock et al. 2021) runs ``F.batch_norm`` over the weight before each
convolution. In evaluation the result is always the same, so the layer becomes an ordinary one that holds it: a stock
``nn.Conv2d``, or `SamePadded` where its code pads as TensorFlow does. What it computes is read off its own call, in
float64, and tried out at two sizes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...core.convolution import ConvSpec
from ...core.plan import Edit, Op, Skip, SkipReason
from ...layers.factorized import make_layer
from ...layers.known import hooked
from ...layers.unfused import SamePadded
from .bench import Bench, Refused, param_count

WEIGHT = "weight"
"""The side of such an op."""

_DOES_MORE = "has a forward of its own that does more than normalise its weight"
_SIZES = ((13, 16), (18, 15))


class _ConvolutionWeights(TorchFunctionMode):
    """Keeps the weights that convolutions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d:
            self.weights.append(args[1] if len(args) > 1 else (kwargs or {}).get("weight"))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class FoldWeightSettings:
    """Settings of a ``fold`` with the side ``weight``.

    Attributes:
        side: ``weight``.
        layer: Path of the layer.
        spec: Its shape facts.
        same: Whether its code pads as TensorFlow does.
    """

    side: str
    spec: ConvSpec
    layer: str = ""
    same: bool = False


def fold_weight(bench: Bench, op: Op, settings: FoldWeightSettings) -> Edit:
    """Carries out a ``fold`` op with the side ``weight``.

    Raises:
        PlanError: If the op makes no sense or was made for another model.
        Refused: If the layer's code does something else.
    """
    layer = bench.same_layer(op, op.path, settings.spec)
    refused = Refused(Skip(op.path, SkipReason.OVERRIDDEN_FORWARD, f"{type(layer).__qualname__} {_DOES_MORE}"))
    if not isinstance(layer, nn.Conv2d) or hooked(layer) or layer._parameters.get("weight") is None:
        raise refused
    new = _empty(layer, settings.spec, settings.same)
    fill = bench.fill and not layer.weight.is_meta
    try:
        values = _weight(layer) if fill else torch.empty_like(layer.weight)
        new.weight = nn.Parameter(values, requires_grad=layer.weight.requires_grad)
        new._parameters["bias"] = layer._parameters.get("bias")
        new.train(layer.training)
        same = not fill or _agree(layer, new)
    except Exception as error:
        raise refused from error
    if not same:
        raise refused
    inner = f"{op.path}." if op.path else ""
    gone = [name for name, _ in layer.named_parameters() if name not in ("weight", "bias")]
    return Edit(
        op,
        "module",
        "fold",
        params_before=param_count(layer),
        params_after=param_count(new),
        exact="eval",
        renamed={f"{inner}{name}": (f"{inner}weight",) for name in gone},
        aliases=bench.replace(layer, new, op.path),
    )


def _empty(layer: nn.Conv2d, spec: ConvSpec, same: bool) -> Any:
    """The layer to come, without values."""
    if not same:
        return make_layer(spec, device="meta", dtype=layer.weight.dtype)
    facts = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, 0, layer.dilation, layer.groups)
    return SamePadded(*facts, bias=layer.bias is not None, device="meta", dtype=layer.weight.dtype)  # type: ignore[arg-type]


def _weight(layer: nn.Conv2d) -> Tensor:
    """The weight that a layer calls its convolution with.

    Raises:
        ValueError: If it is not one of the layer's shape, always the same.
    """
    wide, calls = copy.deepcopy(layer).double().eval(), _ConvolutionWeights()
    with torch.no_grad(), calls:
        for x in random_inputs(wide):
            wide(x)
    first, *others = calls.weights
    if len(others) + 1 != len(_SIZES) or first.shape != layer.weight.shape or not torch.equal(first, others[0]):
        raise ValueError("not one convolution with always the same weight")
    return torch.empty_like(layer.weight).copy_(first)


def _agree(layer: nn.Conv2d, new: nn.Module) -> bool:
    """Whether two layers give the same in evaluation."""
    training = layer.training
    try:
        with torch.no_grad():
            pairs = [(layer.eval()(x), new(x)) for x in random_inputs(layer)]
    finally:
        layer.training = training
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in pairs)


def random_inputs(layer: nn.Conv2d) -> list[Tensor]:
    """Inputs of two sizes, on which the code of a layer is tried out."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, layer.in_channels, *size, generator=generator).to(layer.weight) for size in _SIZES]
