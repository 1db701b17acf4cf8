"""``fold`` of a norm of a weight: a convolution that normalises its weight in each call keeps the normalised one.

Weight standardisation (Qiao et al. 2019, Brock et al. 2021) runs ``F.batch_norm`` over the weight before each
convolution. In evaluation the result is always the same, so the layer becomes an ordinary one that holds it: a stock
``nn.Conv2d``, or `SamePadded` where its code pads as TensorFlow does. What it computes is read off its own call, in
float64, and tried out at two sizes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...core.convolution import ConvSpec
from ...core.errors import PlanError
from ...core.plan import Edit, Op, Skip, SkipReason
from ...forms.specs import spec_from_dict
from ...layers.factorized import make_layer
from ...layers.known import hooked
from .bench import Bench, Refused, brief, spec_of_module

WEIGHT = "weight"
"""The side of such an op."""

_SIZES = ((13, 16), (18, 15))


class SamePadded(nn.Conv2d):
    """A convolution with TensorFlow's ``SAME`` padding, worked out from each input's size."""

    def forward(self, x: Tensor) -> Tensor:
        """Pads, then convolves."""
        pads: list[int] = []
        for i in (1, 0):
            size, step = x.shape[i - 2], self.stride[i]
            total = max((-(-size // step) - 1) * step + self.dilation[i] * (self.kernel_size[i] - 1) + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class _Seen(TorchFunctionMode):
    """Keeps the weights that convolutions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d:
            self.weights.append(args[1] if len(args) > 1 else (kwargs or {}).get("weight"))
        return func(*args, **(kwargs or {}))


def fold_weight(bench: Bench, op: Op) -> Edit:
    """Carries out a ``fold`` op with the side ``weight``.

    Raises:
        PlanError: If the op makes no sense or was made for another model.
        Refused: If the layer's code does something else.
    """
    spec = spec_from_dict(op.settings.get("spec"), op.where("spec"))
    same = op.settings.get("same") is True
    layer: Any = bench.find(op, op.path)
    found = spec_of_module(layer)
    if not isinstance(layer, nn.Conv2d) or found != spec:
        got = brief(found) if found is not None else type(layer).__name__
        raise PlanError("the plan was made for another layer", where=op.where("spec"), expected=brief(spec), got=got)
    bench.check_held(op.path, layer)
    if hooked(layer) or layer._parameters.get("weight") is None:
        raise _refused(op, layer)
    new = _empty(layer, spec, same)
    values = _weight(op, layer) if bench.fill and not layer.weight.is_meta else torch.empty_like(layer.weight)
    with torch.no_grad():
        new.weight = nn.Parameter(values, requires_grad=layer.weight.requires_grad)
        new._parameters["bias"] = layer._parameters.get("bias")
    new.train(layer.training)
    if bench.fill and not layer.weight.is_meta:
        _compare(op, layer, new)
    names = bench.names_of(layer)
    bench.replace(layer, new)
    gone = [name for name, _ in layer.named_parameters() if name not in ("weight", "bias")]
    inner = f"{op.path}." if op.path else ""
    return Edit(
        op=op,
        kind="module",
        method="fold",
        rank_in=None,
        rank_out=None,
        params_before=sum(p.numel() for p in layer.parameters()),
        params_after=sum(p.numel() for p in new.parameters()),
        relative_error=None,
        exact="eval",
        renamed={f"{inner}{name}": (f"{inner}weight",) for name in gone},
        aliases=tuple(name for name in names if name != op.path),
    )


def _refused(op: Op, layer: nn.Module) -> Refused:
    detail = f"{type(layer).__qualname__} has a forward of its own that does more than normalise its weight"
    return Refused(Skip(op.path, SkipReason.OVERRIDDEN_FORWARD, detail))


def _empty(layer: nn.Conv2d, spec: ConvSpec, same: bool) -> Any:
    """The layer to come, without values."""
    if not same:
        return make_layer(spec, device="meta", dtype=layer.weight.dtype)
    facts = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, 0, layer.dilation, layer.groups)
    return SamePadded(*facts, bias=layer.bias is not None, device="meta", dtype=layer.weight.dtype)  # type: ignore[arg-type]


def _inputs(layer: nn.Conv2d) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, layer.in_channels, *size, generator=generator).to(layer.weight) for size in _SIZES]


def _weight(op: Op, layer: nn.Conv2d) -> Tensor:
    """The weight that a layer calls its convolution with."""
    wide = copy.deepcopy(layer).double().eval()
    seen = _Seen()
    try:
        with torch.no_grad(), seen:
            for x in _inputs(wide):
                wide(x)
    except Exception as error:
        raise _refused(op, layer) from error
    if len(seen.weights) != len(_SIZES) or not all(isinstance(w, Tensor) for w in seen.weights):
        raise _refused(op, layer)
    first, second = seen.weights
    if first.shape != layer.weight.shape or not torch.equal(first, second):
        raise _refused(op, layer)
    return torch.empty_like(layer.weight).copy_(first)


def _compare(op: Op, layer: nn.Conv2d, new: nn.Module) -> None:
    training = layer.training
    try:
        with torch.no_grad():
            pairs = [(layer.eval()(x), new(x)) for x in _inputs(layer)]
    except Exception as error:
        raise _refused(op, layer) from error
    finally:
        layer.training = training
    if any(a.shape != b.shape or not torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in pairs):
        raise _refused(op, layer)
