"""``merge``: two linear layers in a row become one, in the place of the second; the first becomes an identity.

Computed in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...core.convolution import ConvSpec
from ...core.errors import PlanError, RefusedError
from ...core.plan import Edit, Op
from .bench import Bench, WeightedModule, layer_like, param_count, train_like


@dataclass(frozen=True)
class MergeSettings:
    """Settings of ``merge``: path and shape facts of the first layer, and shape facts of the second."""

    first: str
    first_layer: ConvSpec
    layer: ConvSpec


def merge_layers(bench: Bench, op: Op, settings: MergeSettings) -> Edit:
    """Carries out a ``merge`` op; a `RefusedError` says that the merged weight does not fit into its dtype."""
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
    names = tuple(f"{op.path}.{name}" for name, _ in new.named_parameters())
    renamed = {}
    for owner, layer, mixed in ((path, first, False), (op.path, second, first.bias is not None)):
        for name, _ in layer.named_parameters():  # the new bias is made of a mixed weight, too
            renamed[f"{owner}.{name}"] = names[-1:] if name == "bias" else names if mixed else names[:1]
    edit = Edit(op, "module", "merge", params_before=param_count(first, second), params_after=merged.params)
    aliases = bench.replace(second, new, op.path)
    bench.remove(first)
    return replace(edit, exact="eval", renamed=renamed, aliases=aliases, adapted=(path,))


def merged_layer(first: ConvSpec, second: ConvSpec) -> ConvSpec | str:
    """The shape facts of two layers as one module, or why there is none."""
    if first.dims != second.dims or first.transposed or second.transposed:
        return "they are of different kinds"
    if first.groups != 1 or second.groups != 1:
        return "one of them is grouped"
    if not (first.is_pointwise or second.is_pointwise):
        return "neither is 1×1"
    bias = first.bias or second.bias
    if second.is_pointwise and not any(map(any, second.padding)):
        stride = tuple(a * b for a, b in zip(first.stride, second.stride))
        merged = replace(first, out_channels=second.out_channels, stride=stride, bias=bias)
    elif not first.is_pointwise or any(map(any, first.padding)) or any(s != 1 for s in first.stride):
        return "the 1×1 has a stride or a padding of its own"
    elif first.bias and second.padding_mode == "zeros" and any(map(any, second.padding)):
        return "the bias of the 1×1 is missing in what the second one pads with"
    else:
        merged = replace(second, in_channels=first.in_channels, bias=bias)
    if any(left != right for left, right in merged.padding) and any(step != 1 for step in merged.stride):
        return "no module has a stride and pads one side more than the other"
    return merged


def _fill(new: WeightedModule, first: WeightedModule, second: WeightedModule, before: ConvSpec, op: Op) -> None:
    """Weight and bias of both layers as one."""
    a, b = first.weight.detach().double(), second.weight.detach().double()
    bias = b.new_zeros(b.shape[0]) if second.bias is None else second.bias.detach().double()
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
