"""The whole way in one call: from a model, or from what a person types, to an `Analysis`."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..analysis import analyze_capture
from ..analysis.devices import DeviceProfile, device_profile
from ..analysis.records import Analysis
from ..capturing import Capture, Inputs, capture
from ..capturing.shapes import ShapeError
from ..core.declaring import from_keywords, refuse_unknown
from ..core.errors import CaptureError
from ..core.numbers import parse_share
from ..core.options import TargetOptions
from ..targets import LoadedModel, class_name, open_target


def analyze(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    hotspot_share: float | str = 0.01,
    device: str | DeviceProfile = "cpu",
    target: str = "",
) -> Analysis:
    """Says where a model's work goes, without running it where shapes suffice.

    Args:
        model: Any module; its weights may be on ``meta``. It is not changed.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword ones, real or on ``meta``.
        hotspot_share: Part of the MACs from which a k×k convolution is a hotspot.
        device: The device profile for the roofline classes, or its name.
        target: What to call the model; its class name by default.

    Returns:
        The analysis: print it, read its fields, or take ``to_dict()``.

    Raises:
        PwrewriteError: If the model does not run on these inputs, or a setting makes no sense.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
    >>> analysis = analyze(model, torch.empty(1, 3, 8, 8, device="meta"))
    >>> analysis.params, analysis.macs, [hotspot.layer.path for hotspot in analysis.hotspots]
    (296, 10080, ['0'])
    """
    if isinstance(hotspot_share, str):
        hotspot_share = parse_share(hotspot_share, "hotspot_share")
    return analyze_capture(capture(model, example_inputs), target=target, hotspot_share=hotspot_share, device=device)


def analyze_target(
    target: str | TargetOptions, *, hotspot_share: float = 0.01, device: str | DeviceProfile = "cpu", **opening: object
) -> Analysis:
    """The same for what can be typed: a file, a Python name, a model of torchvision or timm, or a saved folder.

    ``opening`` are the other fields of `pwrewrite.core.options.TargetOptions`: ``weights``, ``inputs``, …. Raises
    `PwrewriteError` if the target does not lead to a model, or the model does not run.
    """
    device_profile(device)  # what is cheap to refuse is refused before a model is built
    if isinstance(target, str):
        target = from_keywords(TargetOptions, opening | {"target": target})
        refuse_unknown("analyze_target", {name: 0 for name in opening if not hasattr(target, name)}, TargetOptions)
    return analyze_captured(*capture_target(target), hotspot_share=hotspot_share, device=device)


def capture_target(options: TargetOptions) -> tuple[LoadedModel, Capture]:
    """Loads and captures what can be typed.

    The model is built without memory for its weights. Where their values matter, it is built once more for real; a
    user's file is then executed twice.
    """
    loaded = open_target(options, empty=True, seeded=False)
    if loaded.plan is not None:
        return loaded, capture(loaded.model, loaded.example_inputs)
    try:
        return loaded, capture(loaded.model, loaded.example_inputs, values="meta")
    except CaptureError as error:
        if isinstance(error.__cause__, ShapeError):
            raise
    loaded = open_target(options, seeded=False)  # the model needs values: those that it is made with
    return loaded, capture(loaded.model, loaded.example_inputs)


def analyze_captured(
    loaded: LoadedModel, captured: Capture, *, hotspot_share: float = 0.01, device: str | DeviceProfile = "cpu"
) -> Analysis:
    """The analysis of what `capture_target` made, with the notes of loading before its own."""
    analysis = analyze_capture(captured, target=loaded.target, hotspot_share=hotspot_share, device=device)
    return replace(analysis, model_class=class_name(loaded.model), notes=(*loaded.notes, *analysis.notes))
