"""``fold``: a batch norm's scale and shift go into the layer beside it, and the norm becomes an identity.

Settings: ``layer`` (path of the layer), ``side`` (``behind``: the norm is behind the layer; ``before``), ``channels``,
``spec`` (the layer's shape facts), and ``keep``: names of the norm's children that run behind it and stay. A norm that
is a function call in some code has ``tensors`` (the names of what it reads), ``eps`` and ``scope`` (the module whose
code makes the call, which becomes a graph). With the side ``weight`` it is a norm of the layer's own weight
(`pwrewrite.edit.actions.fold_weight`).

Computed in float64 and rounded once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import PlanError, RefusedError
from ...core.plan import Edit, Op, Skip, SkipReason
from ...forms.specs import spec_from_dict
from .bench import Bench, Refused, brief, spec_of_module, train_like
from .code_norm import CodeNorm
from .fold_weight import WEIGHT, fold_weight


def fold_norm(bench: Bench, op: Op) -> Edit:
    """Carries out a ``fold`` op.

    Raises:
        PlanError: If the op makes no sense or was made for another model.
        RefusedError: If the folded weight does not fit into its dtype.
        Refused: If the norm is not one, or the code that calls it cannot become a graph.
    """
    settings = op.settings
    side, path, keep = settings.get("side"), settings.get("layer"), settings.get("keep", [])
    if side == WEIGHT:
        return fold_weight(bench, op)
    if side not in ("behind", "before"):
        raise PlanError("unknown side", where=op.where("side"), expected="behind, before or weight", got=repr(side))
    if not isinstance(path, str) or not isinstance(keep, list):
        raise PlanError("not a fold", where=op.where("layer"), expected="a path", got=repr(path))
    code = CodeNorm(bench, op) if "tensors" in settings else None
    norm: Any = bench.find(op, op.path) if code is None else code.norm
    layer: Any = bench.find(op, path, "layer")
    spec, found = spec_from_dict(settings.get("spec"), op.where("spec")), spec_of_module(layer)
    if found != spec:
        got = brief(found) if found is not None else type(layer).__name__
        raise PlanError("the plan was made for another layer", where=op.where("spec"), expected=brief(spec), got=got)
    mean = getattr(norm, "running_mean", None)
    width = spec.out_channels if side == "behind" else spec.in_channels
    if not isinstance(mean, Tensor) or mean.numel() != width or not all(isinstance(n, str) for n in keep):
        raise PlanError(
            "the plan folds a norm that is none here",
            where=op.where("path"),
            expected=f"a norm of {width} channels with running statistics",
            got=str(norm)[:80],
        )
    bench.check_held(path, layer)
    if code is None:
        bench.check_held(op.path, norm)
    params = _params(layer) + _params(norm)
    weight = layer.weight
    fill = bench.fill and not (weight.is_meta or mean.is_meta)
    if code is None:
        _check(op, norm, keep, width, fill)
    had_bias = layer.bias is not None
    if fill:
        new_weight, new_bias = _folded(layer, norm, spec, side)
        for tensor in (new_weight, new_bias):
            if not torch.isfinite(tensor).all():
                raise RefusedError(
                    "the folded weight is not finite",
                    where=path,
                    got=f"in {weight.dtype}",
                    hint="the layer or the norm's statistics hold NaN or Inf, or are too large for the dtype",
                )
    else:
        new_weight, new_bias = weight.detach(), torch.empty(spec.out_channels, dtype=weight.dtype, device=weight.device)
    gain, shift = (getattr(norm, name, None) for name in ("weight", "bias"))
    old_bias = layer.bias
    with torch.no_grad():
        layer.weight, layer.bias = nn.Parameter(new_weight), nn.Parameter(new_bias)
    train_like(layer.weight, weight, gain)
    train_like(layer.bias, old_bias if had_bias else weight, shift)
    stem = f"{path}." if path else ""
    bias = f"{stem}bias"
    renamed = {old: (stem + key,) for key, old in _names(op, norm, code).items()}
    names: tuple[str, ...] = ()
    if code is not None:
        code.remove()
    else:
        names = bench.names_of(norm)
        bench.replace(norm, _rest(norm, keep))
    return Edit(
        op=op,
        kind="module" if code is None else "graph",
        method="fold",
        rank_in=None,
        rank_out=None,
        params_before=params,
        params_after=_params(layer),
        relative_error=None,
        exact="eval",
        renamed=renamed | ({} if had_bias else {f"{stem}weight": (f"{stem}weight", bias)}),
        aliases=tuple(name for name in names if name != op.path),
        adapted=(path,),
        graph_module=None if code is None else code.scope,
    )


def _rest(norm: nn.Module, keep: list[str]) -> nn.Module:
    """What stays of a norm module."""
    children = OrderedDict((name, norm._modules[name]) for name in keep)
    rest: nn.Module = nn.Sequential(children) if keep else nn.Identity()  # type: ignore[arg-type]
    rest.train(norm.training)
    return rest


def _names(op: Op, norm: Any, code: CodeNorm | None) -> dict[str, str]:
    """``weight`` and ``bias``, where the norm has them, to their full names."""
    if code is not None:
        return {key: name for key in ("weight", "bias") if (name := code.names[key]) is not None}
    inner = f"{op.path}." if op.path else ""
    return {key: inner + key for key in ("weight", "bias") if getattr(norm, key) is not None}


def _params(module: Any) -> int:
    """Parameters of a layer or a norm."""
    own = (getattr(module, "weight", None), getattr(module, "bias", None))
    return sum(p.numel() for p in own if isinstance(p, nn.Parameter))


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """A norm as one scale and one shift per channel, in float64."""
    mean, var = norm.running_mean.detach().double(), norm.running_var.detach().double()
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = torch.rsqrt(var + norm.eps)
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias.detach().double()


def _folded(layer: Any, norm: Any, spec: Any, side: str) -> tuple[Tensor, Tensor]:
    """The layer's new weight and bias."""
    weight = layer.weight.detach()
    scale, shift = (t.to(weight.device) for t in scale_and_shift(norm))
    wide = weight.double()
    bias = torch.zeros(spec.out_channels, dtype=torch.float64, device=weight.device)
    if layer.bias is not None:
        bias = layer.bias.detach().double()
    ones = (1,) * spec.dims
    if side == "behind":
        if spec.transposed:  # (in, out/groups, *k): the group is in the first axis
            per_group = scale.view(spec.groups, 1, -1, *ones)
            wide = (wide.view(spec.groups, -1, *wide.shape[1:]) * per_group).view(wide.shape)
        else:
            wide = wide * scale.view(-1, 1, *ones)
        bias = bias * scale + shift
    else:  # (out, in/groups, *k): an output channel sees the inputs of its group
        inputs = spec.in_channels // spec.groups
        row = torch.arange(spec.out_channels, device=weight.device) // (spec.out_channels // spec.groups)
        seen = row[:, None] * inputs + torch.arange(inputs, device=weight.device)
        bias = bias + (wide * shift[seen].view(-1, inputs, *ones)).flatten(1).sum(1)
        wide = wide * scale[seen].view(-1, inputs, *ones)
    return _like(wide, weight), bias.to(weight.dtype)


