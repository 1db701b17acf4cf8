"""Fits a rewritten model to the original on calibration inputs, in closed form and in one pass.

Layer by layer, in the order in which they run, with everything before already fitted: ``x̃`` is what the rewritten model
gives a layer to read, ``y`` what the original's layer writes. The linear map that is nearest to the original outputs is
the regularised least-squares one,

    Ŵ = W + (E[y x̃ᵀ] − W E[x̃ x̃ᵀ]) (E[x̃ x̃ᵀ] + λ)⁻¹        (centred where a bias or norm makes up for the means)

and the chain takes its best approximation in the norm of ``E[x̃ x̃ᵀ]`` and of the output gradients: reduced-rank
regression (Izenman 1975; Zhang et al. 2016, *Accelerating very deep convolutional networks*, for one of the forms).

A layer whose output goes to a residual sum is fitted to its output plus what has gone wrong on the other side of the
sum by then (`pwrewrite.planning.fit_steps`), in the units of its own output: the sum is what later layers read. The
running mean of a batch norm behind rewritten layers moves by as much as the mean of what it reads.

All inputs move through both models together (`pwrewrite.planning.lockstep`), so the price is one forward of each model
and the solving. The live activations of all of them wait at every layer, in memory or on disk
(`pwrewrite.planning.spill`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.convolution import ConvSpec
from ..forms.weighted import WeightedLayer
from ..layers.factorized import Factorized
from .lockstep import Forward, Lockstep
from .patches import batched, input_rows, output_rows, position_count, row_size, sampled
from .running import Chunk, Say, evaluating, samples_of, wide_dtype
from .spill import Spill, give_back_memory
from .statistics import LARGEST_ROW, level_of

RIDGE = 1e-3
"""How far the fit is drawn to the original weights, as a share of the mean square of what the layer reads."""

_RAISED = (1e-6, 1e-5, 1e-4, 1e-3)
_DEAD = 1e-2
_ROWS_PER_SIZE = 16

Pairs = Iterable[tuple[Forward, Forward]]
"""The forwards of the original and of the rewritten model on one chunk after the other, standing at one layer."""


@dataclass(frozen=True, slots=True)
class Residual:
    """Where the other side of a layer's sum can be read: a module's path, and its ``input`` or ``output``.

    ``norm`` is the path of the batch norm between the layer and the sum; ``""`` where there is none.
    """

    norm: str
    place: tuple[str, str]


@dataclass(frozen=True)
class Target:
    """A layer to fit: the one that was there, and its weight in the module's own layout.

    Of a layer whose inputs were narrowed it is the narrower one, which takes the nearest linear map itself.

    Attributes:
        gradients: ``G`` at its output; None for the identity.
        residual: Where the other side of the sum that it writes into can be read; None where there is none.
        factors: Whether its factors are fitted, or its bias only.
        part: Which part of the rewritten module at this path it is; all of it where empty.
    """

    path: str
    spec: ConvSpec
    weight: Tensor
    gradients: Tensor | None
    residual: Residual | None = None
    factors: bool = True
    centred: bool = True
    part: str = ""

    def module(self, rewritten: nn.Module) -> nn.Module:
        """The module that is fitted."""
        return rewritten.get_submodule(f"{self.path}.{self.part}" if self.part else self.path)


class _Moments:
    """Sums of what a rewritten layer reads and the original's writes, off the means of the first rows.

    A layer may read much the same whatever the inputs are; off its mean little is lost to rounding.
    """

    def __init__(self, groups: int, size: int, outputs: int, device: torch.device) -> None:
        empty = torch.zeros(0, dtype=wide_dtype(device), device=device)
        self.xx, self.yx = empty.new_zeros(groups, size, size), empty.new_zeros(groups, outputs, size)
        self.x, self.y = empty.new_zeros(groups, size), empty.new_zeros(groups, outputs)
        self.count = 0
        self._from_x, self._from_y = empty, empty

    def add(self, x: Tensor, y: Tensor) -> None:
        if not self.count:
            self._from_x, self._from_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self._from_x, y - self._from_y
        self.xx += (x.mT @ x).to(self.xx)
        self.yx += (y.mT @ x).to(self.xx)
        self.x += x.sum(1).to(self.xx)
        self.y += y.sum(1).to(self.xx)
        self.count += x.shape[1]

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``E[x xᵀ]`` and ``E[y xᵀ]`` without the means, and the means of ``x`` and ``y``."""
        x, y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count - x[:, :, None] * x[:, None, :]
        yx = self.yx / self.count - y[:, :, None] * x[:, None, :]
        return _positive((xx + xx.mT) / 2), yx, x + self._from_x[:, 0], y + self._from_y[:, 0]


