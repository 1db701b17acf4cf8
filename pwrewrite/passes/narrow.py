"""`Narrow`: fewer channels between the layers that make them and the layers that read them.

Which channels can go is found by `channel_units`: an inverted residual's middle (Sandler et al. 2018), a residual
block's inside, a chain as in VGG. Which of them do go is decided by what their readers lose, and not by the size of
their filters: with what a norm says of each channel, readers are taken to see ``E[x] = m_c`` and ``Var[x] = v_c``, so a
channel costs ``v_c ‖W_c‖²`` where a bias makes up for the mean, and ``m_c² ‖W_c‖²`` more where nothing does. Where no
norm says anything, ``v_c`` is that of the filters on independent inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from math import prod

import torch
from torch import Tensor

from .. import decompose
from ..capturing.records import Capture, Layer
from ..core.errors import UsageError
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..core.records import Json
from ..decompose import RankSpec
from ..decompose.columns import Reader, eliminate
from ..edit.actions.narrow import channel_spread
from ..forms.specs import spec_to_dict
from .base import Pass, Proposal, below_share, chosen, spec_of, weight_of
from .channel_units import ReaderOf, Unit, find_units
from .patterns import Graph

DEFAULT_RANK = 0.5
"""Part of the channels that stay where nothing else is said."""


@dataclass(eq=False)
class Narrow(Pass):
    """Takes channels out between layers.

    Args:
        rank: How many stay: an integer, or a ratio (``0.5``, ``"50%"``) of the channels.
        include: Patterns on the paths of layers that make channels; all where empty.
        exclude: Patterns on paths; channels that such a layer makes, passes on or reads stay.
        min_share: Least part of the model's MACs that the layers do whose channels are looked at, 0 to 1.
        multiple: What computed widths are rounded to; by default 8 where there are 64 channels or more, else 1.
        required: Whether it is an error where nothing comes of it.

    Raises:
        UsageError: If a setting makes no sense.
    """

    name = "narrow"
    summary = "fewer channels between layers, through norms, activations, pools and depthwise convolutions"

    rank: RankSpec | None = None
    _: KW_ONLY
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    min_share: float = 0.0
    multiple: int | None = None
    required: bool = False

    def __post_init__(self) -> None:
        self.width: RankSpec = DEFAULT_RANK if self.rank is None else self.rank
        decompose.resolve_rank(self.width, 1 << 30, name="rank")

    def propose(self, capture: Capture) -> list[Proposal]:
        graph = Graph(capture)
        units, proposals = find_units(capture, graph)
        result: list[Proposal] = list(proposals)
        made, kept = chosen(capture, self.include, ()), chosen(capture, (), self.exclude)
        total, sizes = sum(layer.macs for layer in capture.layers) or 1, Sizes()
        for unit in units:
            path = unit.producers[0].path
            share = sum(layer.macs for layer in unit.layers) / total
            if not any(id(layer) in made for layer in unit.producers):
                result.append(Skip(path, SkipReason.EXCLUDED, "left out by include or exclude"))
            elif left := next((layer for layer in unit.layers if id(layer) not in kept), None):
                result.append(Skip(path, SkipReason.EXCLUDED, f"its channels are those of {left.path}, too"))
            elif skip := below_share(path, share, self.min_share):
                result.append(skip)
            else:
                result.append(self._narrowed(graph, unit, sizes))
            if self.include:
                detail = f"its channels are those that {path} makes; name that"
                result += [Skip(d.path, SkipReason.DEPTHWISE, detail) for d in unit.depthwise if id(d) in made]
        return result

    def _narrowed(self, graph: Graph, unit: Unit, sizes: Sizes) -> Proposal:
        path, channels = unit.producers[0].path, unit.channels
        try:
            width = decompose.resolve_rank(self.width, channels, self.multiple)
        except UsageError as error:
            return Skip(path, SkipReason.TOO_SMALL, f"{error.message}; there, give {error.expected}")
        if width == channels and self.width not in (1.0, "100%", channels):
            return Skip(path, SkipReason.TOO_SMALL, f"{width} of {channels} channels stay, so nothing would change")
        readers = plain_readers(graph, unit)
        kept = tuple(range(width)) if readers is None else eliminate(readers, channels, width).kept(width)
        return narrow_op(unit, kept, self.name, sizes)


class Sizes:
    """What layers cost while one unit after the other is narrowed: the share of inputs and outputs that they have."""

    def __init__(self) -> None:
        self._inputs: dict[str, int] = {}
        self._outputs: dict[str, int] = {}

    def of(self, layer: Layer) -> tuple[int, int]:
        """Parameters and MACs of a layer now."""
        spec = spec_of(layer)
        inputs = self._inputs.get(layer.path, layer.in_channels)
        outputs = self._outputs.get(layer.path, layer.out_channels)
        weights = inputs * outputs // spec.groups * prod(spec.kernel_size)
        if spec.is_depthwise:
            weights = outputs * prod(spec.kernel_size)
        before = prod(spec.weight_shape)
        return weights + outputs * spec.bias, layer.macs // before * weights

    def narrow(self, unit: Unit, width: int) -> None:
        """Takes note of a unit's new width."""
        for layer in unit.producers:
            self._outputs[layer.path] = width
        for reader in unit.readers:
            self._inputs[reader.layer.path] = width * reader.repeat
        for layer in unit.depthwise:
            self._inputs[layer.path] = self._outputs[layer.path] = width


