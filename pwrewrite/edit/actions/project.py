"""``project``: a 1×1 goes behind a branch of a concatenation, and all that reads the branch's channels takes fewer.

With ``init: weights`` the consumers' slices ``W_j``, reshaped to ``(out · k, branch_channels)`` and stacked, are
factorised jointly into ``A · P``, the truncated SVD: the projection gets ``P`` and each consumer its rows of ``A``.
With ``init: fresh`` projection and slices are initialised anew; all other channels keep their weights and statistics.
Consumers and norms are changed in place, so they keep their class, hooks and flags.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ... import decompose
from ...core.convolution import ConvSpec
from ...core.errors import RefusedError
from ...core.operations import OPERATIONS
from ...core.plan import Edit, Op
from ...forms.specs import pointwise_spec
from ...layers.factorized import Factorized, Projected
from ..swap import names_of
from .bench import Bench, WeightedModule, layer_like, param_count, train_like
from .settings import Allowed, Count, Offset, one_of, wrong

CHANNEL_NORMS = tuple(m for row in OPERATIONS if row.name in ("batch_norm", "instance_norm") for m in row.modules)
"""Norms that treat each channel alone, so that some channels can go."""


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the branch's channels: its path and shape facts."""

    path: str
    layer: ConvSpec
    offset: Offset  # its first input channel that comes from the branch
    repeat: Count  # inputs per channel: above 1 behind a flatten

    @property
    def rows(self) -> int:
        """Rows of its slice, one per output, tap and repeated input."""
        return self.layer.out_channels * self.repeat * prod(self.layer.kernel_size)


@dataclass(frozen=True)
class Norm:
    """A norm of the branch's channels on their way to a consumer: its path and width, and its first such channel."""

    path: str
    channels: Count
    offset: Offset


@dataclass(frozen=True)
class OutputWidth:
    """An output of the model that changes its width."""

    output: int
    before: int
    after: int


@dataclass(frozen=True)
class ProjectSettings:
    """Settings of ``project``."""

    channels: Count  # what leaves the projection
    branch_channels: Count  # what the branch makes
    dims: Annotated[int, Allowed(range(4).__contains__, "0 to 3")]
    init: Annotated[str, one_of("weights", "fresh")]  # a joint factorisation of the consumers', or new ones
    consumers: tuple[Consumer, ...] = ()
    norms: tuple[Norm, ...] = ()  # on the way to the consumers
    dtype: str | None = None  # that of the branch's output, for a model without parameters
    outputs: tuple[OutputWidth, ...] = ()  # those that change their width, for the reader
    exact: Annotated[str, one_of("eval", "train", "both")] = "eval"  # in which modes it is so at full width

    @property
    def rows(self) -> int:
        """Rows of all consumers' slices: the largest useful number of channels."""
        return sum(consumer.rows for consumer in self.consumers)


def project_branch(bench: Bench, op: Op, settings: ProjectSettings) -> Edit:
    """Carries out a ``project`` op; a `RefusedError` says that a weight holds NaN or Inf."""
    branch = bench.find(op, op.path)
    bench.check_held(op.path, branch)
    layers, norms = _readers(bench, op, settings)
    weight = _weight_for(bench, op, settings, branch, layers)
    before, after = settings.branch_channels, settings.channels
    projection = layer_like(weight, op.path, pointwise_spec(settings.dims, before, after), initialised=True)
    slices: list[Tensor | None] = [None] * len(layers)
    error = None
    if settings.init == "weights" and bench.fill and not weight.is_meta:
        slices[:], error = _joint_factors(bench, op, settings, layers, projection)
    params_before = param_count(*layers, *norms)
    for consumer, layer, new in zip(settings.consumers, layers, slices, strict=True):
        _narrow_layer(bench, settings, consumer, layer, new)
    for norm, module in zip(settings.norms, norms, strict=True):
        _narrow_norm(module, settings, norm.offset)
    exact = settings.exact if after == min(before, settings.rows) and settings.init == "weights" else None
    params = param_count(*layers, *norms, projection)
    edit = Edit(op, "module", "project", after, after, params_before, params, error, exact)
    inside = [name for name, _ in (*branch.named_parameters(), *branch.named_buffers())]
    renamed: dict[str, tuple[str, ...]] = {f"{op.path}.{name}": (f"{op.path}.branch.{name}",) for name in inside}
    for consumer in settings.consumers:
        renamed[f"{consumer.path}.weight"] = (f"{consumer.path}.weight", f"{op.path}.project.weight")
    projected = Projected(branch, projection)
    projected.training = projection.training = branch.training
    adapted = (*(consumer.path for consumer in settings.consumers), *(norm.path for norm in settings.norms))
    return replace(edit, renamed=renamed, aliases=bench.replace(branch, projected, op.path), adapted=adapted)


