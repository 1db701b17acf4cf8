"""``narrow``: some channels go, from the layers that make them, all on the way, and the layers that read them.

What is left of the readers' weights does the work of the columns that went as well as it can (`decompose.columns`): in
the norm of calibration inputs where there are any, else with every channel for itself. What the outputs then lack on
average goes to the reader's bias, or to the running mean of the batch norm behind it.

Without calibration inputs the mean of a channel is worked out from what a norm says of it: behind a batch norm whose
statistics are right it is spread around its shift ``β`` by its gain ``γ``, and then goes through the activation. A norm
that has never seen an input (means of 0 and variances of 1 throughout) says nothing.

All modules stay and take smaller tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import decompose
from ...core.convolution import ConvSpec
from ...core.plan import Edit, Op
from ...decompose.columns import Kept, columns_of, keep
from ...layers.kernels import FORMATS
from ...layers.known import ACTIVATIONS, Found
from .bench import Bench, WeightedModule, param_count, spec_of_module
from .project import CHANNEL_NORMS
from .settings import Count, wrong

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")
_GRID = 64  # points of the normal distribution that an activation's mean and variance are worked out from


@dataclass(frozen=True)
class Placed:
    """A layer: its path and shape facts."""

    path: str
    layer: ConvSpec


@dataclass(frozen=True)
class Reading:
    """A layer that reads the channels; a text is empty where there is no such thing, or it is not known."""

    path: str
    layer: ConvSpec
    repeat: Count = 1  # inputs per channel: above 1 behind a flatten
    norm: str = ""  # path of the batch norm that alone reads its output, where the layer has no bias
    source: str = ""  # path of the norm or layer that spreads what it reads
    activation: str = ""  # name of the activation behind that, with its numbers
    numbers: tuple[float, ...] = ()

    @property
    def found(self) -> Found | None:
        """The activation."""
        return (self.activation, self.numbers) if self.activation else None


@dataclass(frozen=True)
class NarrowSettings:
    """Settings of ``narrow``: how many channels there were, those that stay, and the layers and norms on their way."""

    channels: Count
    keep: tuple[int, ...]
    producers: tuple[Placed, ...]
    readers: tuple[Reading, ...]
    depthwise: tuple[Placed, ...] = ()
    norms: tuple[str, ...] = ()


def narrow_channels(bench: Bench, op: Op, settings: NarrowSettings) -> Edit:
    """Carries out a ``narrow`` op."""
    _check(op, settings)
    kept, width = settings.keep, len(settings.keep)
    producers = [_layer(bench, op, each, "producers") for each in settings.producers]
    readers = [_layer(bench, op, each, "readers") for each in settings.readers]
    depthwise = [_layer(bench, op, each, "depthwise") for each in settings.depthwise]
    norms = [_norm(bench, op, path, settings.channels) for path in settings.norms]
    changed = dict.fromkeys([*producers, *readers, *depthwise, *norms])  # a gate may read and make the same channels
    before, error = param_count(*changed), 0.0
    placed: tuple[Placed | Reading, ...] = (*settings.producers[1:], *settings.depthwise, *settings.readers)
    if width < settings.channels:
        solved: list[Kept] | None = None
        if bench.fill and not any(layer.weight.is_meta for layer in readers):
            solved = bench.once(op, lambda: _solved(bench, op, settings, readers))
            error = math.sqrt(sum(each.relative_error**2 for each in solved) / len(solved))
        for i, (reading, layer) in enumerate(zip(settings.readers, readers)):
            _take_inputs(bench, reading, layer, kept, None if solved is None else solved[i])
        for each, layer in zip(settings.producers, producers):
            _take(layer, kept, ("weight", "bias"), transposed=each.layer.transposed)
            setattr(layer, "out_channels" if each.layer.dims else "out_features", width)
        for layer in depthwise:
            _take(layer, kept, ("weight", "bias"))
            vars(layer).update(in_channels=width, out_channels=width, groups=width)
        for norm in norms:
            _take(norm, kept, _PER_CHANNEL)
            setattr(norm, "num_parameters" if isinstance(norm, nn.PReLU) else "num_features", width)
    exact, after = "both" if width == settings.channels else None, param_count(*changed)
    edit = Edit(op, "module", "narrow", width, width, before, after, error if bench.fill else None, exact)
    return replace(edit, adapted=(*(each.path for each in placed), *settings.norms))


def _check(op: Op, settings: NarrowSettings) -> None:
    kept, channels = settings.keep, settings.channels
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < channels:
        expected = f"different channels from 0 to {channels - 1}, one at least, in ascending order"
        raise wrong(op, "keep", "these channels cannot stay", expected, f"{len(kept)} of them")
    if not settings.producers or not settings.readers:
        raise wrong(op, "readers", "narrow needs layers that make and layers that read the channels", "one at least")
    widths: list[tuple[str, Placed | Reading, int]] = [
        *(("producers", each, each.layer.out_channels) for each in settings.producers),
        *(("depthwise", each, each.layer.in_channels) for each in settings.depthwise),
        *(("readers", each, each.layer.in_channels // each.repeat) for each in settings.readers),
    ]
    for key, each, width in widths:
        alone = each.layer.is_depthwise and each.layer.out_channels == width
        if width != channels or (each.layer.groups != 1) != (key == "depthwise") or (key == "depthwise" and not alone):
            expected = f"{'a depthwise' if key == 'depthwise' else 'an ungrouped'} layer of {channels} channels"
            raise wrong(op, key, f"{each.path} has other channels", expected, f"{width}, {each.layer.groups} groups")


def _layer(bench: Bench, op: Op, placed: Placed | Reading, key: str) -> WeightedModule:
    """A layer that an op was made for; its other side may have been narrowed since."""
    module = bench.find(op, placed.path, key)
    spec, now = placed.layer, spec_of_module(module)
    if now is not None and key == "producers":
        spec = replace(spec, in_channels=now.in_channels)
    elif now is not None and key == "readers":
        spec = replace(spec, out_channels=now.out_channels)
    return bench.layer(op, placed.path, spec, key)


def _norm(bench: Bench, op: Op, path: str, channels: int) -> nn.Module:
    module = bench.find(op, path, "norms")
    slopes = isinstance(module, nn.PReLU)
    width = getattr(module, "num_parameters" if slopes else "num_features", None)
    if not (slopes or isinstance(module, CHANNEL_NORMS)) or width != channels:
        raise wrong(op, "norms", "the plan was made for another norm", f"one of {channels} channels", str(module))
    return module


def _solved(bench: Bench, op: Op, settings: NarrowSettings, readers: Sequence[WeightedModule]) -> list[Kept]:
    """What becomes of the readers' kernels."""
    result = []
    for reading, layer in zip(settings.readers, readers):
        weight = layer.weight.detach()
        of_reader = replace(op, path=reading.path)
        factors = bench.decomposer(of_reader, weight) if bench.decomposer is not None else None
        if not isinstance(factors, Kept):
            kernel = decompose.to_forward_layout(weight, 1, reading.layer.transposed)
            columns = columns_of(settings.keep, reading.repeat)
            spread = channel_spread(bench.model, reading.source, reading.found, settings.channels)
            mean = None
            if spread is not None and (layer.bias is not None or reading.norm):
                mean = spread[0].to(kernel).repeat_interleave(kernel.shape[2:].numel() * reading.repeat)
            factors = keep(kernel, columns, None, mean)
        result.append(factors)
    return result


