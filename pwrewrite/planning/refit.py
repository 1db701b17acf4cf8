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
and the solving, and the memory that of the live activations of the inputs used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convolution import ConvSpec
from ..modules import Factorized
from .lockstep import Forward, Lockstep
from .patches import batched, input_rows, output_rows, position_count, row_size
from .residuals import Residual
from .running import evaluating
from .statistics import LARGEST_ROW, Chunk, wide_dtype
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
) -> dict[str, float]:
    """Fits layers, biases and batch norms of a rewritten model, in place.

    Args:
        original: The original; stays as it is.
        rewritten: The rewritten model.
        targets: The layers to fit.
        norms: Paths of batch norms to re-estimate.
        order: Paths of both in the order in which they run.
        chunks: Calibration inputs; all of them are held at once.
        factors: Whether the factors are fitted, or biases and norms only.
        seed: Of the positions that are sampled.
        progress: Called with each path and how much is done.

    Returns:
        Path to the relative error of the weights of each layer whose factors were fitted.
    """
    inputs = list(chunks)
    by_path = {target.path: target for target in targets}
    keep = {(t.residual.module, t.residual.side) for t in targets if t.residual is not None}
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, float] = {}
    with (
        torch.no_grad(),
        evaluating(original),
        evaluating(rewritten),
        Lockstep(original, inputs, behind=list(by_path), before=list(norms), keep=keep) as before,
        Lockstep(rewritten, inputs, before=[*by_path, *norms], keep=keep) as after,
    ):
        for i, path in enumerate(order):
            if progress is not None:
                progress(path, i / len(order))
            if not (before.advance_to(path) and after.advance_to(path)):
                break
            module = rewritten.get_submodule(path)
            pairs = list(zip(before.forwards, after.forwards))
            if path not in by_path:
                _fit_norm(module, pairs)
            elif by_path[path].spec.transposed or not factors or row_size(by_path[path].spec) > LARGEST_ROW:
                _fit_bias(by_path[path], module, pairs)
            else:
                errors[path] = _fit_layer(by_path[path], module, pairs, original, generator)
            for key in keep - {_kept_for(by_path.get(later)) for later in order[i + 1 :]}:
                for forward in (*before.forwards, *after.forwards):
                    forward.kept.pop(key, None)
    return errors


def _kept_for(target: Target | None) -> tuple[str, str] | None:
    """What is kept in passing for a layer."""
    return None if target is None or target.residual is None else (target.residual.module, target.residual.side)


def _fit_layer(
    target: Target,
    module: Any,
    pairs: Sequence[tuple[Forward, Forward]],
    original: nn.Module,
    generator: torch.Generator,
) -> float:
    """Fits one layer to the outputs of the original, from the inputs in the rewritten model."""
    spec = target.spec
    assert isinstance(module, Factorized)
    moments = _Moments(spec.groups, row_size(spec), spec.out_channels // spec.groups, target.weight.device)
    scale = _scale_of(target, original)
    samples = sum(len(batched(_value(after), spec)) for _, after in pairs)
    for before, after in pairs:
        y, x = batched(_value(before), spec), batched(_value(after), spec)
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


def _fit_bias(target: Target, module: Any, pairs: Sequence[tuple[Forward, Forward]]) -> None:
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


def _fit_norm(module: nn.Module, pairs: Sequence[tuple[Forward, Forward]]) -> None:
    """Moves a batch norm's running mean by as much as the mean of what it reads."""
    assert isinstance(module, _BatchNorm)
    assert module.running_mean is not None
    old, new = (_channel_mean([_value(pair[side]) for pair in pairs]) for side in (0, 1))
    module.running_mean += (new - old).to(module.running_mean)


def _channel_mean(values: Sequence[Tensor]) -> Tensor:
    wide = wide_dtype(values[0].device)
    sums = sum(v.to(wide).sum([i for i in range(v.dim()) if i != 1]) for v in values)
    assert isinstance(sums, Tensor)
    return sums / sum(v.numel() // v.shape[1] for v in values)


def _sampled(count: int, spec: ConvSpec, samples: int, here: int, generator: torch.Generator) -> Tensor | None:
    per_sample = max(_LEAST_POSITIONS, ceil(_ROWS_PER_SIZE * row_size(spec) / max(samples, 1)))
    limit = per_sample if spec.dims else per_sample * here
    if count <= limit + limit // 4:
        return None
    return torch.randperm(count, generator=generator)[:limit].sort().values


def _float(rows: Tensor) -> Tensor:
    return rows if rows.dtype.itemsize >= 4 else rows.float()
