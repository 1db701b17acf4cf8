"""Fits a rewritten model to the original on calibration inputs, in closed form and in one pass.

Layer by layer, in the order in which they run, with everything before already fitted: ``x̃`` is what the rewritten model
gives a layer to read, ``y`` what the original's layer writes. The linear map that is nearest to the original outputs is
the regularised least-squares one,

    Ŵ = W + (E[y x̃ᵀ] − W E[x̃ x̃ᵀ]) (E[x̃ x̃ᵀ] + λ)⁻¹        (centred; the bias makes up for the means)

and the chain takes its best approximation in the norm of ``E[x̃ x̃ᵀ]`` and of the output gradients: reduced-rank
regression (Izenman 1975). Zhang et al. 2016 (*Accelerating very deep convolutional networks*, "asymmetric"
reconstruction) refit the same way for one of the forms.

A layer whose output goes to a residual sum is fitted to its output plus what has gone wrong on the other side of the
sum by then (`pwrewrite.planning.residuals`), in the units of its own output: the sum is what later layers read.

A batch norm behind rewritten layers is re-estimated: its running mean moves by as much as the mean of what it reads.

All inputs move through both models together (`pwrewrite.planning.lockstep`), so the price is one forward of each model
and the solving. The live activations of all of them wait at every layer, in memory or on disk
(`pwrewrite.planning.spill`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.convolution import ConvSpec
from ..layers.factorized import Factorized
from .lockstep import Forward, Lockstep
from .patches import batched, input_rows, output_rows, position_count, row_size
from .residuals import Residual
from .running import evaluating
from .spill import Spill, give_back_memory
from .statistics import LARGEST_ROW, Chunk, samples_of, wide_dtype
from .weighted import WeightedLayer

RIDGE = 1e-3
"""How far the fit is drawn to the original weights, as a share of the mean square of what the layer reads."""

_RAISED = (1e-6, 1e-5, 1e-4, 1e-3)
_DEAD = 1e-2
_LEAST_POSITIONS = 64
_ROWS_PER_SIZE = 16


@dataclass(frozen=True)
class Target:
    """A layer to fit.

    Attributes:
        path: Its path.
        spec: The layer that was there.
        weight: Its weight, in the module's own layout.
        gradients: ``G`` at its output; None for the identity.
        residual: Where the other side of the sum that it writes into can be read; None where there is none.
    """

    path: str
    spec: ConvSpec
    weight: Tensor
    gradients: Tensor | None
    residual: Residual | None = None


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
        """``E[x xᵀ]``, ``E[y xᵀ]`` without the means, and the means."""
        x, y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count - x[:, :, None] * x[:, None, :]
        yx = self.yx / self.count - y[:, :, None] * x[:, None, :]
        return _positive((xx + xx.mT) / 2), yx, x + self._from_x[:, 0], y + self._from_y[:, 0]


def _positive(moment: Tensor) -> Tensor:
    """A covariance whose diagonal is raised as far as rounding has left it indefinite."""
    level = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[:, None, None]
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    for share in _RAISED:
        raised = moment + share * level * eye
        if not bool(torch.linalg.cholesky_ex(raised).info.any()):
            return raised
    return level * eye


def refit(
    original: nn.Module,
    rewritten: nn.Module,
    targets: Sequence[Target],
    norms: Sequence[str],
    order: Sequence[str],
    chunks: Iterable[Chunk],
    *,
    factors: bool = True,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
    spill: Spill | None = None,
) -> dict[str, float]:
    """Fits layers, biases and batch norms of a rewritten model, in place.

    Args:
        original: The original; stays as it is.
        rewritten: The rewritten model.
        targets: The layers to fit.
        norms: Paths of batch norms to re-estimate.
        order: Paths of both in the order in which they run.
        chunks: Calibration inputs.
        factors: Whether the factors are fitted, or biases and norms only.
        seed: Of the positions that are sampled.
        progress: Called with each path and how much is done.
        spill: Keeps inputs and activations, and is at its end with this; all of them are in memory where None.

    Returns:
        Path to the relative error of the weights of each layer whose factors were fitted.
    """
    by_path = {target.path: target for target in targets}
    keep = {(t.residual.module, t.residual.side) for t in targets if t.residual is not None}
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
        samples = [samples_of(*chunk) for chunk in inputs]
        chunks_of_first = sum(samples) / max(samples[0], 1)
        before = stack.enter_context(
            Lockstep(original, inputs, behind=list(by_path), before=list(norms), keep=keep, spill=spill)
        )
        after = stack.enter_context(Lockstep(rewritten, inputs, before=[*by_path, *norms], keep=keep, spill=spill))
        for i, path in enumerate(order):
            if progress is not None:
                progress(path, i / len(order))
            module = rewritten.get_submodule(path)
            pairs = _pairs_at(path, before, after, spill)
            try:
                if path not in by_path:
                    _fit_norm(module, pairs)
                elif by_path[path].spec.transposed or not factors or row_size(by_path[path].spec) > LARGEST_ROW:
                    _fit_bias(by_path[path], module, pairs)
                else:
                    errors[path] = _fit_layer(by_path[path], module, pairs, original, generator, chunks_of_first)
            except _NotReached:
                break
            for key in keep - {_kept_for(by_path.get(later)) for later in order[i + 1 :]}:
                for forward in (*before.forwards, *after.forwards):
                    forward.kept.pop(key, None)
            give_back_memory()
    return errors


class _NotReached(Exception):
    """A forward came to its end and not to a layer."""


def _pairs_at(path: str, before: Lockstep, after: Lockstep, spill: Spill | None) -> Iterator[tuple[Forward, Forward]]:
    """Runs the forwards of both models to a layer, chunk by chunk; what a pair holds is in memory while it is given.

    Raises:
        _NotReached: If one does not come there.
    """
    for number, pair in enumerate(zip(before.forwards, after.forwards)):
        if spill is not None:
            spill.wake(number)
        if not all(forward.advance_to(path) for forward in pair):
            raise _NotReached
        yield pair
        if spill is not None:
            spill.settle(number)


def _kept_for(target: Target | None) -> tuple[str, str] | None:
    """What is kept in passing for a layer."""
    return None if target is None or target.residual is None else (target.residual.module, target.residual.side)


def _fit_layer(
    target: Target,
    module: Any,
    pairs: Iterable[tuple[Forward, Forward]],
    original: nn.Module,
    generator: torch.Generator,
    chunks_of_first: float,
) -> float:
    """Fits one layer to the outputs of the original, from the inputs in the rewritten model.

    Args:
        target: The layer.
        module: What is there now.
        pairs: The forwards that stand at it.
        original: The original.
        generator: Of the positions that are sampled.
        chunks_of_first: How many chunks like the first one there are.

    Returns:
        How far the weights have moved, as a share.
    """
    spec = target.spec
    assert isinstance(module, Factorized)
    moments = _Moments(spec.groups, row_size(spec), spec.out_channels // spec.groups, target.weight.device)
    scale = _scale_of(target, original)
    samples = 0
    for before, after in pairs:
        y, x = batched(_value(before), spec), batched(_value(after), spec)
        samples = samples or round(len(x) * chunks_of_first)
        taken = _sampled(position_count(x, spec, tuple(y.shape[2:])), spec, samples, len(x), generator)
        rows = _float(output_rows(y, spec, taken))
        if target.residual is not None and scale is not None:
            key = (target.residual.module, target.residual.side)
            missing = before.kept[key] - after.kept[key]
            rows = rows + _float(output_rows(batched(missing, spec), spec, taken)) * scale.to(rows)
        moments.add(_float(input_rows(x, spec, taken)), rows)
    xx, yx, mean_x, mean_y = moments.centred()
    size = xx.shape[-1]
    level = xx.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    share = RIDGE + 0.02 * size / max(moments.count, 1)
    eye = torch.eye(size, dtype=xx.dtype, device=xx.device)
    weighted = WeightedLayer(target.weight, spec, xx, target.gradients)
    factor = torch.linalg.cholesky(xx + share * level * eye)
    kernel = weighted.rows + torch.cholesky_solve((yx - weighted.rows @ xx).mT, factor).mT
    fitted = WeightedLayer(kernel.reshape(target.weight.shape).to(xx), spec, xx, target.gradients).factors(
        module.form, module.widths, module.axes
    )
    made = fitted.reconstruct().reshape(kernel.shape)
    module.load_factors(fitted, None)
    if module.bias is not None:
        module.bias.copy_((mean_y - (made @ mean_x[:, :, None])[..., 0]).flatten())
    norm = float(weighted.rows.norm())
    return float((made - weighted.rows).norm()) / norm if norm else 0.0


def _scale_of(target: Target, original: nn.Module) -> Tensor | None:
    """What an error on the other side of a residual sum is in units of a layer's own output: ``(groups, 1, o)``."""
    if target.residual is None:
        return None
    shape = (target.spec.groups, 1, target.spec.out_channels // target.spec.groups)
    if not target.residual.norm:
        return torch.ones(shape, device=target.weight.device)
    norm: Any = original.get_submodule(target.residual.norm)
    if norm.running_var is None:
        return None
    gain = 1 / (norm.running_var + norm.eps).sqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach()
    dead = gain.abs() <= _DEAD * gain.abs().max()  # a channel that is switched off can make up for nothing
    return torch.where(dead, torch.zeros_like(gain), 1 / torch.where(dead, torch.ones_like(gain), gain)).reshape(shape)


def _value(forward: Forward) -> Tensor:
    assert forward.at is not None
    return forward.at.value


def _fit_bias(target: Target, module: Any, pairs: Iterable[tuple[Forward, Forward]]) -> None:
    """Moves the bias by the difference of the mean outputs."""
    assert isinstance(module, Factorized)
    spec, bias = target.spec, module.bias
    if bias is None:
        return
    total, count = torch.zeros(spec.out_channels, dtype=wide_dtype(bias.device), device=bias.device), 0
    for before, after in pairs:
        y, x = _value(before), _value(after)
        here = module.forward(x, list(y.shape[-spec.dims :])) if spec.transposed else module.forward(x)
        difference = (y - here).to(total)
        channel = difference.dim() - spec.dims - 1
        total += difference.sum([i for i in range(difference.dim()) if i != channel])
        count += difference.numel() // spec.out_channels
    bias.copy_(bias + (total / max(count, 1)).to(bias))


def _fit_norm(module: nn.Module, pairs: Iterable[tuple[Forward, Forward]]) -> None:
    """Moves a batch norm's running mean by as much as the mean of what it reads."""
    means = [_ChannelMean(), _ChannelMean()]
    for pair in pairs:
        for mean, forward in zip(means, pair):
            mean.add(_value(forward))
    assert isinstance(module, _BatchNorm)
    assert module.running_mean is not None
    old, new = (mean.value() for mean in means)
    module.running_mean += (new - old).to(module.running_mean)


class _ChannelMean:
    """The mean of every channel over several tensors ``(N, channels, …)``."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, x: Tensor) -> None:
        here = x.to(wide_dtype(x.device)).sum([i for i in range(x.dim()) if i != 1])
        self._sum = here if self._sum is None else self._sum + here
        self._count += x.numel() // x.shape[1]

    def value(self) -> Tensor:
        assert self._sum is not None
        return self._sum / self._count


def _sampled(count: int, spec: ConvSpec, samples: int, here: int, generator: torch.Generator) -> Tensor | None:
    per_sample = max(_LEAST_POSITIONS, ceil(_ROWS_PER_SIZE * row_size(spec) / max(samples, 1)))
    limit = per_sample if spec.dims else per_sample * here
    if count <= limit + limit // 4:
        return None
    return torch.randperm(count, generator=generator)[:limit].sort().values


def _float(rows: Tensor) -> Tensor:
    return rows if rows.dtype.itemsize >= 4 else rows.float()
