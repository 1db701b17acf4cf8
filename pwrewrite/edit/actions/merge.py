"""``merge``: two linear layers in a row become one, in the place of the second; the first becomes an identity.

Settings: ``first`` (path of the first layer), ``first_layer`` and ``layer`` (shape facts of both).

Computed in float64 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...core.convolution import ConvSpec
from ...core.errors import PlanError, RefusedError
from ...core.plan import Edit, Op
from ...forms.specs import spec_from_dict
from ...layers.factorized import make_layer
from ...layers.merging import merged_spec
from .bench import Bench, make_like, train_like


def merge_layers(bench: Bench, op: Op) -> Edit:
    """Carries out a ``merge`` op.

    Raises:
        PlanError: If the op makes no sense or was made for another model.
        RefusedError: If the merged weight does not fit into its dtype.
        Refused: If a layer must stay as it is.
    """
    path = op.settings.get("first")
    if not isinstance(path, str):
        raise PlanError("first is no path", where=op.where("first"), expected="a string", got=repr(path))
    before = spec_from_dict(op.settings.get("first_layer"), op.where("first_layer"))
    after = spec_from_dict(op.settings.get("layer"), op.where("layer"))
    merged = merged_layer(before, after)
    if isinstance(merged, str) or before.out_channels != after.in_channels:
        raise PlanError("these layers cannot be merged", where=op.where("layer"), got=str(merged))
    first, second = bench.layer(op, path, before, "first"), bench.layer(op, op.path, after)
    params = sum(p.numel() for layer in (first, second) for p in layer.parameters())
    weight = second.weight

    def make(device: Any) -> nn.Module:
        return make_layer(merged, device=device, dtype=weight.dtype)

    new: Any = make_like(weight, op.path, make, initialised=False)
    if bench.fill and not (weight.is_meta or first.weight.is_meta):
        _fill(new, first, second, before, op)
    train_like(new.weight, first.weight, weight)
    if new.bias is not None:
        train_like(new.bias, first.bias, second.bias, None if first.bias is None else weight)
    new.train(second.training)
    identity = nn.Identity()
    identity.train(first.training)
    names = bench.names_of(second)
    bench.replace(second, new)
    bench.replace(first, identity)
    mixed = {path: False, op.path: first.bias is not None}  # whose weight the new bias is made of
    made = tuple(f"{op.path}.{name}" for name, _ in new.named_parameters())
    old = [(owner, name) for owner, layer in ((path, first), (op.path, second)) for name, _ in layer.named_parameters()]
    return Edit(
        op=op,
        kind="module",
        method="merge",
        rank_in=None,
        rank_out=None,
        params_before=params,
        params_after=merged.params,
        relative_error=None,
        exact="eval",
        renamed={
            f"{owner}.{name}": made[-1:] if name == "bias" else made if mixed[owner] else made[:1]
            for owner, name in old
        },
        aliases=tuple(name for name in names if name != op.path),
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


def _fill(new: Any, first: Any, second: Any, before: ConvSpec, op: Op) -> None:
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
