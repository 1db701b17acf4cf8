"""Inputs changed at random before each step of training, so that few of them serve as many.

``shift`` moves each image by up to an eighth of its size, zeros coming in at the border (the crops of a padded image of
He et al. 2016, *Deep residual learning*, section 4.2); ``flip`` also mirrors half of them, which is wrong for digits
and text. The teacher sees the same inputs, so that no label is needed. What is drawn depends on the global random
states alone, which the caller seeds.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType
from uuid import uuid4

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UsageError, first_line
from ..core.nested import hash_tensors, tensors_of
from .running import Chunk, samples_of

Augment = Callable[..., object]
"""Takes inputs as the model does, and gives as many others: a tensor, a tuple or a dict."""

PLAIN = ("shift", "flip", "none")
_PART = 8


def are_images(chunk: Chunk) -> bool:
    """Whether inputs look like images: a single ``(N, 1 or 3, H, W)`` of floats, at least 8×8."""
    args, kwargs = chunk
    values = [*args, *kwargs.values()]
    image = values[0] if len(values) == 1 else None
    if not isinstance(image, Tensor) or image.dim() != 4 or not image.is_floating_point():
        return False
    return image.shape[1] in (1, 3) and min(image.shape[2:]) >= _PART


def augment_named(name: str | Augment | None, chunk: Chunk) -> tuple[str, Augment | None]:
    """An augmentation and what a report calls it; where none is named, images are shifted.

    Raises:
        UsageError: If there is none of this name, or it is for images, and the inputs are none.
    """
    if callable(name):
        return getattr(name, "__name__", type(name).__name__), name
    images = are_images(chunk)
    name = name or ("shift" if images else "none")
    if name not in PLAIN:
        raise UsageError(f"there is no augmentation {name!r}", expected=f"{', '.join(PLAIN)}, or a function")
    if name == "none":
        return name, None
    if not images:
        hint = "give a function of the inputs (--augment file.py:NAME, augment=), or none"
        raise UsageError(f"the augmentation {name} is for images, N×1×H×W or N×3×H×W", hint=hint)
    return name, shift if name == "shift" else flip


def augmented(augment: Augment, chunk: Chunk) -> Chunk:
    """Inputs as an augmentation changes them.

    Raises:
        UsageError: If it raises, or gives other than inputs of the same number, dtype and dims, all finite.
    """
    args, kwargs = chunk
    try:
        result = augment(*args, **kwargs)
    except Exception as error:
        raise UsageError("the augmentation raised", got=first_line(error)) from error
    takes_dict = len(args) == 1 and isinstance(args[0], Mapping)
    if isinstance(result, Mapping) and not takes_dict:
        changed: Chunk = (), dict(result)
    elif kwargs and not args and not isinstance(result, tuple):
        changed = (), dict(zip(kwargs, [result]))
    else:
        changed = (result if isinstance(result, tuple) else (result,)), {}
    before, after = tensors_of(chunk), tensors_of(changed)
    alike = [(t.dtype, t.dim()) for t in before] == [(t.dtype, t.dim()) for t in after]
    if not alike or samples_of(*changed) != samples_of(*chunk) or set(changed[1]) != set(kwargs):
        expected, got = (", ".join(str(tuple(t.shape)) for t in tensors) for tensors in (before, after))
        raise UsageError("the augmentation does not give inputs like those it got", expected=expected, got=got)
    if not all(bool(t.isfinite().all()) for t in after if t.is_floating_point()):
        raise UsageError("the augmentation makes NaN or Inf of finite inputs")
    return changed


def shift(image: Tensor) -> Tensor:
    """Images ``(N, C, H, W)``, each moved by up to an eighth of its size."""
    (n, _, height, width), device = image.shape, image.device
    down, right = (torch.randint(2 * (size // _PART) + 1, (n, 1), device="cpu") for size in (height, width))
    padded = F.pad(image, (width // _PART,) * 2 + (height // _PART,) * 2)
    rows, columns = (
        (down + torch.arange(height, device="cpu")).to(device),
        (right + torch.arange(width, device="cpu")).to(device),
    )
    each = torch.arange(n, device=device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def flip(image: Tensor) -> Tensor:
    """The same, half of them mirrored."""
    mirrored = torch.rand(len(image), device="cpu") < 0.5
    return shift(torch.where(mirrored.to(image.device)[:, None, None, None], image.flip(-1), image))


def source_of(function: object) -> str:
    """The code of a function, with its defaults and what it holds of plain data, tensors and functions.

    Of anything else it is what no other run knows. Globals that it uses are not looked at.
    """
    if function is None:
        return ""
    if isinstance(function, Tensor):
        return hash_tensors(function)
    try:
        if not isinstance(function, FunctionType):
            raise TypeError(type(function))
        if function.__globals__.get("__name__") == "torch.utils._contextlib":  # torch.no_grad() and the like
            return source_of(getattr(function, "__wrapped__", ...))
        code, held = function.__code__, [cell.cell_contents for cell in function.__closure__ or ()]
        constants = [str(each) for each in code.co_consts if not isinstance(each, CodeType)]
        of_code = [inspect.getsource(code), code.co_code.hex(), constants, code.co_names]
        return json.dumps([of_code, function.__defaults__, function.__kwdefaults__, held], default=source_of)
    except (OSError, TypeError, ValueError, RecursionError):
        return uuid4().hex
