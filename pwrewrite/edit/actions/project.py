"""``project``: a 1×1 goes behind a branch of a concatenation, and all that reads the branch's channels takes fewer.

Settings: ``channels`` (that leave the projection), ``branch_channels`` (that the branch makes), ``dims`` (spatial
dims), ``init``; ``consumers``, each with ``path``, ``layer`` (its shape facts), ``offset`` (its first input channel
that comes from the branch) and ``repeat`` (inputs per channel: above 1 behind a flatten); ``norms``, each with
``path``, ``channels`` and ``offset``. ``dtype`` is that of the branch's output, for a model without parameters.
``outputs`` says which outputs change their width, for the reader.

With ``init: weights`` the consumers' slices ``W_j``, reshaped to ``(out · k, branch_channels)`` and stacked, are
factorised jointly into ``A · P``, the truncated SVD: the projection gets ``P`` and each consumer its rows of ``A``.
With ``init: fresh`` projection and slices are initialised anew; all other channels keep their weights and statistics.

Consumers and norms are changed in place, so they keep their class, hooks and flags.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ... import decompose
from ...core.convolution import ConvSpec
from ...core.errors import PlanError, RefusedError
from ...core.plan import Edit, Op
from ...forms.specs import pointwise_spec, spec_from_dict
from ...layers.factorized import Factorized, Projected, make_layer
from .bench import Bench, make_like

CHANNEL_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
"""Norms that treat each channel alone, so that some channels can go."""


@dataclass(frozen=True)
class _Consumer:
    """A layer that reads the branch's channels."""

    path: str
    layer: Any
    spec: ConvSpec
    offset: int
    repeat: int


@dataclass(frozen=True)
class _Request:
    """The settings of an op, checked."""

    channels: int
    branch_channels: int
    dims: int
    fresh: bool
    consumers: tuple[_Consumer, ...]
    norms: tuple[tuple[str, Any, int], ...]


def project_branch(bench: Bench, op: Op) -> Edit:
    """Carries out a ``project`` op.

    Raises:
        PlanError: If the op makes no sense or was made for another model.
        RefusedError: If a weight holds NaN or Inf.
        Refused: If the branch or a consumer must stay as it is.
    """
    branch = bench.find(op, op.path)
    bench.check_held(op.path, branch)
    request = _read(bench, op)
    weight = _weight_for(op, request, branch, bench.model)
    dims, before, after = request.dims, request.branch_channels, request.channels

    def make(device: Any) -> nn.Module:
        return make_layer(pointwise_spec(dims, before, after), device=device, dtype=weight.dtype)

    projection: Any = make_like(weight, op.path, make, initialised=True)
    fill = bench.fill and not weight.is_meta
    slices, error = _joint(bench, op, request, projection) if fill and not request.fresh else ([], None)
    params_before = sum(_params(layer) for layer in _changed(request))
    for i, consumer in enumerate(request.consumers):
        _narrow_layer(consumer, request, slices[i] if slices else None)
        _tell_parent(bench, consumer, request)
    for _, norm, offset in request.norms:
        _narrow_norm(norm, request, offset)
    full = after == min(before, sum(_row_count(consumer) for consumer in request.consumers))
    paths = bench.names_of(branch)
    inside = [name for name, _ in (*branch.named_parameters(), *branch.named_buffers())]
    projected = Projected(branch, before, after, dims, device="meta")
    projected.project = projection
    projected.training = projection.training = branch.training
    bench.replace(branch, projected)
    weights: dict[str, tuple[str, ...]] = {
        f"{c.path}.weight": (f"{c.path}.weight", f"{op.path}.project.weight") for c in request.consumers
    }
    return Edit(
        op=op,
        kind="module",
        method="project",
        rank_in=after,
        rank_out=after,
        params_before=params_before,
        params_after=sum(_params(layer) for layer in (*_changed(request), projection)),
        relative_error=error,
        exact=str(op.settings.get("exact", "eval")) if full and not request.fresh else None,
        renamed={**{f"{op.path}.{name}": (f"{op.path}.branch.{name}",) for name in inside}, **weights},
        aliases=tuple(path for path in paths if path != op.path),
        adapted=tuple(c.path for c in request.consumers) + tuple(path for path, _, _ in request.norms),
    )


