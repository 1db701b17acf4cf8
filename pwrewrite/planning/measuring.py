"""What the model loses with a single change, measured: for changes that are too large to be predicted well.

What is predicted from gradients holds to second order, and as if errors at different positions, and of channels that go
together, had nothing to do with each other. For the factors of one layer that is near enough. For channels that go, and
for modules that go as a whole, it can be ten times too little: on ResNet-20 at 30% of its MACs plans with them, by
their predictions, lost three to seven times as much on held-out inputs as plans without. So of these a plan's own are
measured, one by one, in the same unit (`pwrewrite.planning.statistics.exact_loss`), before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.convolution import ConvSpec
from ..core.nested import Args
from ..core.plan import Op
from ..decompose.layout import from_forward_layout
from ..decompose.nearest_map import NearestMap
from ..edit.actions.substitute import RANGES
from ..passes.base import weight_of
from .candidates import ReplaceableLayers
from .regions import fitted_map
from .running import Chunk, evaluating, first_samples, run_seeded
from .statistics import Statistics, exact_loss

SAMPLES, FEW = 16, 8
"""On how many inputs the losses of a plan's changes are measured, and on how many those of a whole frontier's."""
_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class LossMeter:
    """Measures what a model, which stays as it is, loses on a few calibration inputs with one op carried out."""

    def __init__(self, model: nn.Module, replaceable: ReplaceableLayers, statistics: Statistics, chunk: Chunk) -> None:
        self._model, self._replaceable, self._statistics = model, replaceable, statistics
        self._chunk = chunk
        self._before: dict[int, tuple[Chunk, object]] = {}

    def loss(self, op: Op, samples: int = SAMPLES) -> float:
        """The loss with a ``narrow`` or ``substitute`` op; infinite where outputs are not finite any more."""
        with torch.no_grad(), evaluating(self._model):
            chunk, before = self._reference(samples)
            with self._narrowed(op) if op.action == "narrow" else self._substituted(op):
                after = run_seeded(self._model, chunk, 0)
        loss = exact_loss(before, after, self._statistics.outputs)
        return loss if math.isfinite(loss) else math.inf

    def _reference(self, samples: int) -> tuple[Chunk, object]:
        """Some inputs, all of the first chunk where it cannot be cut, and what the model makes of them."""
        if samples not in self._before:
            chunk = first_samples(self._chunk, samples)
            try:
                self._before[samples] = chunk, run_seeded(self._model, chunk, 0)
            except Exception:  # its first axis is no batch, or other inputs have one that was not seen
                self._before[samples] = self._chunk, run_seeded(self._model, self._chunk, 0)
        return self._before[samples]

    @contextmanager
    def _narrowed(self, op: Op) -> Iterator[None]:
        """The readers' weights such that they read some channels only."""
        with ExitStack() as stack:
            layers = {reader.layer.path: reader for unit in self._replaceable.units for reader in unit.readers}
            for each in op.settings["readers"]:
                reader = layers[each["path"]]
                weight = weight_of(reader.layer, self._replaceable.owners)
                assert weight is not None
                kept = self._replaceable.kept(op, each["path"], weight.detach(), self._statistics)
                if kept is None:
                    continue
                module, spec = self._model.get_submodule(each["path"]), self._replaceable.specs[each["path"]]
                whole = from_forward_layout(kept.reconstruct(), 1, spec.transposed).reshape(weight.shape)
                stack.enter_context(_holding(weight, whole))
                if isinstance(bias := getattr(module, "bias", None), Tensor):
                    stack.enter_context(_holding(bias, bias.detach() + kept.shift.to(bias)))
                elif reader.norm:
                    mean = self._model.get_submodule(reader.norm).running_mean
                    assert isinstance(mean, Tensor)
                    stack.enter_context(_holding(mean, mean - kept.shift.to(mean)))
            yield

    @contextmanager
    def _substituted(self, op: Op) -> Iterator[None]:
        """A module that gives what a map, or nothing, makes of its input."""
        (region,) = (region for region in self._replaceable.regions if region.path == op.path)
        near = None if op.settings["drop"] else fitted_map(self._replaceable, op.path, self._statistics)
        module, reads = self._model.get_submodule(op.path), list[Tensor]()

        def before(module: nn.Module, args: Args) -> None:
            reads.append(args[0].clone())

        def after(module: nn.Module, args: Args, output: Tensor) -> Tensor:
            mapped = _mapped(reads.pop(), region.spec, near)
            return mapped if near is None or region.activation is None else RANGES[region.activation]()(mapped)

        handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _mapped(x: Tensor, spec: ConvSpec, near: NearestMap | None) -> Tensor:
    """What a map makes of a tensor; the tensor where there is none."""
    if near is None:
        return x
    weight, bias = (tensor.to(x) for tensor in (near.reconstruct(), near.bias))
    if not spec.dims:
        return functional.linear(x, weight, bias)
    convolution: Callable[..., Tensor] = _CONVOLUTIONS[spec.dims]
    return convolution(x, weight, bias, spec.stride)


@contextmanager
def _holding(tensor: Tensor, values: Tensor) -> Iterator[None]:
    """A parameter or buffer that holds other values."""
    before = tensor.data
    tensor.data = values.to(before)
    try:
        yield
    finally:
        tensor.data = before
