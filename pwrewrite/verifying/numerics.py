r"""How far two outputs are apart, and how far they may be.

**Exact edits.** Let ``f`` be the original, ``f̂`` the rewritten model, and ``f*`` the original's copy in float64, which
equals both in real numbers. ``e = ‖f − f*‖ / ‖f*‖`` *measures* what rounding does to this network with these weights,
its own amplification included. ``f̂`` does about as many roundings of about the same numbers in another order (a fold
rounds each weight once more), so an honest rewrite stays within a small multiple of ``e``, and we allow

    ‖f̂ − f*‖ / ‖f*‖  ≤  max(4·e, u).

(Measured on torchvision models with every convolution split in two: between 1·e and 2·e.) ``u`` is what one layer may
do by itself, where ``e`` is small by luck: eps in half precision, whose kernels accumulate in float32 and round once;
8 eps in float32 (1e-6) and float64, where the order of summation and the algorithm are the kernel's own. Real mistakes
are larger: a norm's ``eps`` left out or tanh-GELU for erf-GELU change outputs by 1e-4 and more.

Each tensor is judged by its own norm, and where the reference is zero throughout by that of the inputs. Where the model
does not run in float64, a half-precision model is measured against float32. Failing that, and for a model in float64,
``e`` is what an input (in float64 also the weights) changed by one rounding does to the original: the same
amplification, but of one rounding among those of ``D`` layers, which add up as √D. The bound is then
``max(16·e, 4·u·√D)`` against the original itself, and the check says so.

Two runs that are each within a bound of ``f*`` are within ``bound + e`` of each other; at other batch and spatial sizes
twice that is allowed, since a smaller map averages less; only where that is not enough does the float64 copy run there.

**Approximate edits** have their error reported, and a bound only where the caller sets one. Integers and booleans must
agree but for as many elements as rounding flips: four times those that the float64 copy flips, or one in a thousand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, sqrt
from sys import float_info

import torch
from torch import Tensor

from .outputs import Flat, flatten


def roundoff(dtypes: Collection[torch.dtype]) -> float:
    """``u``: what one layer in the coarsest of the dtypes may round differently, see above."""
    eps = max((torch.finfo(d).eps for d in dtypes if d.is_floating_point or d.is_complex), default=2.0**-23)
    return (1 if eps > 1e-4 else 8) * eps


def _real(t: Tensor) -> Tensor:
    """A tensor as real numbers of four bytes or more."""
    t = torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t.detach()
    return t.float() if t.dtype.itemsize < 4 else t


def _norms(value: Tensor, reference: Tensor) -> tuple[float, float, int]:
    """Norms of the difference and of the reference where that is finite, and how often only ``value`` is not finite.

    A difference below the smallest normal number counts as none: what is as small has few digits left, or becomes zero.
    """
    a, b = _real(value), _real(reference).to(value.device)
    difference, norm = norm_of(a - b), norm_of(b)
    if isfinite(difference) and isfinite(norm):
        least = max((torch.finfo(t.dtype).tiny for t in (a, b) if t.is_floating_point()), default=0.0)
        return (difference if difference > least * sqrt(b.numel()) else 0.0), norm, 0
    a, b = a.double(), b.double()
    sound = torch.isfinite(b)
    spoiled = int((sound & ~torch.isfinite(a)).sum())
    if not bool(sound.all()):
        a, b = a.where(sound, 0.0), b.where(sound, 0.0)
    return norm_of(a - b), norm_of(b), spoiled


def norm_of(t: Tensor) -> float:
    """Euclidean norm, summed in float64 and without a copy in it."""
    real = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return float(torch.linalg.vector_norm(real, dtype=torch.float64))


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """``‖value − reference‖ / ‖reference‖``: ∞ where only ``value`` is not finite, the largest float at reference 0."""
    difference, norm, spoiled = _norms(value, reference)
    if spoiled:
        return inf
    return difference / norm if norm else (float_info.max if difference else 0.0)


@dataclass(slots=True)
class Comparison:
    """How two outputs compare: sentences on what differs, and paths."""

    error: float | None = None  # ``‖y − ŷ‖ / ‖y‖`` of all floating tensors together; None without any, or for zeros
    worst: float = 0.0  # the largest of a single tensor
    spoiled: list[str] = field(default_factory=list)  # NaN or Inf in the rewritten model only
    exceeded: list[str] = field(default_factory=list)
    compared: int = 0  # how many floating tensors were compared
    zero: list[str] = field(default_factory=list)  # paths of which the original's are zero throughout
    uncompared: list[str] = field(default_factory=list)  # paths whose shapes differ


@dataclass(slots=True)
class Bound:
    """What may differ: relative differences of floating tensors, and numbers of elements of others."""

    limit: float = inf  # per tensor
    limits: Mapping[str, float] = field(default_factory=dict)  # of single tensors, by path
    overall: float = inf  # over all tensors together
    flips: Mapping[str, int] | None = None  # by path; None for any number
    scale: float = 1.0  # root mean square of the inputs, which stands in for a reference that is zero


def compare(before: Flat, after: Flat, bound: Bound) -> Comparison:
    """Compares the values of two outputs, the first of which is the reference, within a bound."""
    result = Comparison()
    squares = norms = 0.0
    flipped = {} if bound.flips is None else flips(before, after)
    for path, reference in before.tensors.items():
        value = after.tensors.get(path)
        if value is None or value.shape != reference.shape:
            result.uncompared.append(path)
        elif path not in before.floating:
            allowed = max((bound.flips or {}).get(path, 0), value.numel() // 1000)
            if (count := flipped.get(path, 0)) > allowed:
                result.exceeded.append(f"output{path} differs in {count} of {value.numel()} values, allowed {allowed}")
        else:
            result.compared += 1
            difference, norm, spoiled = _norms(value, reference)
            if spoiled:
                result.spoiled.append(f"output{path} has {spoiled} NaN or Inf")
                continue
            limit = bound.limits.get(path, bound.limit)
            squares, norms = squares + difference**2, norms + norm**2
            if norm:
                error, least = difference / norm, limit
                what = f"differs by {error:.2e}, allowed {limit:.2e}"
            else:
                result.zero.append(path)
                error, least = difference, min(limit, bound.overall) * bound.scale * sqrt(max(value.numel(), 1))
                what = f"was zero, now has norm {difference:.2e}, allowed {least:.2e}"
            if not error <= least:
                result.exceeded.append(f"output{path} {what}")
            result.worst = max(result.worst, error if norm or not error else inf)
    if norms or (result.compared and not squares and not result.spoiled):
        result.error = sqrt(squares / norms) if norms else 0.0
        if not result.error <= bound.overall:
            result.exceeded.append(f"the outputs differ by {result.error:.2e}, allowed {bound.overall:.2e}")
    return result


def flips(before: Flat, after: Flat) -> dict[str, int]:
    """How many elements of each integer tensor differ."""
    return {
        path: int((t != after.tensors[path].to(t.device)).sum())
        for path, t in before.tensors.items()
        if path not in before.floating and path in after.tensors and after.tensors[path].shape == t.shape
    }


def errors(value: Flat, reference: Flat) -> dict[str, float]:
    """Relative difference of each floating tensor to a reference, where shapes agree."""
    return {
        path: relative_difference(t, reference.tensors[path])
        for path, t in value.floating.items()
        if path in reference.tensors and reference.tensors[path].shape == t.shape
    }


def exact_limits(rounding: Mapping[str, float], floor: float, factor: float = 4.0) -> dict[str, float]:
    """``max(factor·e, u·√D)`` for each tensor; what rounding scrambles altogether has no bound."""
    return {path: max(factor * e, floor) if isfinite(e) else floor for path, e in rounding.items()}


def class_scores(flat: Flat, batch: int | None) -> Tensor | None:
    """The scores of a classifier, ``(N, classes)``: its first floating output, where that is such."""
    first = next(iter(flat.floating.values()), None)
    if first is None or first.dim() != 2 or first.shape[1] < 2 or first.is_complex():
        return None
    return first if batch is None or first.shape[0] == batch else None


def scale_of(inputs: object) -> float:
    """Root mean square of the floating inputs; 1 where there is none."""
    floating = [_real(t).double() for t in flatten(inputs).floating.values() if t.numel()]
    count = sum(t.numel() for t in floating)
    total = sum(float(t.square().sum()) for t in floating)
    return sqrt(total / count) if count and total and isfinite(total) else 1.0


def nudged(t: Tensor, seed: int) -> Tensor:
    """A tensor with every floating value moved by about one rounding."""
    if not t.dtype.is_floating_point:
        return t
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(t.shape, generator=generator, device="cpu").mul_(2).sub_(1).to(t.device)
    return (t.double() * (1 + torch.finfo(t.dtype).eps * noise)).to(t.dtype)