def _like(values: Tensor, weight: Tensor) -> Tensor:
    """Values in a weight's dtype and memory format."""
    return torch.empty_like(weight).copy_(values)


def _check(op: Op, norm: Any, keep: list[str], channels: int, fill: bool) -> None:
    """Tries a norm with a forward of its own on a few numbers.

    Raises:
        PlanError: If it has no such children.
        Refused: If it is not scale, shift and then its children.
    """
    missing = [name for name in keep if name not in norm._modules]
    if missing:
        raise PlanError("the norm has no such child", where=op.where("keep"), expected="a child's name", got=missing[0])
    stock = type(norm).forward is nn.modules.batchnorm._BatchNorm.forward and not keep
    if stock or not fill:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 2, 2, generator=generator).to(norm.running_mean.device, norm.running_mean.dtype)
    flags = {module: module.training for module in norm.modules()}
    try:
        norm.eval()
        with torch.no_grad():
            weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
            wanted = F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, False, 0.0, norm.eps)
            for name in keep:
                wanted = norm._modules[name](wanted)
            found = norm(x.clone())
        same = isinstance(found, Tensor) and torch.allclose(found, wanted, rtol=1e-2, atol=1e-3, equal_nan=True)
    except Exception:  # a norm of other dims, or one that takes more than a tensor
        same = isinstance(norm, nn.modules.batchnorm._BatchNorm) and not keep
    finally:
        for module, training in flags.items():
            module.training = training
    if not same:
        detail = f"{type(norm).__name__} is more than a scale and a shift per channel"
        raise Refused(Skip(op.path, SkipReason.OVERRIDDEN_FORWARD, detail))
