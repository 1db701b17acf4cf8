"""What a model takes when nobody says: from timm, from torchvision, or from its first layer.

torchvision's sizes are those of its weights' own transforms, and else those that reproduce the operation counts that
it publishes beside the weights:

=============== =========================================== ====================================================
family          input                                       from
=============== =========================================== ====================================================
classification  1×3×S×S                                     ``crop_size``; a ViT's own ``image_size``
segmentation    1×3×S×S                                     ``resize_size`` (520)
video           1×3×T×S×S                                   ``crop_size``; T = 16, or a larger minimum
detection       a list of one 3×S×S                         the size that the model itself resizes to
optical flow    two of 1×3×520×960                          the size of torchvision's own example
=============== =========================================== ====================================================

Limits: the first convolution in the order of definition is taken to be the one that sees the input.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..capturing.inputs import FRAMES, example_of, first_layer, shape_for
from ..core.errors import InputError
from .factories import missing_args
from .resolve import TargetInfo


@dataclass(frozen=True)
class Guess:
    """What a model takes: the shape of each input, what was assumed, and whether it takes them as one list."""

    shapes: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()
    as_list: bool = False


def guess_inputs(model: nn.Module, info: TargetInfo | None) -> Guess:
    """What a model takes, by the target that it came from, if any, else by itself; an `InputError` if nothing tells."""
    args = info.args if info else {}
    guess = _from_timm(model, args)
    if guess is None and info is not None and info.kind == "torchvision" and info.name:
        guess = _from_weights(model, info.name, args)
    return guess or _from_family(model) or _from_layers(model)


def _from_timm(model: nn.Module, args: Mapping[str, object]) -> Guess | None:
    """The input size that timm keeps with a model; ``img_size`` and ``in_chans`` in the arguments overrule it."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = _sizes(config.get("input_size")) if isinstance(config, Mapping) else None
    if not size:
        return None
    channels, *spatial = size
    side, chans = args.get("img_size"), args.get("in_chans")
    spatial = [side] * len(spatial) if isinstance(side, int) else _sizes(side) or spatial
    return Guess(((1, chans if isinstance(chans, int) else channels, *spatial),))


def _sizes(value: object) -> list[int] | None:
    return list(value) if isinstance(value, (tuple, list)) and all(isinstance(n, int) for n in value) else None


def _from_weights(model: nn.Module, name: str, args: Mapping[str, object]) -> Guess | None:
    """What the transforms of a torchvision model's best weights give out."""
    models = importlib.import_module("torchvision.models")
    try:
        weights = models.get_model_weights(name).DEFAULT
        transforms = weights.transforms()
    except (AttributeError, ValueError, TypeError):
        return None
    kind = type(transforms).__name__
    sizes = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)
    if not sizes or kind in ("ObjectDetection", "OpticalFlow"):
        return None
    own = args.get("spatial_size") or args.get("input_size") or getattr(model, "image_size", None)
    chosen = [own] if isinstance(own, int) else _sizes(own) or []
    height, width = ((chosen if len(chosen) in (1, 2) else [*sizes]) * 2)[-2:]
    if kind != "VideoClassification":
        return Guess(((1, 3, height, width),))
    frames = args.get("temporal_size")
    if not isinstance(frames, int):
        frames = max(FRAMES, weights.meta.get("min_temporal_size") or 0)
    note = f"no input given: assumed a clip of {frames} frames, 1x3x{frames}x{height}x{width}"
    return Guess(((1, 3, frames, height, width),), (note,))


def is_detection(model: nn.Module) -> bool:
    """Whether a model is one of torchvision's detection models, or a subclass, which take a list of images."""
    return _is_from("torchvision.models.detection", model) and hasattr(model, "transform")


def _is_from(package: str, model: nn.Module) -> bool:
    """Whether a model's class, or one it derives from, is defined in a package."""
    return any(f"{cls.__module__}.".startswith(f"{package}.") for cls in type(model).__mro__)


def _from_family(model: nn.Module) -> Guess | None:
    """What torchvision's detection and optical flow models take, wherever the model came from."""
    if is_detection(model):
        transform: Any = model.transform
        shortest = transform.min_size
        side = shortest[-1] if isinstance(shortest, (tuple, list)) else shortest
        width, height = getattr(transform, "fixed_size", None) or (side, side)
        image = (3, int(height), int(width))
        note = f"no input given: assumed a list of one image of {_text(image)}, the size that the model resizes to"
        return Guess((image,), (note,), as_list=True)
    if _is_from("torchvision.models.optical_flow", model):
        frame = (1, 3, 520, 960)
        note = f"no input given: assumed two images of {_text(frame)}"
        return Guess((frame, frame), (note,))
    return None


def _from_layers(model: nn.Module) -> Guess:
    """An image by the channels of the first convolution, or a vector by the features of the first linear layer."""
    name, required = type(model).__name__, missing_args(model.forward)
    if len(required) > 1:
        hint = " ".join(f"--input {n}=SHAPE[:DTYPE]" for n in required)
        raise _unknown(f"{name}.forward", f"it needs {len(required)} inputs, {', '.join(required)}", hint)
    layer = first_layer(model)
    if isinstance(layer, nn.Embedding):
        hint = f"--input {example_of(model)}, with the length that you mean"
        raise _unknown(name, "its first layer is an embedding, of indices", hint)
    hint = f"--input {example_of(model)}, with the shape that it takes"
    if layer is None:
        raise _unknown(name, "it has no convolution and no linear layer to tell", hint)
    shape = shape_for(layer)
    if not shape[1]:
        raise _unknown(name, "its first layer is lazy, and learns its channels from the first input", hint)
    source = (
        "the first linear layer's in_features" if isinstance(layer, nn.Linear) else "the first convolution's channels"
    )
    note = f"no input given: assumed {_text(shape)} from {source}"
    return Guess((shape,), (note,))


def _unknown(what: str, why: str, hint: str) -> InputError:
    hint += "; or define example_inputs in the model's file"
    return InputError(f"cannot know what {what} takes: {why}", hint=hint)


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The floating dtype of a model's first floating parameter or buffer; float32 where it has neither."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
