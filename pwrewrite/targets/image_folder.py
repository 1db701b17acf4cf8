"""A folder of images as calibration inputs. Needs Pillow, the extra ``images``.

Without ``--preprocess`` an image is resized so that it covers the size of the example input, cropped in the centre,
scaled to 0…1 and, where the model takes three channels, normalised: by the mean and standard deviation that a timm
model carries, else by ImageNet's, as nearly every classifier of torchvision and timm takes them. A model that takes a
list of images (a detector of torchvision) gets them at their own size and not normalised, which it does itself. With
``--preprocess`` its function gets the PIL image in RGB, as torchvision's transforms do.

Images are taken in an order drawn with a fixed seed, since folders are often sorted by class: a part of them is then
like the rest. The number of an image, for ``--labels``, is its place among the sorted paths.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..capturing import Inputs
from ..core.errors import UsageError, first_line
from ..core.numbers import dims
from ..core.text import few
from .arrays import SUFFIXES as ARRAY_SUFFIXES

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_BATCH = 32
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_FUNCTION = "--preprocess file.py:NAME, a function of a PIL image that returns a tensor C×H×W"


class ImageFolder:
    """Batches of the images in a folder and below, read anew every time.

    The arguments are as for `pwrewrite.targets.calibration.open_calibration`; ``preprocess`` makes a tensor ``C×H×W``
    of a PIL image.

    Raises:
        UsageError: There is no image or no Pillow, or the model does not take images and there is no ``preprocess``.
            Iterating raises it when no image can be read.
    """

    def __init__(
        self,
        path: Path,
        example_inputs: Inputs,
        *,
        preprocess: Callable[[Image], object] | None = None,
        size: int | None = None,
        labels: Tensor | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.path, self._preprocess, self._labels = path, preprocess, labels
        if find_spec("PIL") is None:
            message = f"{path} is a folder: reading images needs Pillow, which is not installed"
            raise UsageError(message, hint='pip install "pwrewrite[images]"')
        images = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        self.files = sorted(p for p in images if not any(part[0] == "." for part in p.relative_to(path).parts))
        if not self.files:
            arrays = sorted(p.name for p in path.iterdir() if p.suffix in ARRAY_SUFFIXES)
            got = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "an empty folder"
            hint = f"--calibration {path / arrays[0]}" if arrays else None
            raise UsageError(f"no images in {path}", expected=", ".join(SUFFIXES), got=got, hint=hint)
        if labels is not None and len(labels) != len(self.files):
            raise UsageError(f"{len(labels)} labels were given, and {path} holds {len(self.files)} images")
        self.samples = len(self.files) if size is None else min(size, len(self.files))
        self._order = random.Random(0).sample(range(len(self.files)), len(self.files))
        self._bad: dict[Path, str] = {}
        example, self._listed, self._name = _one_input(example_inputs, path, preprocess is not None)
        self._shape = tuple(example.shape)
        self._mean, self._std, self._whose = _normalisation(model)
        if preprocess is None and self._shape[-3] not in (1, 3):
            message = f"the model takes {self._shape[-3]} channels, and images have 1 or 3"
            raise UsageError(message, where=str(path), hint=_FUNCTION)

    @property
    def notes(self) -> tuple[str, ...]:
        """What should be told: how images become inputs, and which cannot be read, as far as that is known yet."""
        notes, images = [], len(self.files)
        if self._preprocess is None:
            how = "at their own size, scaled to 0…1"
            if not self._listed:
                cut = f"resized to cover {self._shape[-2]}×{self._shape[-1]}, cropped in the centre, scaled to 0…1"
                how = f"{cut}, " + (f"normalised by {self._whose}" if self._shape[-3] == 3 else "not normalised")
            notes.append(f"images of {self.path}: {how} (--preprocess does otherwise)")
        if self.samples < images:
            notes.append(f"{self.samples} of the {images} images in {self.path}, drawn at random with a fixed seed")
        if bad := len(self._bad):
            shown = few([f"{path.relative_to(self.path)} ({why})" for path, why in self._bad.items()])
            notes.append(f"cannot read {bad} of {images} images: {shown}; left out")
        return tuple(notes)

    def __iter__(self) -> Iterator[object]:
        """Batches: a tensor ``N×C×H×W``, or a list of images; with labels beside them where there are any."""
        readable = ((image, place) for place in self._order if (image := self._read(self.files[place])) is not None)
        taken, count = islice(readable, self.samples), 0
        while batch := list(islice(taken, _BATCH)):
            count += len(batch)
            yield self._batch([image for image, _ in batch], [place for _, place in batch])
        if not count:
            path, why = next(iter(self._bad.items()))
            raise UsageError(f"none of the {len(self.files)} images in {self.path} can be read", got=f"{path}: {why}")

    def _read(self, path: Path) -> Tensor | None:
        """One image as the model takes it; None where the file cannot be read, which is noted."""
        from PIL import Image, UnidentifiedImageError

        if path in self._bad:
            return None
        grey = self._preprocess is None and self._shape[-3] == 1
        try:
            with Image.open(path) as opened:
                image = opened.convert("L" if grey else "RGB")
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, UnidentifiedImageError)
            self._bad[path] = "no image that Pillow knows" if unknown else first_line(error)
            return None
        if self._preprocess is None:
            return self._standard(image)
        pixels = self._preprocess(image)
        if isinstance(pixels, np.ndarray):
            pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        if not isinstance(pixels, Tensor) or pixels.dim() != 3:
            got = f"a tensor {dims(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
            message = "--preprocess made no image of an image"
            raise UsageError(message, where=str(path), expected="a tensor C×H×W", got=got)
        return pixels

    def _standard(self, image: Image) -> Tensor:
        from PIL import Image

        if not self._listed:
            height, width = self._shape[-2:]
            scale = max(width / image.width, height / image.height)
            wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
            left, top = (wide - width) // 2, (high - height) // 2
            image = image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).div_(255)
        if pixels.dim() == 2:
            return pixels[None]
        pixels = pixels.permute(2, 0, 1).contiguous()
        if self._listed:
            return pixels
        return (pixels - torch.tensor(self._mean, device="cpu")[:, None, None]) / torch.tensor(self._std, device="cpu")[
            :, None, None
        ]

    def _batch(self, images: list[Tensor], places: list[int]) -> object:
        if self._listed:
            return (images,)
        if len(shapes := {tuple(image.shape) for image in images}) > 1:
            got, hint = ", ".join(map(dims, sorted(shapes)[:3])), "resize or crop them to one size"
            raise UsageError("--preprocess made images of different sizes", where=str(self.path), got=got, hint=hint)
        batch = torch.stack(images)
        labels = None if self._labels is None else self._labels[places]
        if self._name:
            return {self._name: batch, **({} if labels is None else {"labels": labels})}
        return batch if labels is None else (batch, labels)


def _one_input(example: Inputs, path: Path, preprocess: bool) -> tuple[Tensor, bool, str]:
    """The one image input of a model, whether it is a list of images, and its name if it is a keyword."""
    name, value = next(iter(example.items())) if isinstance(example, dict) and len(example) == 1 else ("", example)
    if isinstance(value, (tuple, list)) and len(value) == 1 and not name:
        value = value[0]
    images = value if isinstance(value, (tuple, list)) and all(isinstance(v, Tensor) for v in value) else ()
    image = images[0] if images else value
    plain = isinstance(image, Tensor) and image.dim() == (3 if images else 4) and image.is_floating_point()
    if isinstance(image, Tensor) and (plain or preprocess):
        return image, bool(images), name
    raise UsageError(
        f"{path} is a folder of images, and the model does not take one image",
        expected="one floating input N×C×H×W, or a list of images",
        hint="give arrays, or file.py:NAME that gives batches",
    )


def _normalisation(model: nn.Module | None) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean and standard deviation of a model's inputs, and whose they are."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, dict) and len(config.get("mean") or ()) == 3 and len(config.get("std") or ()) == 3:
        return tuple(config["mean"]), tuple(config["std"]), "the model's mean and standard deviation"
    return *_IMAGENET, "ImageNet's mean and standard deviation"
