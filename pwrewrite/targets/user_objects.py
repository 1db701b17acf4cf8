"""What an option names in a user's own Python, as ``file.py:NAME`` or ``package.module:NAME``.

``--calibration``, ``--preprocess``, ``--batch``, ``--augment`` and ``--metric`` do.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..core.errors import UsageError
from .factories import kind_of, missing_args
from .user_code import find_named, origin_of, running_user_code


@dataclass(frozen=True)
class Named:
    """What a text named: the object, its name for messages (``accuracy in eval.py``), and the user's file, if any."""

    value: object
    name: str
    origin: Path | None

    def call(self, *args: object, **kwargs: object) -> object:
        """Calls it; what it prints goes to stderr, and a `TargetError` names the line where it raised."""
        with running_user_code(self.name, self.origin):
            return cast(Callable[..., object], self.value)(*args, **kwargs)


def is_named(text: str) -> bool:
    """Whether a text has the form ``file.py:NAME`` or ``package.module:NAME``."""
    head, colon, name = text.rpartition(":")
    if not colon or not all(part.isidentifier() for part in name.split(".")):
        return False
    return head.endswith(".py") or Path(head).is_file() or all(part.isidentifier() for part in head.split("."))


def load_named(text: str, option: str) -> Named:
    """What the text of an option names; a `UsageError` if it has neither form, else as `find_named`."""
    if not is_named(text):
        raise UsageError(f"cannot read {option} {text!r}", expected="file.py:NAME or package.module:NAME")
    value, module, place = find_named(text)
    return Named(value, f"{text.rpartition(':')[2]} in {place}", origin_of(module))


def _callable(named: Named, option: str, what: str, takes: int) -> Named:
    """Refuses what cannot be called with so many arguments."""
    expected = f"{option} takes {what}"
    if not callable(named.value):
        raise UsageError(f"{named.name} is not a function", expected=expected, got=kind_of(named.value))
    needed = missing_args(named.value)
    if len(needed) > takes:
        raise UsageError(f"{named.name} needs the arguments {', '.join(needed)}", expected=expected)
    return named


def open_iterable(text: str) -> Iterable[object]:
    """The iterable of batches that ``--calibration`` names, or that a function without arguments gives.

    A generator can be gone through once; a loader, a list or an object with ``__iter__`` again, which spares memory.
    """
    what = "an iterable of batches, or a function without arguments that gives one"
    named = load_named(text, "--calibration")
    value = named.value
    if not _iterates(value):
        value = _callable(named, "--calibration", what, 0).call()
        if not _iterates(value):
            message, expected = f"{named.name} returned no iterable of batches", f"--calibration takes {what}"
            raise UsageError(message, expected=expected, got=kind_of(value))
    return cast(Iterable[object], value)


def _iterates(value: object) -> bool:
    """Whether a value is an iterable of batches, or one batch."""
    if inspect.isclass(value) or isinstance(value, (str, bytes, Path)):
        return False
    return isinstance(value, (Iterable, Tensor, np.ndarray, Mapping, Dataset))


_FUNCTIONS = {
    "--preprocess": ("a function of an image or a batch", 10),
    "--batch": ("a function of a batch", 1),
    "--augment": ("a function of the model's inputs", 10),
}
"""What options name, and how many arguments that may need."""


def open_function(text: str, option: str) -> Callable[..., object]:
    """The function behind an option; an error in it is told with its line.

    ``--preprocess`` gets one image (a PIL image in RGB) of a folder, as torchvision's transforms do, and a whole batch
    (a numpy array; a tensor from safetensors) of a file of arrays.
    """
    return _callable(load_named(text, option), option, *_FUNCTIONS[option]).call


def open_metric(text: str) -> Callable[[nn.Module], float]:
    """The function behind ``--metric``, from the model to a number; a `UsageError` for none, NaN or infinity."""
    what = "a function of the model that returns a number, larger being better"
    named = load_named(text, "--metric")
    if isinstance(named.value, nn.Module):
        raise UsageError(f"{named.name} is a model", expected=f"--metric takes {what}")
    _callable(named, "--metric", what, 1)

    def metric(model: nn.Module) -> float:
        """The user's score of a model."""
        value = named.call(model)
        if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
            raise UsageError(f"{named.name} returned no number", expected=what, got=kind_of(value))
        if not math.isfinite(value):
            raise UsageError(f"{named.name} returned {float(value)}", expected="a finite number")
        return float(value)

    return metric
