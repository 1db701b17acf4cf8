"""``merge``: two linear layers in a row become one, in the place of the second; the first becomes an identity.

Computed in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.convolution import ConvSpec
from ...core.errors import PlanError, RefusedError
from ...core.plan import Edit, Op
from ...layers.merging import merged_spec
from .bench import Bench, WeightedModule, layer_like, param_count, train_like


@dataclass(frozen=True)
class MergeSettings:
    """Settings of ``merge``.

    Attributes:
        first: Path of the first layer.
        first_layer: Its shape facts.
        layer: Shape facts of the second.
    """

    first: str
    first_layer: ConvSpec
    layer: ConvSpec


def merge_layers(bench: Bench, op: Op, settings: MergeSettings) -> Edit:
    """Carries out a ``merge`` op.

    Raises:
        PlanError: If the op makes no sense or was made for another model.
        RefusedError: If the merged weight does not fit into its dtype.
        Refused: If a layer must stay as it is.
    """
    path, before, after = settings.first, settings.first_layer, settings.layer
    merged = merged_layer(before, after)
    if isinstance(merged, str) or before.out_channels != after.in_channels:
        raise PlanError("these layers cannot be merged", where=op.where("layer"), got=str(merged))
    first, second = bench.layer(op, path, before, "first"), bench.layer(op, op.path, after)
    weight = second.weight
    new = layer_like(weight, op.path, merged, initialised=False)
    if bench.fill and not (weight.is_meta or first.weight.is_meta):
        _fill(new, first, second, before, op)
    train_like(new.weight, first.weight, weight)
    if new.bias is not None:
        train_like(new.bias, first.bias, second.bias, None if first.bias is None else weight)
    new.train(second.training)
    mixed = {path: False, op.path: first.bias is not None}  # whose weight the new bias is made of
    names = tuple(f"{op.path}.{name}" for name, _ in new.named_parameters())
    old = [(owner, name) for owner, layer in ((path, first), (op.path, second)) for name, _ in layer.named_parameters()]
    aliases = bench.replace(second, new, op.path)
    bench.remove(first)
    return Edit(
        op,
        "module",
        "merge",
        params_before=param_count(first, second),
        params_after=merged.params,
        exact="eval",
        renamed={
            f"{owner}.{name}": names[-1:] if name == "bias" else names if mixed[owner] else names[:1]
            for owner, name in old
        },
        aliases=aliases,
        adapted=(path,),
    )


def merged_layer(first: ConvSpec, second: ConvSpec) -> ConvSpec | str:
    """The shape facts of two layers as one module, or why there is none."""
    merged = merged_spec(first, second)
    if isinstance(merged, str):
        return merged
    uneven = any(left != right for left, right in merged.padding)
    if uneven and any(step != 1 for step in merged.stride):
        return "no module has a stride and pads one side more than the other"
    return merged


def _fill(new: WeightedModule, first: WeightedModule, second: WeightedModule, before: ConvSpec, op: Op) -> None:
    """Weight and bias of both layers as one.

    Raises:
        RefusedError: If they are not finite.
    """
    a, b = first.weight.detach().double(), second.weight.detach().double()
    bias = torch.zeros(b.shape[0], dtype=torch.float64, device=b.device)
    if second.bias is not None:
        bias = bias + second.bias.detach().double()
    if first.bias is not None:
        bias = bias + b.reshape(*b.shape[:2], -1).sum(2) @ first.bias.detach().double()
    if before.is_pointwise:
        product = torch.einsum("ock,ci->oik", b.reshape(*b.shape[:2], -1), a.flatten(1))
    else:
        product = torch.einsum("oc,cik->oik", b.flatten(1), a.flatten(2))
    with torch.no_grad():
        new.weight.copy_(product.reshape(new.weight.shape))
        if new.bias is not None:
            new.bias.copy_(bias)
    if not all(bool(torch.isfinite(p).all()) for p in new.parameters()):
        raise RefusedError("the merged weight is not finite", where=op.path, got=f"in {new.weight.dtype}")