def _positive(moment: Tensor) -> Tensor:
    """A covariance whose diagonal is raised as far as rounding has left it indefinite."""
    for share in _RAISED:
        raised = moment + share * level_of(moment)
        if not bool(torch.linalg.cholesky_ex(raised).info.any()):
            return raised
    return level_of(moment)


def refit(
    original: nn.Module,
    rewritten: nn.Module,
    steps: Sequence[Target | str],
    chunks: Iterable[Chunk],
    say: Say = lambda what, share: None,
    *,
    kept: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    spill: Spill | None = None,
) -> dict[str, float]:
    """Fits layers, biases and batch norms of a rewritten model, in place; the original stays as it is.

    Args:
        steps: The layers to fit and the paths of the batch norms to re-estimate, in the order in which they run.
        kept: The channels that norms still have, by path, of those that have lost some.
        seed: Of the positions that are sampled.
        spill: Holds inputs and activations, and is at its end with this; all are in memory where None.

    Returns:
        Path to the relative error of the weights of each layer whose factors were fitted.
    """
    kept = kept or {}
    targets = [step for step in steps if isinstance(step, Target)]
    layers, norms = [target.path for target in targets], [step for step in steps if isinstance(step, str)]
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, float] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(original))
        stack.enter_context(evaluating(rewritten, buffers=False))
        if spill is not None:
            stack.enter_context(spill)
        inputs = [chunk if spill is None else spill.keep(number, chunk) for number, chunk in enumerate(chunks)]
        stack.callback(inputs.clear)
        share = sum(samples_of(*chunk) for chunk in inputs) / max(samples_of(*inputs[0]), 1)
        # Where the other sides of residual sums can be read, up to the last step that does.
        record = {step.residual.place: i for i, step in enumerate(steps) if isinstance(step, Target) and step.residual}
        before = Lockstep(original, inputs, behind=layers, before=norms, record=record, spill=spill)
        stack.enter_context(before)
        after = stack.enter_context(Lockstep(rewritten, inputs, before=[*layers, *norms], record=record, spill=spill))
        for i, step in enumerate(steps):
            path = step if isinstance(step, str) else step.path
            say(f"fitting {path}", i / len(steps))
            module = rewritten.get_submodule(path) if isinstance(step, str) else step.module(rewritten)
            pairs = _pairs_at(path, before, after, spill)
            try:
                if isinstance(step, str):
                    _fit_norm(cast(_BatchNorm, module), original.get_submodule(path), pairs, kept.get(path))
                elif not step.factors or step.spec.transposed or row_size(step.spec) > LARGEST_ROW:
                    _fit_bias(step.spec, module, pairs)
                else:
                    moments = _gather_moments(step, pairs, _residual_scale(step, original), generator, share)
                    error = _fit_layer(step, module, moments)
                    errors |= {path: error} if isinstance(module, Factorized) else {}
            except _NotReached:
                break
            for place in (place for place, last in record.items() if last <= i):
                for forward in (*before.forwards, *after.forwards):
                    forward.recorded.pop(place, None)
            give_back_memory()
    return errors


class _NotReached(Exception):
    """A forward came to its end and not to a layer."""


def _pairs_at(path: str, before: Lockstep, after: Lockstep, spill: Spill | None) -> Iterator[tuple[Forward, Forward]]:
    """Runs the forwards of both models to a layer, chunk by chunk; what a pair holds is in memory while it is out."""
    for number, pair in enumerate(zip(before.forwards, after.forwards)):
        if spill is not None:
            spill.wake(number)
        if not all(forward.advance_to(path) for forward in pair):
            raise _NotReached
        yield pair
        if spill is not None:
            spill.settle(number)