# --------------------------------------------------------------------------------------------------- settings


def _read(bench: Bench, op: Op) -> _Request:
    settings = op.settings
    channels, before = _count(op, settings, "channels"), _count(op, settings, "branch_channels")
    if channels > before:
        raise PlanError(
            "a projection makes no more channels than it gets",
            where=op.where("channels"),
            expected=f"an integer from 1 to {before}",
            got=str(channels),
        )
    dims, init = settings.get("dims"), settings.get("init")
    if type(dims) is not int or not 0 <= dims <= 3:
        raise PlanError("not a number of spatial dims", where=op.where("dims"), expected="0 to 3", got=repr(dims))
    if init not in ("weights", "fresh"):
        raise PlanError("unknown init", where=op.where("init"), expected="one of weights, fresh", got=repr(init))
    consumers, norms = [], []
    for entry in _entries(op, "consumers"):
        spec = spec_from_dict(entry.get("layer"), op.where("consumers"))
        path, offset, repeat = _path(op, entry), _count(op, entry, "offset", 0), _count(op, entry, "repeat")
        layer = bench.layer(op, path, spec, "consumers")
        if offset + before * repeat > spec.in_channels or spec.groups != 1:
            raise PlanError(
                f"the branch's channels are not among the inputs of {path}",
                where=op.where("consumers"),
                expected=f"offset + {before} × repeat up to {spec.in_channels}, and one group",
                got=f"offset {offset}, repeat {repeat}, {spec.groups} groups",
            )
        consumers.append(_Consumer(path, layer, spec, offset, repeat))
    for entry in _entries(op, "norms"):
        path, offset, count = _path(op, entry), _count(op, entry, "offset", 0), _count(op, entry, "channels")
        norm: Any = bench.find(op, path, "norms")
        if not isinstance(norm, CHANNEL_NORMS) or norm.num_features != count or offset + before > count:
            raise PlanError(
                "the plan was made for another norm",
                where=op.where("norms"),
                expected=f"a norm of {count} channels at {path}",
                got=str(norm),
            )
        norms.append((path, norm, offset))
    rows = sum(_row_count(consumer) for consumer in consumers)
    if init == "weights" and consumers and channels > rows:
        raise PlanError(
            "a projection has no more channels than what its readers make of them",
            where=op.where("channels"),
            expected=f"up to {rows}",
            got=str(channels),
        )
    if init == "weights" and (norms or not consumers):
        raise PlanError(
            "a joint factorisation needs consumers that are reached without a norm",
            where=op.where("init"),
            expected="fresh",
            got="weights",
        )
    return _Request(channels, before, dims, init == "fresh", tuple(consumers), tuple(norms))


def _count(op: Op, settings: Any, key: str, least: int = 1) -> int:
    value = settings.get(key)
    if type(value) is not int or value < least:
        raise PlanError(
            f"{key} makes no sense", where=op.where(key), expected=f"an integer from {least}", got=repr(value)
        )
    return value


def _path(op: Op, entry: Any) -> str:
    path = entry.get("path")
    if not isinstance(path, str):
        raise PlanError("an entry without a path", where=op.where("path"), expected="a string", got=repr(path))
    return path


def _entries(op: Op, key: str) -> list[Any]:
    entries = op.settings.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise PlanError(f"{key} is a list of objects", where=op.where(key), expected="a list", got=repr(entries))
    return entries