def _readers(bench: Bench, op: Op, settings: ProjectSettings) -> tuple[list[WeightedModule], list[nn.Module]]:
    """Layers and norms that read the branch's channels, and of which a projection of this width may be made."""
    layers, norms, width = list[WeightedModule](), list[nn.Module](), settings.branch_channels
    for consumer in settings.consumers:
        layers.append(bench.layer(op, consumer.path, consumer.layer, "consumers"))
        inputs, groups = consumer.layer.in_channels, consumer.layer.groups
        if consumer.offset + width * consumer.repeat > inputs or groups != 1:
            message = f"the branch's channels are not among the inputs of {consumer.path}"
            expected = f"offset + {width} × repeat up to {inputs}, and one group"
            got = f"offset {consumer.offset}, repeat {consumer.repeat}, {groups} groups"
            raise wrong(op, "consumers", message, expected, got)
    for norm in settings.norms:
        norms.append(module := bench.find(op, norm.path, "norms"))
        fits = isinstance(module, CHANNEL_NORMS) and module.num_features == norm.channels
        if not fits or norm.offset + width > norm.channels:
            expected = f"a norm of {norm.channels} channels at {norm.path}"
            raise wrong(op, "norms", "the plan was made for another norm", expected, str(module))
    joint = settings.init == "weights"
    most = min(width, settings.rows) if joint and layers else width
    if settings.channels > most:
        message = "a projection has no more channels than it gets, and than what its readers make of them"
        raise wrong(op, "channels", message, f"an integer from 1 to {most}", str(settings.channels))
    if joint and (norms or not layers):
        message = "a joint factorisation needs consumers that are reached without a norm"
        raise wrong(op, "init", message, "fresh", "weights")
    return layers, norms


def _weight_for(
    bench: Bench, op: Op, settings: ProjectSettings, branch: nn.Module, layers: list[WeightedModule]
) -> Tensor:
    """A weight whose device and dtype the projection takes: of the layers, else of the first module that has one."""
    for weight in (*(layer.weight for layer in layers), *branch.parameters(), *bench.model.parameters()):
        if weight.is_floating_point():
            return weight
    dtype = getattr(torch, str(settings.dtype), None)
    if not isinstance(dtype, torch.dtype):
        raise wrong(op, "dtype", "unknown dtype", "such as float32", str(settings.dtype))
    return torch.zeros((), dtype=dtype, device="cpu")


def _joint_factors(
    bench: Bench, op: Op, settings: ProjectSettings, layers: list[WeightedModule], projection: WeightedModule
) -> tuple[list[Tensor], float]:
    """Fills the projection from the joint factorisation; the consumers' new slices and the relative error."""
    consumers, channels, width = settings.consumers, settings.channels, settings.branch_channels

    def factorise() -> decompose.AxisSplit:
        slices = [_rows(each, layer.weight.detach(), width) for each, layer in zip(consumers, layers)]
        try:
            return decompose.split_spectrum(torch.cat(slices)).truncate(channels)
        except RefusedError as error:
            error.where = ", ".join(consumer.path for consumer in consumers)
            raise

    factors = bench.once(op, factorise)
    with torch.no_grad():
        projection.weight.copy_(factors.first.reshape(projection.weight.shape))
    train_like(projection.weight, *(layer.weight for layer in layers))
    slices = []
    for rows, consumer in zip(torch.split(factors.second, [each.rows for each in consumers]), consumers):
        kernel = rows.reshape(consumer.layer.out_channels, -1, channels).transpose(1, 2)  # the inverse of `_rows`
        slices.append(kernel.reshape(kernel.shape[0], channels * consumer.repeat, *consumer.layer.kernel_size))
    return slices, factors.relative_error


def _rows(consumer: Consumer, weight: Tensor, channels: int) -> Tensor:
    """A consumer's slice as ``(out · k · repeat, channels)``."""
    kernel = decompose.to_forward_layout(weight, 1, consumer.layer.transposed)
    own = kernel[:, consumer.offset : consumer.offset + channels * consumer.repeat]
    return own.reshape(own.shape[0], channels, -1).transpose(1, 2).reshape(-1, channels)


def _narrow_layer(
    bench: Bench, settings: ProjectSettings, consumer: Consumer, layer: WeightedModule, new: Tensor | None
) -> None:
    """Gives a consumer fewer input channels; its slice is ``new``, or fresh where that is None."""
    spec, start, old = consumer.layer, consumer.offset, layer.weight
    old_end, new_end = (start + n * consumer.repeat for n in (settings.branch_channels, settings.channels))
    narrower, axis = replace(spec, in_channels=spec.in_channels + new_end - old_end), 0 if spec.transposed else 1
    smaller = layer_like(old, consumer.path, narrower, initialised=True)
    if not old.is_meta:
        with torch.no_grad():
            source, target = old.movedim(axis, 0), smaller.weight.movedim(axis, 0)
            target[:start].copy_(source[:start])
            target[new_end:].copy_(source[old_end:])
            if new is not None:
                target[start:new_end].copy_(new.movedim(1, 0))
    smaller.weight.requires_grad_(old.requires_grad)
    layer.weight = smaller.weight
    setattr(layer, "in_channels" if spec.dims else "in_features", narrower.in_channels)
    for path in names_of(bench.model, layer):  # an inserted chain says what its first stage takes
        owner, _, name = path.rpartition(".")
        parent = bench.model.get_submodule(owner)
        if isinstance(parent, Factorized) and name == parent.stage_names[0]:
            parent.spec = replace(parent.spec, in_channels=narrower.in_channels)


def _narrow_norm(norm: Any, settings: ProjectSettings, offset: int) -> None:
    """Takes channels out of a norm; those of the projection start anew."""
    c, r = settings.branch_channels, settings.channels
    for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        old = getattr(norm, name, None)
        if old is not None:
            with torch.no_grad():
                new = torch.cat([old[:offset], old.new_full((r,), start), old[offset + c :]])
            is_parameter = isinstance(old, nn.Parameter)
            setattr(norm, name, nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new)
    norm.num_features -= c - r
