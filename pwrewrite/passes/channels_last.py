"""`ChannelsLast`: the convolutions of a model compute in channels_last, from the first one on. Exact.

The format is a property of the layers, not of the input: each 2-D convolution brings its input into channels_last where
it is not, so the first one converts for all, and the operations between keep what they get. The weights of convolutions
are packed for it as they are used (see `pwrewrite.layers`).

A ``view`` that joins the channels of a map with its positions needs them side by side, as only the usual format has
them. In code that can become a graph it becomes a ``reshape``, which copies then.

The rule: real weights on the CPU that oneDNN computes with, or on CUDA in half precision (where tensor cores want it).
At least half of the MACs of the 2-D convolutions must be in layers with 16 channels or more on one side, below which
the vectors of the format stay empty.
"""

from __future__ import annotations

import torch
from torch import fx

from ..capturing.eligibility import Owners, eligible
from ..capturing.records import Capture, Layer, info
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..core.records import Json
from ..edit.actions.simplify import CODE
from ..forms.specs import spec_to_dict
from ..layers import PointwiseActivation
from ..layers.kernels import CPU_DTYPES
from .base import Pass, Proposal, weight_of

_WIDE = 16


class ChannelsLast(Pass):
    """Chooses channels_last for a model's 2-D convolutions where that pays."""

    name = "channels-last"
    summary = "2-D convolutions compute in channels_last, with packed weights"
    exact = "both"

    def propose(self, capture: Capture) -> list[Proposal]:
        owners, specs = Owners(capture), dict[str, Json]()
        layers: list[Layer] = []
        for layer in capture.layers:
            spec, module = layer.spec, owners.modules.get(layer.path)
            if spec is None or spec.dims != 2 or spec.transposed or not layer.called:
                continue
            if isinstance(module, PointwiseActivation):
                if module.channels_last:
                    continue
                spec = module.spec  # one that pads by itself calls its convolution without padding
            elif layer.functional or eligible(capture, layer, owners) is not None:
                continue
            layers.append(layer)
            specs[layer.path] = spec_to_dict(spec)
        if layers and (why := _does_not_pay(layers, owners)):
            return [Skip("", SkipReason.NO_GAIN, why)]
        if not layers:
            return []
        none = Estimate(0, 0, 0, 0)
        views = [Op("channels-last", path, self.name, {"kind": CODE}, none) for path in _viewing(capture)]
        return [*views, Op("channels-last", "", self.name, {"layers": specs}, none)]


def _viewing(capture: Capture) -> list[str]:
    """Paths of the modules whose own code views a map in a way that channels_last does not allow."""
    paths: dict[str, None] = {}
    for node in capture.graph.nodes:
        source = node.args[0] if node.args else None
        if node.op == "call_method" and node.target == "view" and isinstance(source, fx.Node):
            before, after = info(source).outputs, info(node).outputs
            if before and after and len(before[0].shape) == 4 and before[0].dtype is after[0].dtype:
                n, channels, *size = before[0].shape
                if size == [1, 1] and not _read_by_linear(node) and after[0].shape == (n, channels):
                    paths[info(node).path] = None  # of larger inputs there may be more positions
                    continue
                x = torch.empty(before[0].shape, device="meta", memory_format=torch.channels_last)
                try:
                    x.view(after[0].shape)
                except RuntimeError:
                    paths[info(node).path] = None
    return list(paths)


def _read_by_linear(node: fx.Node) -> bool:
    """Whether a linear map reads a value, or what it alone leads to: it takes no other number of columns."""
    while len(node.users) == 1:
        (node,) = node.users
        if info(node).op == "linear":
            return True
    return False


def _does_not_pay(layers: list[Layer], owners: Owners) -> str:
    """Why channels_last would not pay; empty where it does."""
    weight = weight_of(layers[0], owners)
    real = torch.zeros((), device="cpu") if weight is None or weight.is_meta else weight
    device, dtype = real.device.type, real.dtype
    if dtype not in {"cpu": CPU_DTYPES, "cuda": (torch.float16, torch.bfloat16)}.get(device, ()):
        return f"no kernels that want channels_last for {dtype} on {device}"
    wide = sum(layer.macs for layer in layers if max(layer.in_channels, layer.out_channels) >= _WIDE)
    total = sum(layer.macs for layer in layers) or 1
    if wide < total / 2:
        return f"{1 - wide / total:.0%} of the MACs are in convolutions of fewer than {_WIDE} channels"
    return ""