def channel_spread(
    model: nn.Module, source: str, activation: Found | None, channels: int
) -> tuple[Tensor, Tensor] | None:
    """The mean and variance of every channel, ``(channels,)``, behind the norm ``source`` and an activation.

    None where they are not known.
    """
    norm = dict(model.named_modules(remove_duplicate=False)).get(source)
    if not isinstance(norm, CHANNEL_NORMS) or (activation is not None and activation[0] not in ACTIVATIONS):
        return None
    weight, bias, mean, variance = (getattr(norm, name) for name in _PER_CHANNEL)
    spread: Tensor = torch.ones(channels, device="cpu") if weight is None else weight.detach().abs()
    if spread.is_meta or spread.numel() != channels:
        return None
    if variance is not None and bool((variance == 1).all()) and not bool(mean.any()):
        return None
    spread = spread.double()
    centre = torch.zeros_like(spread) if bias is None else bias.detach().to(spread)
    if activation is None:
        return centre, spread.square()
    at = torch.special.ndtri((torch.arange(_GRID, dtype=spread.dtype, device=spread.device) + 0.5) / _GRID)
    name, numbers = activation
    values = ACTIVATIONS[name].plain(centre[:, None] + spread[:, None] * at, *numbers)
    return values.mean(1), values.var(1, correction=0)


@torch.no_grad()
def _take_inputs(
    bench: Bench, reading: Reading, layer: WeightedModule, kept: Sequence[int], solved: Kept | None
) -> None:
    """Gives a reader fewer inputs, and makes up for what it then lacks."""
    columns = columns_of(kept, reading.repeat)
    axis = 0 if reading.layer.transposed else 1
    layer.weight = _smaller(layer.weight, columns, axis)
    setattr(layer, "in_channels" if reading.layer.dims else "in_features", len(columns))
    if solved is None:
        return
    (stage,) = solved.stages(reading.layer.transposed)
    layer.weight.copy_(stage.weight.reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.add_(solved.shift.to(layer.bias))
    elif reading.norm:
        mean: Any = bench.model.get_submodule(reading.norm)
        mean.running_mean -= solved.shift.to(mean.running_mean)


def _take(module: nn.Module, kept: Sequence[int], names: Sequence[str], *, transposed: bool = False) -> None:
    """Leaves a module those channels of its tensors that are kept."""
    for name in names:
        old = getattr(module, name, None)
        if isinstance(old, Tensor):
            setattr(module, name, _smaller(old, kept, 1 if transposed and name == "weight" else 0))


def _smaller(tensor: Tensor, kept: Sequence[int], axis: int) -> Any:
    """Some entries of a tensor along an axis: a parameter of a parameter, in the same memory format."""
    taken = tensor.detach().index_select(axis, torch.tensor(list(kept), device=tensor.device))
    wanted = FORMATS.get(tensor.dim())
    if wanted is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=wanted):
        taken = taken.contiguous(memory_format=wanted)
    return nn.Parameter(taken, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else taken