def _gather_moments(
    target: Target, pairs: Pairs, scale: Tensor | None, generator: torch.Generator, chunks_of_first: float
) -> _Moments:
    """The moments of a layer's input and of what its output should be, from so many chunks like the first one."""
    spec = target.spec
    moments = _Moments(spec.groups, row_size(spec), spec.out_channels // spec.groups, target.weight.device)
    samples = 0
    for before, after in pairs:
        y, x = batched(before.value, spec), batched(after.value, spec)
        samples = samples or max(1, round(len(x) * chunks_of_first))
        per_sample = _ROWS_PER_SIZE * row_size(spec) / samples
        taken = sampled(position_count(x, spec, tuple(y.shape[2:])), spec, per_sample, len(x), generator)
        rows = output_rows(y, spec, taken)
        if target.residual is not None and scale is not None:
            place = target.residual.place
            missing = batched(before.recorded[place] - after.recorded[place], spec)
            rows = rows + output_rows(missing, spec, taken) * scale.to(rows)
        moments.add(input_rows(x, spec, taken), rows)
    return moments


def _fit_layer(target: Target, module: nn.Module, moments: _Moments) -> float:
    """Fits a layer to the outputs of the original, from what the rewritten model reads; its weights' relative error."""
    xx, yx, x, y = moments.centred()
    if not target.centred:
        xx, yx = xx + x[:, :, None] * x[:, None, :], yx + y[:, :, None] * x[:, None, :]
    weighted = WeightedLayer(target.weight, target.spec, xx, target.gradients)
    root = torch.linalg.cholesky(xx + (RIDGE + 0.02 * xx.shape[-1] / max(moments.count, 1)) * level_of(xx))
    kernel = weighted.rows + torch.cholesky_solve((yx - weighted.rows @ xx).mT, root).mT
    if isinstance(module, Factorized):
        factors = module.form.fit(weighted.with_kernel(kernel), module.widths, module.axes)
        approximation = factors.reconstruct().reshape(kernel.shape)
        module.load_factors(factors, None)
    else:
        approximation = kernel
        cast(Tensor, module.weight).copy_(kernel.reshape(target.weight.shape))
    if (bias := cast("Tensor | None", module.bias)) is not None:
        bias.copy_((y - (approximation @ x[:, :, None])[..., 0]).flatten())
    norm = float(weighted.rows.norm())
    return float((approximation - weighted.rows).norm()) / norm if norm else 0.0


def _residual_scale(target: Target, original: nn.Module) -> Tensor | None:
    """What an error on the other side of a residual sum is in units of a layer's own output: ``(groups, 1, o)``."""
    if target.residual is None:
        return None
    shape = (target.spec.groups, 1, target.spec.out_channels // target.spec.groups)
    if not target.residual.norm:
        return torch.ones(shape, device=target.weight.device)
    norm = cast(_BatchNorm, original.get_submodule(target.residual.norm))
    if norm.running_var is None:
        return None
    gain = 1 / (norm.running_var + norm.eps).sqrt()
    if norm.affine:
        gain = gain * norm.weight.detach()
    dead = gain.abs() <= _DEAD * gain.abs().max()  # a channel that is switched off can make up for nothing
    return (1 / gain).masked_fill(dead, 0).reshape(shape)


def _fit_bias(spec: ConvSpec, module: nn.Module, pairs: Pairs) -> None:
    """Moves the bias by the difference of the mean outputs."""

    def outputs() -> Iterator[tuple[Tensor, Tensor]]:
        for before, after in pairs:
            size = list(before.value.shape[-spec.dims :]) if spec.transposed else None
            yield before.value, module.forward(after.value, *(() if size is None else (size,)))

    if (bias := cast("Tensor | None", module.bias)) is not None:
        bias.add_(_mean_difference(outputs(), -spec.dims - 1).to(bias))


def _fit_norm(module: _BatchNorm, old: nn.Module, pairs: Pairs, kept: Sequence[int] | None) -> None:
    """Moves a batch norm's running mean from where it was by as much as the mean of what it reads."""
    assert module.running_mean is not None
    channels = slice(None) if kept is None else list(kept)

    def inputs() -> Iterator[tuple[Tensor, Tensor]]:
        for before, after in pairs:
            yield after.value, before.value[:, channels]

    shift = _mean_difference(inputs(), 1)
    module.running_mean.copy_(cast(Tensor, old.running_mean)[channels] + shift.to(module.running_mean))


def _mean_difference(pairs: Iterable[tuple[Tensor, Tensor]], channel: int) -> Tensor:
    """The mean difference of tensors in each channel, which is that dim of theirs."""
    total, count = torch.zeros((), device="cpu"), 0
    for first, second in pairs:
        wide = wide_dtype(first.device)
        difference = first.to(wide) - second.to(wide)
        others = [dim for dim in range(difference.dim()) if dim != channel % difference.dim()]
        total, count = total + difference.sum(others), count + difference.numel() // difference.shape[channel]
    return total / count
