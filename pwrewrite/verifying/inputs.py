"""Inputs to try two models on: other values, other batch sizes, other spatial sizes than the example has.

The example inputs give the shapes. Where their floating values say something (not all constant), they are what
the first run sees, and variations of them (repeated, plus a quarter of their standard deviation in noise) what
the others see. Where they say nothing (zeros hide every difference) or there are none (``meta``), values are
drawn from a standard normal. Integers, booleans and single numbers are kept. All is seeded and leaves the
global random state alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from ..capturing import Inputs, split_inputs
from ..core.nested import Args, Kwargs, Tree, map_tensors
from ..core.numbers import dims
from .outputs import flatten

Arguments = tuple[Args, Kwargs]

#: Batch size and name of a spatial size; the example's where None.
Variant = tuple[int | None, str | None]

#: Other spatial sizes, by name: from the distance to the last dim and the size to the new size.
SIZES: dict[str, Callable[[int, int], int]] = {
    "half": lambda place, size: size // 2,
    "wider": lambda place, size: size if place else size + 32,
    "odd": lambda place, size: size + 1,
    "quarter": lambda place, size: size // 4,
}

#: Those below the example's, the one to try first first.
BELOW = ("quarter", "half")

_LEAST = {"half": 8, "quarter": 128}
"""Pixels that the example must have along each axis for a size to be tried."""


def map_arguments(inputs: Arguments, convert: Callable[[Tensor], Tensor]) -> Arguments:
    """The same inputs with every tensor converted."""
    args, kwargs = inputs
    return map_tensors(args, convert), map_tensors(kwargs, convert)


def copied(inputs: Arguments) -> Arguments:
    """The same inputs in tensors of their own, so that a model may write into them."""
    return map_arguments(inputs, torch.clone)


def _floating(t: Tensor) -> bool:
    return t.dtype.is_floating_point or t.dtype.is_complex


class Draws:
    """Makes inputs like the example's.

    Args:
        example_inputs: As `capture` takes them.
        device: Where the model is; None where it has no single device.
        seed: Of the values.

    Attributes:
        batch: The example's batch size; None where no batch axis is known.
        drawn: Whether the first inputs are drawn rather than given.
        images: The list of images that detection models take in place of a batch, if any.
    """

    def __init__(self, example_inputs: Inputs, device: torch.device | None, seed: int) -> None:
        self.args, self.kwargs = split_inputs(example_inputs)
        self.device, self.seed, self.random = device, seed, True
        self._tensors: list[Tensor] = list(flatten((self.args, self.kwargs)).tensors.values())
        floating = [t for t in self._tensors if _floating(t)]
        self.drawn = all(t.is_meta or t.numel() < 2 or bool((t == t.flatten()[0]).all()) for t in floating)
        self.images = self._find_images()
        batched = [t for t in floating if t.dim() > 1] or [t for t in self._tensors if t.dim()]
        first = batched[0].shape[0] if batched else 0
        self.batch: int | None = len(self.images) if self.images is not None else first or None
        self._spatial_from = 3 if max((t.dim() for t in floating), default=0) < 4 else 4

    def without_random_values(self) -> Draws:
        """The same, for a model that refuses random values: only the given ones are used."""
        same = copy(self)
        same.random = False
        return same

    def _find_images(self) -> list[Tensor] | None:
        """The list of images that detection models take in place of a batch."""
        values = (value for value in (*self.args, *self.kwargs.values()) if isinstance(value, (list, tuple)) and value)
        tensors = next((list(value) for value in values if all(isinstance(t, Tensor) for t in value)), [])
        return tensors if tensors and all(t.dim() == 3 and t.dtype.is_floating_point for t in tensors) else None

    def sizes(self) -> list[str]:
        """Names of the spatial sizes that can be tried."""
        spatial = [n for t in self._tensors for n in self._space(t)]
        names = dict.fromkeys((*BELOW, *SIZES))
        return [name for name in names if spatial and min(spatial) >= _LEAST.get(name, 1)]

    def size_text(self, size: str) -> str:
        """What a spatial size amounts to, such as ``112×112``."""
        return dims(_resized(next(filter(None, map(self._space, self._tensors))), size))

    def _space(self, t: Tensor) -> tuple[int, ...]:
        """Spatial sizes of an input; empty where it has none."""
        if not t.dtype.is_floating_point or t.dim() < self._spatial_from:
            return ()
        return tuple(t.shape[1:] if self.images is not None and t.dim() == 3 else t.shape[2:])

    def shapes(self, batch: int | None = None, size: str | None = None) -> Arguments:
        """Inputs without values, on ``meta``."""
        return self._build(batch, size, lambda t, shape: torch.empty(shape, dtype=t.dtype, device="meta"))

    def draw(self, batch: int | None = None, size: str | None = None, variant: int = 0) -> Arguments:
        """Inputs of the example's batch and size by default; variant 0 keeps given values, others vary them."""
        number = (variant * 8 + ["", *SIZES].index(size or "")) * 1009 + (batch or 0)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        plain = variant == 0 and size is None and batch in (None, self.batch)
        return self._build(batch, size, lambda t, shape: self._values(t, shape, plain, generator))

    def resized(self, sizes: Sequence[Mapping[int, int]], variant: int = 0) -> Arguments:
        """Inputs with values, in which axes of each tensor, in order, have the ``sizes`` given."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + variant)
        order = iter(sizes)

        def convert(t: Tensor) -> Tensor:
            other = next(order)
            return self._values(t, tuple(other.get(i, n) for i, n in enumerate(t.shape)), False, generator)

        return map_arguments((self.args, self.kwargs), convert)

    def _build(
        self, batch: int | None, size: str | None, make: Callable[[Tensor, tuple[int, ...]], Tensor]
    ) -> Arguments:
        def shape(t: Tensor) -> tuple[int, ...]:
            result = list(t.shape)
            if batch and self.images is None and self.batch and result and result[0] == self.batch:
                result[0] = batch
            space = self._space(t)
            if size and space:
                result[-len(space) :] = _resized(space, size)
            return tuple(result)

        def convert(t: Tensor) -> Tensor:
            return make(t, shape(t))

        def item(value: Tree) -> Tree:
            images = self.images
            if batch and images and isinstance(value, (list, tuple)) and [*map(id, value)] == [*map(id, images)]:
                return type(value)(convert(images[i % len(images)]) for i in range(batch))
            return map_tensors(value, convert)

        return tuple(map(item, self.args)), {key: item(value) for key, value in self.kwargs.items()}

    def _values(self, t: Tensor, shape: tuple[int, ...], plain: bool, generator: torch.Generator) -> Tensor:
        device = self.device or (torch.device("cpu") if t.is_meta else t.device)
        random = _floating(t) and self.random
        if random and self.drawn and (t.numel() > 1 or t.is_meta):
            return _normal(t, shape, generator).to(device, t.dtype)
        if t.is_meta:
            return torch.zeros(shape, dtype=t.dtype, device=device)
        values = _stretched(t.detach(), shape)
        if random and not plain and t.numel() > 1:
            spread = 0.25 * float(t.detach().abs().double().std())
            if 0 < spread < float("inf"):
                values = values + spread * _normal(t, shape, generator).to(t.device, t.dtype)
        return values.to(device)


def _normal(t: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    dtype = torch.complex64 if t.dtype.is_complex else torch.float32
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")


def _resized(space: tuple[int, ...], size: str) -> list[int]:
    """Spatial sizes at another size."""
    return [SIZES[size](len(space) - 1 - i, n) for i, n in enumerate(space)]


def _stretched(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same values cut or repeated to a shape."""
    if tuple(t.shape) == shape:
        return t.clone()
    for dim, n in enumerate(shape):
        if n != t.shape[dim]:
            t = t.index_select(dim, torch.arange(n, device=t.device) % t.shape[dim])
    return t.contiguous()
