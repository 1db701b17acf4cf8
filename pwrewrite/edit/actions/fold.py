"""``fold``: a batch norm's scale and shift go into the layer beside it, and the norm becomes an identity.

With the side ``weight`` it is a norm of the layer's own weight (`pwrewrite.edit.actions.fold_weight`).
Computed in float64 and rounded once.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.convolution import ConvSpec
from ...core.errors import PlanError, RefusedError
from ...core.plan import Edit, Op, Skip, SkipReason
from .bench import Bench, Refused, train_like
from .code_norm import CodeNorm, NormTensors
from .fold_weight import WEIGHT, fold_weight
from .settings import Count, Number, one_of, read


@dataclass(frozen=True)
class FoldSettings:
    """Settings of ``fold``.

    Attributes:
        layer: Path of the layer.
        side: Whether the norm is ``behind`` the layer or ``before`` it.
        channels: Channels of the norm.
        spec: Shape facts of the layer.
        keep: Names of the norm's children that run behind it and stay.
        tensors: For a norm that is a function call in some code: the names of what it reads.
        eps: For such a norm: what it adds to the variance.
        scope: For such a norm: path of the module whose code makes the call, which becomes a graph.
    """

    layer: str
    side: Annotated[str, one_of("behind", "before", WEIGHT)]
    channels: Count
    spec: ConvSpec
    keep: tuple[str, ...] = ()
    tensors: NormTensors | None = None
    eps: Number = 0.0
    scope: str | None = None


def fold_norm(bench: Bench, op: Op) -> Edit:
    """Carries out a ``fold`` op.

    Raises:
        PlanError: If the op makes no sense or was made for another model.
        RefusedError: If the folded weight does not fit into its dtype.
        Refused: If the norm is not one, or the code that calls it cannot become a graph.
    """
    if op.settings.get("side") == WEIGHT:
        return fold_weight(bench, op)
    settings = read(FoldSettings, op)
    path, side, spec, keep = settings.layer, settings.side, settings.spec, settings.keep
    code = None
    if settings.tensors is not None:
        code = CodeNorm(bench, op, settings.tensors, settings.eps, settings.scope)
    norm: Any = bench.find(op, op.path) if code is None else code.norm
    layer = bench.same_layer(op, path, spec, "layer")
    mean = getattr(norm, "running_mean", None)
    width = spec.out_channels if side == "behind" else spec.in_channels
    if not isinstance(mean, Tensor) or mean.numel() != width:
        raise PlanError(
            "the plan folds a norm that is none here",
            where=op.where("path"),
            expected=f"a norm of {width} channels with running statistics",
            got=str(norm)[:80],
        )
    params, weight = _params(layer) + _params(norm), layer.weight
    fill = bench.fill and not (weight.is_meta or mean.is_meta)
    if code is None:
        bench.check_held(op.path, norm)
        _check(op, norm, keep, width, fill)
    if fill:
        new_weight, new_bias = _folded(layer, norm, spec, side)
        if not (torch.isfinite(new_weight).all() and torch.isfinite(new_bias).all()):
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
    layer.weight, layer.bias = nn.Parameter(new_weight), nn.Parameter(new_bias)
    train_like(layer.weight, weight, gain)
    train_like(layer.bias, weight if old_bias is None else old_bias, shift)
    stem = f"{path}." if path else ""
    renamed: dict[str, tuple[str, ...]] = {old: (stem + key,) for key, old in _names(op, norm, code).items()}
    if old_bias is None:
        renamed[f"{stem}weight"] = (f"{stem}weight", f"{stem}bias")
    aliases: tuple[str, ...] = ()
    if code is not None:
        code.remove()
    elif keep:
        rest = nn.Sequential(OrderedDict((name, norm.get_submodule(name)) for name in keep))
        aliases = bench.replace(norm, rest.train(norm.training), op.path)
    else:
        aliases = bench.remove(norm, op.path)
    return Edit(
        op,
        "module" if code is None else "graph",
        "fold",
        params_before=params,
        params_after=_params(layer),
        exact="eval",
        renamed=renamed,
        aliases=aliases,
        adapted=(path,),
        graph_module=None if code is None else code.scope,
    )


def _names(op: Op, norm: Any, code: CodeNorm | None) -> dict[str, str]:
    """``weight`` and ``bias``, where the norm has them, to their full names."""
    if code is not None:
        return {key: name for key, name in code.names.items() if name is not None and key in ("weight", "bias")}
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


def _folded(layer: Any, norm: Any, spec: ConvSpec, side: str) -> tuple[Tensor, Tensor]:
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
    return torch.empty_like(weight).copy_(wide), bias.to(weight.dtype)  # of the same memory format


def _check(op: Op, norm: Any, keep: tuple[str, ...], channels: int, fill: bool) -> None:
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
            output = norm(x.clone())
        same = isinstance(output, Tensor) and torch.allclose(output, wanted, rtol=1e-2, atol=1e-3, equal_nan=True)
    except Exception:  # a norm of other dims, or one that takes more than a tensor
        same = isinstance(norm, nn.modules.batchnorm._BatchNorm) and not keep
    finally:
        for module, training in flags.items():
            module.training = training
    if not same:
        detail = f"{type(norm).__name__} is more than a scale and a shift per channel"
        raise Refused(Skip(op.path, SkipReason.OVERRIDDEN_FORWARD, detail))
