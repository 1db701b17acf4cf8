"""``merge``: two linear layers in a row become one, in the place of the second; the first becomes an identity.

Computed in float64 and rounded once; `pwrewrite.decompose.affine` has the algebra.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...core.convolution import ConvSpec
from ...core.errors import PlanError, RefusedError
from ...core.plan import Edit, Op
from ...decompose.affine import Affine, NotExact
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
    try:
        merged = merged_layer(Affine.on_meta(before), Affine.on_meta(after)).spec
    except NotExact as error:
        raise PlanError("these layers cannot be merged", where=op.where("layer"), got=str(error)) from None
    first, second = bench.layer(op, path, before, "first"), bench.layer(op, op.path, after)
    weight = second.weight
    new = layer_like(weight, op.path, merged, initialised=False)
    if bench.fill and not (weight.is_meta or first.weight.is_meta):
        fill_layer(new, merged_layer(_numbers(before, first), _numbers(after, second)), op.path)
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


def merged_layer(first: Affine, second: Affine) -> Affine:
    """Two layers as one that a module can be; raises `NotExact` where there is none."""
    if any(layer.spec.transposed or layer.spec.groups != 1 for layer in (first, second)):
        raise NotExact("one of them is transposed or grouped")
    merged = first.then(second)
    if any(left != right for left, right in merged.spec.padding) and any(step != 1 for step in merged.spec.stride):
        raise NotExact("no module has a stride and pads one side more than the other")
    return merged


def fill_layer(new: WeightedModule, merged: Affine, path: str) -> None:
    """Gives a layer its numbers; raises `RefusedError` where they do not fit into its dtype."""
    with torch.no_grad():
        new.weight.copy_(merged.weight)
        if new.bias is not None and merged.bias is not None:
            new.bias.copy_(merged.bias)
    if not all(bool(torch.isfinite(p).all()) for p in new.parameters()):
        raise RefusedError("the merged weight is not finite", where=path, got=f"in {new.weight.dtype}")


def _numbers(spec: ConvSpec, layer: WeightedModule) -> Affine:
    bias = None if layer.bias is None else layer.bias.detach().double()
    return Affine(spec, layer.weight.detach().double(), bias)
