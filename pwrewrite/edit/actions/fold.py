"""``fold``: a batch norm's scale and shift go into the layer beside it, and the norm becomes an identity.

With the side ``weight`` it is a norm of the layer's own weight: weight standardisation (Qiao et al. 2019, Brock et al.
2021) runs ``F.batch_norm`` over the weight before each convolution. In evaluation the result is always the same, so the
layer becomes an ordinary one that holds it. What it computes is read off its own call and tried out at two sizes.
Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.convolution import ConvSpec
from ...core.errors import RefusedError, shortened
from ...core.nested import deep_copy
from ...core.plan import Edit, Op, SkipReason
from ...layers.factorized import make_layer
from ...layers.known import hooked
from ..swap import stem
from .bench import Bench, Refused, WeightedModule, param_count, same_outputs, train_like
from .code_norm import CodeNorm, NormFacts, NormTensors, affine_facts, no_affine
from .evaluation import Watching
from .settings import Count, Number, one_of, wrong

WEIGHT = "weight"  # the side of a norm of the layer's own weight
_BOTH = ("weight", "bias")
_SIZES = ((13, 16), (18, 15))  # sizes at which a layer with a forward of its own is tried out


@dataclass(frozen=True)
class FoldSettings:
    """Settings of ``fold``."""

    layer: str  # path of the layer
    side: Annotated[str, one_of("behind", "before", "weight")]  # where the norm is, seen from the layer
    channels: Count  # of the norm
    spec: ConvSpec  # shape facts of the layer
    keep: tuple[str, ...] = ()  # names of the norm's children that run behind it and stay
    tensors: NormTensors | None = None  # of a norm that is a function call in some code, as the next two
    eps: Number = 0.0
    scope: str | None = None  # path of the module whose code makes the call, which becomes a graph
    affine: bool = False  # whether it is a module whose code computes a scale and a shift in its own way


@dataclass(frozen=True)
class FoldWeightSettings:
    """Settings of a ``fold`` with the side ``weight``."""

    side: str
    spec: ConvSpec
    layer: str = ""
    same: bool = False  # whether the layer's code pads as TensorFlow does
    pads: tuple[int, ...] = ()  # what the layer's code pads its input by, and does nothing else, as ``F.pad`` takes it


def fold_norm(bench: Bench, op: Op, settings: FoldSettings) -> Edit:
    """Carries out a ``fold`` op; a `RefusedError` says that the folded weight does not fit into its dtype."""
    path, spec, keep, code = settings.layer, settings.spec, settings.keep, None
    if settings.tensors is not None:
        code = CodeNorm(bench, op, settings.tensors, settings.eps, settings.scope)
    module = nn.Identity() if code is not None else bench.find(op, op.path)
    norm = NormFacts.of(module) if code is None else code.facts
    layer = bench.same_layer(op, path, spec, "layer")
    width = spec.out_channels if settings.side == "behind" else spec.in_channels
    if settings.affine:
        norm = affine_facts(op, module, width, spec.dims, fill=bench.fill)
    if norm is None or norm.running_mean.numel() != width:
        expected, got = f"a norm of {width} channels with running statistics", str(module if code is None else norm)
        raise wrong(op, "path", "the plan folds a norm that is none here", expected, shortened(got, 80))
    weight, old_bias, outer = layer.weight, layer.bias, stem(path)
    sources = _sources(op, module, norm, code, affine=settings.affine)
    own = (tensor for tensor, _ in sources.values() if isinstance(tensor, nn.Parameter))
    params = param_count(layer) + sum(parameter.numel() for parameter in own)
    fill = bench.fill and not (weight.is_meta or norm.running_mean.is_meta)
    if code is None:
        bench.check_held(op.path, module)
        if not settings.affine:
            _check(op, module, norm, keep, fill)
    if fill:
        new_weight, new_bias = _folded(layer, norm, spec, settings.side)
        if not (torch.isfinite(new_weight).all() and torch.isfinite(new_bias).all()):
            hint = "the layer or the norm's statistics hold NaN or Inf, or are too large for the dtype"
            raise RefusedError("the folded weight is not finite", where=path, got=f"in {weight.dtype}", hint=hint)
    else:
        new_weight, new_bias = weight.detach(), torch.empty(spec.out_channels, dtype=weight.dtype, device=weight.device)
    layer.weight, layer.bias = nn.Parameter(new_weight), nn.Parameter(new_bias)
    old = {"weight": weight, "bias": weight if old_bias is None else old_bias}
    for key in _BOTH:
        train_like(getattr(layer, key), old[key], *(tensor for tensor, into in sources.values() if key in into))
    renamed = {name: tuple(outer + key for key in into) for name, (_, into) in sources.items()}
    if old_bias is None:
        renamed[f"{outer}weight"] = (f"{outer}weight", f"{outer}bias")
    edit = Edit(op, "module", "fold", exact="eval", renamed=renamed, adapted=(path,))
    edit = replace(edit, params_before=params, params_after=param_count(layer))
    if code is not None:
        code.remove()
        return replace(edit, kind="graph", graph_module=code.scope)
    rest = OrderedDict((name, module.get_submodule(name)) for name in keep)
    left: nn.Module = nn.Sequential(rest) if rest else nn.Identity()
    return replace(edit, aliases=bench.replace(module, left.train(module.training), op.path))


def _sources(
    op: Op, module: nn.Module, norm: NormFacts, code: CodeNorm | None, *, affine: bool
) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Full names of what a norm's scale and shift are made of, with the tensors of the layer that these go into."""
    inner = stem(op.path)
    if affine:
        return {inner + name: (parameter, _BOTH) for name, parameter in module.named_parameters()}
    names = {key: inner + key for key in _BOTH} if code is None else code.names
    return {str(names[key]): (tensor, (key,)) for key in _BOTH if (tensor := getattr(norm, key)) is not None}


