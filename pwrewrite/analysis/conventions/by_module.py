"""Tools that hang hooks on modules: thop and torchinfo. What a larger module does with functions counts as 0.

thop hooks modules whose *class* is in its table, not subclasses, and leaves out biases. A module that several parents
share is hooked once per parent and its sum added once per parent: twice shared counts fourfold.

torchinfo hooks every module and counts those without children by their parameters: weight and bias once per output
position where the class has "Conv" in its name, once per batch item elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from torch import nn

from ...capturing import Capture
from ...core.convolution import CONV_MODULES
from .units import Share, Unit, childless, visits

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def uncounted(unit: Unit) -> Share:
    """The share of what no hook sees."""
    reason = f"class {type(unit.module).__name__} has no hook" if unit.whole else "called as a function"
    return Share(unit.kind, f"{reason}: counted as 0", 0, unit.ours)


_Rule = Callable[[Unit], tuple[int, str]]


def thop_shares(capture: Capture, all_units: Sequence[Unit]) -> tuple[list[Share], list[str]]:
    """What ``thop.profile(model, inputs)`` counts."""
    shares: list[Share] = []
    caveats: list[str] = []
    hooks = visits(capture.model)
    added = visits(capture.model, lambda m: type(m) in _THOP and not isinstance(m, nn.Sequential))
    for unit in all_units:
        rule = _THOP.get(type(unit.module)) if unit.whole else None
        if unit.whole and isinstance(unit.module, RECURRENT):
            caveats.append("thop has formulas of its own for recurrent modules, here they count as 0")
        if rule is None:
            if unit.ours:
                shares.append(uncounted(unit))
            continue
        counted, text = rule(unit)
        shares.append(Share(unit.kind, text, counted, unit.ours))
        times = hooks[unit.module] * added[unit.module]
        if times > 1 and counted:
            shares.append(Share(unit.kind, f"shared module, each call counted {times} times", (times - 1) * counted))
    return shares, caveats


def _thop_convolution(unit: Unit) -> tuple[int, str]:
    # its figure for transposed ones: output positions × weight taken as (out, in/groups)
    counted = unit.output.numel * (unit.input.shape[1] // unit.module.groups) * prod(unit.module.weight.shape[2:])
    rule = "transposed, counted at output resolution" if unit.module.transposed else "counted differently"
    return counted, "" if counted == unit.ours else rule


def _thop_norm(unit: Unit) -> tuple[int, str]:
    each = 4 if getattr(unit.module, "affine", False) or getattr(unit.module, "elementwise_affine", False) else 2
    return each * unit.input.numel, f"{each} per element"


def _thop_adaptive_pool(unit: Unit) -> tuple[int, str]:
    window = prod(n / out for n, out in zip(unit.input.shape[2:], unit.output.shape[2:]))
    return int((window + 1) * unit.output.numel), "its window + 1 per output element"


def _thop_softmax(unit: Unit) -> tuple[int, str]:
    features = unit.input.shape[unit.module.dim]
    return unit.input.numel // features * (3 * features - 1), "3 per element, less 1 per row"


def _thop_upsample(unit: Unit) -> tuple[int, str]:
    each = {"nearest": 1, "linear": 5, "bilinear": 11, "bicubic": 259}.get(unit.module.mode, 0)
    return each * unit.output.numel, f"{each} per output element"


def _nothing(unit: Unit) -> tuple[int, str]:
    return 0, ""


_THOP: dict[type[nn.Module], _Rule] = {
    **dict.fromkeys(CONV_MODULES, _thop_convolution),
    nn.Linear: lambda unit: (unit.module.in_features * unit.output.numel, ""),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm), _thop_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _thop_norm),
    **dict.fromkeys(
        (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), lambda unit: (unit.output.numel, "1 per output element")
    ),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _thop_adaptive_pool),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d), _thop_upsample),
    nn.Softmax: _thop_softmax,
    nn.PReLU: lambda unit: (unit.input.numel, "1 per element"),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Dropout, nn.Sequential, nn.PixelShuffle), _nothing),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.ZeroPad2d), _nothing),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _nothing),
}


def torchinfo_shares(capture: Capture, all_units: Sequence[Unit]) -> tuple[list[Share], list[str]]:
    """What ``torchinfo.summary(model, input_data=inputs).total_mult_adds`` counts."""
    shares: list[Share] = []
    caveats: list[str] = []
    for unit in all_units:
        if not unit.whole or not childless(unit.module):
            shares += [uncounted(unit)] if unit.ours else []
        else:
            shares += _by_parameters(unit, caveats)
    return shares, caveats


def _by_parameters(unit: Unit, caveats: list[str]) -> list[Share]:
    """Weight and bias times the positions, or the batch items, of the output."""
    shape = unit.output.shape
    name = type(unit.module).__name__
    convolution = "Conv" in name
    positions = prod(shape[:1] + shape[2:]) if convolution else shape[0] if shape else 1
    per = "output position" if convolution else "batch item"
    weight = bias = 0
    for key, parameter in unit.module.named_parameters():
        if key.endswith("_orig") and hasattr(unit.module, f"{key.removesuffix('_orig')}_mask"):
            caveats.append("torchinfo counts the unmasked weights of a pruned module")
        if key == "bias":
            bias += parameter.numel() * positions
        elif key == "weight":
            weight += parameter.numel() * positions
        elif "weight" in key or "bias" in key:
            weight += parameter.numel() * prod(shape[:2])
    shares = []
    if weight or unit.ours:
        rule = ""
        if weight != unit.ours:
            rule = f"each weight counted once per {per}"
            if getattr(unit.module, "transposed", False):
                rule = "transposed, counted at output resolution"
            elif not weight:
                rule = f"class {name} has no weight of its own: counted as 0"
        shares.append(Share(unit.kind, rule, weight, unit.ours))
    if bias:
        shares.append(Share(f"{unit.kind} bias", f"1 per {per} and channel", bias))
    return shares
