"""Calibration inputs for the command line: what ``--calibration`` names, as an iterable of batches.

================================ ====================================================================================
``x.npy``, ``x.npz``             an array of samples; arrays named like the keyword inputs, or ``arr_0``, ``arr_1``…
``x.safetensors``                in order for several positional ones; ``images``, ``x`` or ``inputs`` beside others
a folder                         images, in it and below (`pwrewrite.targets.image_folder`)
``file.py:NAME``                 an iterable of batches, or a function that gives one
================================ ====================================================================================

``--preprocess`` is called with whole batches of a file's arrays (NumPy's, or tensors from safetensors; several inputs
by position, or by name as the model takes them), with single images of a folder, and not with what code gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ..capturing import Inputs, split_inputs
from ..capturing.inputs import input_names
from ..core.errors import UsageError
from ..core.nested import Tree
from ..core.numbers import dims
from .arrays import LABEL_NAMES, SUFFIXES, Rows, Stored, open_arrays
from .image_folder import ImageFolder
from .user_code import suggest_files
from .user_objects import is_named, open_function, open_iterable

BATCH = 32

_USUAL = ("images", "image", "inputs", "input", "x", "data", "pixel_values", "arr_0")
_EXPECTED = f"a {', '.join(SUFFIXES)} file, a folder of images, or file.py:NAME"


def open_calibration(
    text: str,
    *,
    example_inputs: Inputs,
    preprocess: str | None = None,
    size: int | None = None,
    labels: Tensor | None = None,
    model: nn.Module | None = None,
) -> Iterable[object]:
    """What ``--calibration`` names, as an iterable of batches, labels beside the inputs where there are any.

    What is read from files can be gone through again, holds one batch in memory, and has ``notes``.

    Args:
        text: A file, a folder, or ``file.py:NAME``.
        example_inputs: What the model takes.
        preprocess: ``file.py:NAME`` of a function that makes inputs of what is stored.
        size: At most so many samples: the first ones of arrays, ones drawn at random of a folder.
        labels: A class for each sample of the file or (in the order of their paths) each image of the folder.
        model: The model; tells what its inputs are called, and how the images of a folder are normalised.

    Raises:
        UsageError: There is no such thing, or it does not suit the model.
        TargetError: The user's code cannot be imported, or raised.
    """
    path = Path(text)
    if not path.exists() and is_named(text):
        if preprocess is not None or labels is not None:
            option = "--preprocess" if preprocess is not None else "--labels"
            hint = "let it give inputs as the model takes them" + ("" if preprocess else ": (inputs, labels)")
            raise UsageError(f"{option} is for files, and --calibration is code: {text}", hint=hint)
        return open_iterable(text)
    if not path.exists():
        raise UsageError(f"no such file or folder: {text}", expected=_EXPECTED, hint=suggest_files(path, SUFFIXES))
    function = open_function(preprocess, "--preprocess") if preprocess is not None else None
    if path.is_dir():
        return ImageFolder(path, example_inputs, preprocess=function, size=size, labels=labels, model=model)
    if path.suffix == ".py":
        raise UsageError(f"--calibration {text} names nothing in the file", expected=_EXPECTED, hint=f"{text}:NAME")
    return ArrayFile(path, example_inputs, preprocess=function, size=size, labels=labels, model=model)


class ArrayFile:
    """Batches from a file of arrays, read anew every time; the arguments are as for `open_calibration`.

    ``preprocess`` makes inputs of a batch; without ``labels`` those in the file are taken. A `UsageError` says that the
    file cannot be read, does not say which arrays are the inputs, or holds images as bytes and nothing makes them
    floats.
    """

    def __init__(
        self,
        path: Path,
        example_inputs: Inputs,
        *,
        preprocess: Callable[..., object] | None = None,
        size: int | None = None,
        labels: Tensor | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.path, self.notes = path, list[str]()
        self._preprocess, self._labels = preprocess, labels
        args, kwargs = split_inputs(example_inputs)
        if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):  # its keys name the arrays
            args, kwargs = split_inputs(args[0])
        self._names = tuple(kwargs)
        self._parameters = () if model is None else tuple(input_names(model, args, kwargs))
        self._listed = len(args) == 1 and isinstance(args[0], (tuple, list))
        self._inputs, self._stored_labels = self._chosen(open_arrays(path), len(args) + len(kwargs))
        counts = {str(array): array.samples(path) for array in self._all()}
        if len(set(counts.values())) > 1:
            raise UsageError(f"the arrays in {path} do not hold as many samples each", got=", ".join(counts))
        self._total = next(iter(counts.values()))
        if labels is not None and len(labels) != self._total:
            raise UsageError(f"{len(labels)} labels were given, and {path} holds {self._total} samples")
        self.samples = self._total if size is None else min(size, self._total)
        if preprocess is None:
            _refuse_bytes(path, self._inputs, [*args, *kwargs.values()])

    def __iter__(self) -> Iterator[object]:
        """Batches: an input, a tuple or a dict of them, with labels last where there are any."""
        streams = [array.parts(BATCH, self.samples) for array in self._all()]
        for number, parts in enumerate(zip(*streams, strict=True)):
            inputs = list(parts[: len(self._inputs)])
            first = number * BATCH
            labels = parts[-1] if self._stored_labels is not None else None
            if self._labels is not None:
                labels = self._labels[first : first + len(inputs[0])]
            yield self._batch(inputs, labels, first)

    def _all(self) -> list[Stored]:
        return [*self._inputs, *([] if self._stored_labels is None else [self._stored_labels])]

    def _batch(self, inputs: list[Rows], labels: Rows | None, first: int) -> object:
        if self._preprocess is not None:
            # Copies: what is mapped or streamed is read-only, and torch.from_numpy wants to write.
            inputs = [np.array(value) if isinstance(value, np.ndarray) else value for value in inputs]
        named = dict(zip(self._names, inputs, strict=True)) if self._names else {}
        if self._preprocess is not None:
            batch = self._preprocess(**named) if len(named) > 1 else self._preprocess(*inputs)
            self._check_batch(batch, len(inputs[0]), first)
        else:
            batch = named or (inputs[0] if len(inputs) == 1 else tuple(inputs))
        if self._listed and isinstance(batch, Iterable) and not isinstance(batch, (list, tuple)):
            return list(batch)
        if labels is None:
            return batch
        if isinstance(batch, Mapping):
            return {**batch, "labels": labels}
        return (*batch, labels) if isinstance(batch, (tuple, list)) else (batch, labels)

    def _check_batch(self, batch: object, count: int, first: int) -> None:
        """Refuses what ``--preprocess`` made of a batch, if it has lost or gained samples."""
        values = list(batch.values()) if isinstance(batch, Mapping) else batch
        if self._listed and isinstance(batch, list):
            values = np.empty(len(batch))
        for value in values if isinstance(values, (tuple, list)) else [values]:
            if isinstance(value, (Tensor, np.ndarray)) and value.ndim and len(value) != count:
                message = f"--preprocess made {dims(value.shape)} of a batch of {count} samples"
                where = f"samples {first} to {first + count - 1} of {self.path}"
                hint = "it is called with a batch at a time, and must keep the number of samples"
                raise UsageError(message, where=where, hint=hint)

    def _chosen(self, arrays: Mapping[str, Stored], count: int) -> tuple[list[Stored], Stored | None]:
        """The arrays that are inputs, and the one that holds labels, where none are given beside the file."""
        named = self._names or self._parameters
        known = self._names or (named if len(named) == count and all(name in arrays for name in named) else ())
        labels = next((a for n, a in arrays.items() if n in LABEL_NAMES and n not in known), None)
        rest = {n: a for n, a in arrays.items() if a is not labels}
        if labels is not None and (len(labels.shape) > 2 or not labels.dtype.startswith(("int", "uint"))):
            self.notes.append(f"left out {labels.name} of {self.path}: {labels} are no classes")
            labels = None
        wanted = known or tuple(f"arr_{n}" for n in range(count))
        usual = [name for name in _USUAL if name in rest] or list(rest)[: len(rest) == 1]
        if all(name in rest for name in wanted):
            chosen = [rest[name] for name in wanted]
        elif count == 1 and usual:
            chosen = [rest[usual[0]]]
        else:
            single = count == 1 and not self._names
            expected = f"one array, or one called {_USUAL[0]}" if single else ", ".join(named or wanted)
            got = ", ".join(f"{name} ({array})" if name else str(array) for name, array in arrays.items())
            message = f"nothing says which arrays in {self.path} are the model's inputs"
            raise UsageError(
                message, expected=expected, got=got, hint="--batch file.py:NAME makes inputs of anything else"
            )
        if left := [name for name, array in rest.items() if array not in chosen]:
            self.notes.append(f"left out {', '.join(left)} of {self.path}")
        return chosen, labels if self._labels is None else None


def _refuse_bytes(path: Path, inputs: list[Stored], values: list[Tree]) -> None:
    """Refuses images stored as bytes for a model that takes floats, when nothing says how they become floats."""
    for stored, value in zip(inputs, values, strict=True):
        expected = value[0] if isinstance(value, (tuple, list)) and value else value
        if stored.dtype != "uint8" or not isinstance(expected, Tensor) or not expected.is_floating_point():
            continue
        last = len(stored.shape) == 4 and stored.shape[-1] in (1, 3, 4) and stored.shape[1] not in (1, 3, 4)
        sizes = "×".join(map(str, ("N", *expected.shape[1 if expected is value else 0 :])))
        steps = "makes them floats, scaled and normalised as in training" + (", channels first" if last else "")
        hint, got = f"--preprocess file.py:NAME, a function of a batch that {steps}", ", channels last" if last else ""
        message = f"{stored.name + ' in ' if stored.name else ''}{path} holds bytes, and the model takes floats"
        wanted = f"{str(expected.dtype).removeprefix('torch.')} {sizes}"
        raise UsageError(message, expected=wanted, got=f"{stored}{got}", hint=hint)