def _weight_for(op: Op, request: _Request, branch: nn.Module, model: nn.Module) -> Tensor:
    """A weight whose device and dtype the projection takes."""
    if request.consumers:
        weight: Tensor = request.consumers[0].layer.weight
        return weight
    for module in (branch, model):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter
    dtype = getattr(torch, str(op.settings.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise PlanError("unknown dtype", where=op.where("dtype"), expected="such as float32", got=str(dtype))
    return torch.zeros((), dtype=dtype)


# --------------------------------------------------------------------------------------------------- weights


def _joint(bench: Bench, op: Op, request: _Request, projection: Any) -> tuple[list[Tensor], float]:
    """Fills the projection from the joint factorisation; the consumers' new slices and the relative error."""
    c, r = request.branch_channels, request.channels

    def work() -> decompose.AxisSplit:
        stacked = torch.cat([_rows(consumer, c) for consumer in request.consumers])
        try:
            return decompose.split_spectrum(stacked).truncate(r)
        except RefusedError as error:
            paths = ", ".join(consumer.path for consumer in request.consumers)
            raise RefusedError(error.message, where=paths, got=error.got, hint=error.hint) from None

    factors = bench.once(op, work)
    with torch.no_grad():
        projection.weight.copy_(factors.first.reshape(projection.weight.shape))
    counts = [_row_count(consumer) for consumer in request.consumers]
    pieces = torch.split(factors.second, counts)
    slices = [_from_rows(rows, consumer, r) for rows, consumer in zip(pieces, request.consumers, strict=True)]
    trained = any(consumer.layer.weight.requires_grad for consumer in request.consumers)
    projection.weight.requires_grad_(trained)
    return slices, factors.relative_error


def _rows(consumer: _Consumer, channels: int) -> Tensor:
    """A consumer's slice as ``(out · k · repeat, channels)``."""
    weight = consumer.layer.weight.detach()
    kernel = decompose.to_forward_layout(weight, 1, consumer.spec.transposed)
    own = kernel[:, consumer.offset : consumer.offset + channels * consumer.repeat]
    return own.reshape(own.shape[0], channels, -1).transpose(1, 2).reshape(-1, channels)


def _row_count(consumer: _Consumer) -> int:
    return consumer.spec.out_channels * consumer.repeat * prod(consumer.spec.kernel_size)


def _from_rows(rows: Tensor, consumer: _Consumer, channels: int) -> Tensor:
    """The inverse of `_rows` for another number of channels."""
    spec = consumer.spec
    kernel = rows.reshape(spec.out_channels, -1, channels).transpose(1, 2)
    return kernel.reshape(spec.out_channels, channels * consumer.repeat, *spec.kernel_size)


def _narrow_layer(consumer: _Consumer, request: _Request, new: Tensor | None) -> None:
    """Gives a consumer fewer input channels; its slice is ``new``, or fresh where that is None."""
    layer, spec = consumer.layer, consumer.spec
    gone = (request.branch_channels - request.channels) * consumer.repeat
    narrower = replace(spec, in_channels=spec.in_channels - gone)
    start, old_end = consumer.offset, consumer.offset + request.branch_channels * consumer.repeat
    new_end = old_end - gone
    made: Any = make_like(
        layer.weight, consumer.path, lambda device: make_layer(narrower, device=device, dtype=layer.weight.dtype),
        initialised=True,
    )  # fmt: skip
    axis = 0 if spec.transposed else 1
    if not layer.weight.is_meta:
        with torch.no_grad():
            kept, target = layer.weight.movedim(axis, 0), made.weight.movedim(axis, 0)
            target[:start].copy_(kept[:start])
            target[new_end:].copy_(kept[old_end:])
            if new is not None:
                target[start:new_end].copy_(new.movedim(1, 0))
    made.weight.requires_grad_(layer.weight.requires_grad)
    layer.weight = made.weight
    setattr(layer, "in_channels" if spec.dims else "in_features", narrower.in_channels)


def _tell_parent(bench: Bench, consumer: _Consumer, request: _Request) -> None:
    """Corrects what an inserted chain says of itself when its first stage takes fewer channels."""
    for path in bench.names_of(consumer.layer):
        owner, _, name = path.rpartition(".")
        parent = bench.model.get_submodule(owner)
        if isinstance(parent, Factorized) and name == parent.stage_names[0]:
            gone = (request.branch_channels - request.channels) * consumer.repeat
            parent.spec = replace(parent.spec, in_channels=consumer.spec.in_channels - gone)


def _narrow_norm(norm: Any, request: _Request, offset: int) -> None:
    """Takes channels out of a norm; those of the projection start anew."""
    c, r = request.branch_channels, request.channels
    for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        old = getattr(norm, name, None)
        if old is None:
            continue
        with torch.no_grad():
            new = torch.cat([old[:offset], old.new_full((r,), start), old[offset + c :]])
        is_parameter = isinstance(old, nn.Parameter)
        setattr(norm, name, nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new)
    norm.num_features -= c - r


def _changed(request: _Request) -> list[nn.Module]:
    return [*(consumer.layer for consumer in request.consumers), *(norm for _, norm, _ in request.norms)]


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