def _folded(layer: WeightedModule, norm: NormFacts, spec: ConvSpec, side: str) -> tuple[Tensor, Tensor]:
    weight = layer.weight.detach()
    scale, shift = (t.to(weight.device) for t in norm.scale_and_shift())
    wide, ones = weight.double(), (1,) * spec.dims
    bias = wide.new_zeros(spec.out_channels) if layer.bias is None else layer.bias.detach().double()
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


def _check(op: Op, module: nn.Module, norm: NormFacts, keep: tuple[str, ...], fill: bool) -> None:
    """Tries a norm with a forward of its own on a few numbers: whether it is scale, shift and then its children."""
    missing = [name for name in keep if name not in module._modules]
    if missing:
        raise wrong(op, "keep", "the norm has no such child", "a child's name", missing[0])
    stock = type(module).forward is nn.modules.batchnorm._BatchNorm.forward and not keep
    if stock or not fill:
        return
    drawn = torch.randn(2, norm.running_mean.numel(), 2, 2, generator=torch.Generator().manual_seed(0), device="cpu")
    trial = deep_copy(module).eval()

    def expected(x: Tensor) -> Tensor:
        out = norm.apply(x)
        for name in keep:
            out = trial.get_submodule(name)(out)
        return out

    same = same_outputs(trial, expected, [drawn.to(norm.running_mean)])
    if same is None:  # a norm of other dims, or one that takes more than a tensor
        same = isinstance(module, nn.modules.batchnorm._BatchNorm) and not keep
    if not same:
        raise no_affine(op, module)


def fold_weight(bench: Bench, op: Op, settings: FoldWeightSettings) -> Edit:
    """Carries out a ``fold`` op with the side ``weight``."""
    does = f"does more than {'pad' if settings.pads else 'normalise its weight'}"
    layer, refused = own_convolution(bench, op, settings.spec, does)
    spec, before = _padded(settings)
    new = make_layer(spec, same=settings.same, device="meta", dtype=layer.weight.dtype)
    whole = new if before is None else nn.Sequential(before, new)
    fill = bench.fill and not layer.weight.is_meta
    try:
        values = _weight(layer) if fill else torch.empty_like(layer.weight)
    except Exception as error:
        raise refused from error
    weight = nn.Parameter(values, requires_grad=layer.weight.requires_grad)
    new._parameters.update(weight=weight, bias=layer._parameters.get("bias"))
    if fill and not agree(copy.deepcopy(layer).eval(), whole.eval()):
        raise refused
    inner = stem(op.path)
    exact: Literal["eval", "both"] = "both" if settings.pads else "eval"
    edit = Edit(op, "module", "fold", params_before=param_count(layer), params_after=param_count(new), exact=exact)
    aliases = bench.replace(layer, whole.train(layer.training), op.path)
    if before is not None:
        renamed = {f"{inner}{name}": (f"{inner}1.{name}",) for name, _ in layer.named_parameters()}
    else:
        gone = [name for name, _ in layer.named_parameters() if name not in _BOTH]
        renamed = {f"{inner}{name}": (f"{inner}weight",) for name in gone}
    return replace(edit, renamed=renamed, aliases=aliases)


def _padded(settings: FoldWeightSettings) -> tuple[ConvSpec, nn.Module | None]:
    """The facts of the plain layer, and a padding in front of it where it cannot pad so itself."""
    spec, pads = settings.spec, settings.pads
    if not any(pads):
        return spec, None
    if pads[0] != pads[1] or pads[2] != pads[3]:
        return spec, nn.ZeroPad2d((pads[0], pads[1], pads[2], pads[3]))
    sides = tuple((left + more, right + more) for (left, right), more in zip(spec.padding, (pads[2], pads[0])))
    return replace(spec, padding=sides), None


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
    return bool(same_outputs(layer, new, _random_inputs(layer)))


def _random_inputs(layer: nn.Conv2d) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, layer.in_channels, *size, generator=generator, device="cpu").to(layer.weight) for size in _SIZES
    ]