def narrow_op(unit: Unit, kept: Sequence[int], pass_name: str, sizes: Sizes) -> Op:
    """The op that leaves a unit some of its channels, and takes note of that in ``sizes``."""
    before = [sizes.of(layer) for layer in unit.layers]
    sizes.narrow(unit, len(kept))
    after = [sizes.of(layer) for layer in unit.layers]
    (params, macs), (params_after, macs_after) = ([sum(each) for each in zip(*costs)] for costs in (before, after))
    of_norms = unit.norm_params
    estimate = Estimate(params + of_norms * unit.channels, params_after + of_norms * len(kept), macs, macs_after)
    settings: Mapping[str, Json] = {
        "channels": unit.channels,
        "keep": list(kept),
        "producers": [_placed(layer) for layer in unit.producers],
        "readers": [reading(reader) for reader in unit.readers],
        "depthwise": [_placed(layer) for layer in unit.depthwise],
        "norms": list(unit.norms),
    }
    return Op("narrow", unit.producers[0].path, pass_name, settings, estimate)


def _placed(layer: Layer) -> dict[str, Json]:
    return {"path": layer.path, "layer": spec_to_dict(spec_of(layer))}


def reading(reader: ReaderOf) -> dict[str, Json]:
    """A layer that reads channels as the settings of an op name it."""
    activation, numbers = reader.activation or ("", ())
    data = {"repeat": reader.repeat if reader.repeat > 1 else 0, "norm": reader.norm, "source": reader.source}
    data |= {"activation": activation, "numbers": list(numbers)}
    return _placed(reader.layer) | {key: value for key, value in data.items() if value}


def plain_readers(graph: Graph, unit: Unit) -> list[Reader] | None:
    """The readers of a unit in the norm of what is known without inputs, their losses relative; None on meta."""
    before, readers = torch.ones((), device="cpu"), list[Reader]()
    for layer in (unit.producers[0], *unit.depthwise):
        kernel = _kernel(graph, layer)
        if kernel is None:
            return None
        before = before.to(kernel) * kernel.square().flatten(1).sum(1)
    for each in unit.readers:
        kernel, known = _kernel(graph, each.layer), None
        if kernel is None:
            return None
        known = channel_spread(graph.capture.model, each.source, each.activation, unit.channels)
        made_up = spec_of(each.layer).bias or each.norm
        moment = before if known is None else known[1] if made_up else known[1] + known[0].square()
        rows = kernel.flatten(1)
        moment = moment.to(rows).repeat_interleave(rows.shape[1] // unit.channels)
        scale = Reader(rows, moment).scale
        readers.append(Reader(rows, moment, factor=1 / scale if scale > 0 else 1.0))
    return readers


def made_shares(graph: Graph, unit: Unit) -> Tensor:
    """``(channels,)``: the share of squared weights that makes each channel, summed over the layers that make them."""
    shares = torch.zeros(unit.channels, dtype=torch.float64, device="cpu")
    for layer in (*unit.producers, *unit.depthwise):
        kernel = _kernel(graph, layer)
        if kernel is not None and len(kernel) == unit.channels:
            energies = kernel.square().flatten(1).sum(1).cpu()
            shares += energies / energies.sum().clamp(min=1e-300)
    return shares


def _kernel(graph: Graph, layer: Layer) -> Tensor | None:
    """A layer's kernel in forward layout; None on meta."""
    weight, spec = weight_of(layer, graph.owners), spec_of(layer)
    if weight is None or weight.is_meta:
        return None
    return decompose.to_forward_layout(weight.detach(), spec.groups, spec.transposed).double()
