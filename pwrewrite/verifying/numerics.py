r"""How far two outputs are apart, and how far they may be.

**Exact edits.** Let ``f`` be the original, ``f̂`` the rewritten model, and ``f*`` the original's copy in
float64, all on the same inputs. In real numbers ``f = f̂ = f*``, so what is left is rounding. ``e = ‖f − f*‖ /
‖f*‖`` *measures* what rounding does to this network with these weights: it holds the network's own
amplification, which no constant can know. ``f̂`` does about as many roundings of about the same numbers in
another order; its error is another draw from much the same distribution, and a norm over many elements varies
little from draw to draw. A fold rounds each weight once more, which is one more rounding per layer beside the
one or two (product, norm) that are there. So an honest rewrite stays
within a small multiple of ``e``, and we allow

    ‖f̂ − f*‖ / ‖f*‖  ≤  max(4·e, u).

(Measured on torchvision models with every convolution split in two: between 1·e and 2·e, and the 2 in bfloat16, where
splitting adds a rounding.) The second term is for the case that ``e`` is small by luck: a network of one layer, powers
of two, a kernel that happens to sum more finely. It is what one layer may do by itself. In half precision kernels
accumulate in float32 and round the result once, so that two results are at most a unit in the last place apart:
u = eps. In float32 and float64 the order of summation and the algorithm (blocked, Winograd) are the kernel's own and
cost a few eps: u = 8 eps, 1e-6 in float32. Real mistakes are larger: a norm's ``eps`` left out (1e-5 against 1e-3) or
tanh-GELU for erf-GELU change outputs by 1e-4 and more.

Each tensor is judged by its own norm, so that a large one does not hide a small one. Where the reference is
zero throughout, the norm of the inputs stands in. Where the model does not run in float64, a half-precision
model is measured against float32. Failing that, and for a model in float64, which nothing finer judges, ``e`` is what
an input (in float64 also the weights) changed by one rounding does to the original, a probe of the same amplification,
but of one rounding among those of ``D`` layers, which add up as √D; the bound is ``max(16·e, 4·u·√D)`` against the
original itself, and the check says so.

Two runs that are each within a bound of ``f*`` are within ``bound + e`` of each other; at other batch and
spatial sizes twice that is allowed, since a smaller map averages less; only where that is not enough does the float64
copy run there, too.

**Approximate edits** have their error reported, and a bound only where the caller sets one.

Integers and booleans (a class map, an index) must agree but for as many elements as rounding flips: four times
those that the float64 copy flips, or one in a thousand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, sqrt
from sys import float_info
from typing import Any

import torch
from torch import Tensor

from .outputs import Flat, flatten


def roundoff(dtypes: Collection[torch.dtype]) -> float:
    """``u``: what one layer in the coarsest of the dtypes may round differently, see above."""
    eps = max((torch.finfo(d).eps for d in dtypes if d.is_floating_point or d.is_complex), default=2.0**-23)
    return (1 if eps > 1e-4 else 8) * eps


def _real(t: Tensor) -> Tensor:
    t = t.detach()
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _norms(value: Tensor, reference: Tensor) -> tuple[float, float, int]:
    """Norms of the difference and of the reference where that is finite, and how often only ``value`` is not finite."""
    a, b = _wide(_real(value)), _wide(_real(reference).to(value.device))
    difference, norm = _norm(a - b), _norm(b)
    if isfinite(difference) and isfinite(norm):
        return difference, norm, 0
    a, b = a.double(), b.double()
    sound = torch.isfinite(b)
    spoiled = int((sound & ~torch.isfinite(a)).sum())
    if not bool(sound.all()):
        a, b = a.where(sound, 0.0), b.where(sound, 0.0)
    return _norm(a - b), _norm(b), spoiled


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype.itemsize < 4 else t


def _norm(t: Tensor) -> float:
    """Euclidean norm, summed in float64 and without a copy in it."""
    return float(torch.linalg.vector_norm(t, dtype=torch.float64))


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """``‖value − reference‖ / ‖reference‖`` where that is finite; ∞ where only ``value`` is not.

    The largest float where only the reference is zero.
    """
    difference, norm, spoiled = _norms(value, reference)
    if spoiled:
        return inf
    return difference / norm if norm else (float_info.max if difference else 0.0)


@dataclass(slots=True)
class Comparison:
    """How two outputs compare.

    Attributes:
        error: ``‖y − ŷ‖ / ‖y‖`` over all floating tensors together; None where there is none, or the
            original's are zero.
        worst: Path of the tensor with the largest error, with its error.
        spoiled: Path to the number of elements that are NaN or infinite only in the rewritten model.
        exceeded: One sentence per tensor that differs by more than allowed.
        compared: How many floating tensors were compared.
        zero: Paths of tensors of which the original's are zero throughout.
        uncompared: Paths of tensors whose shapes differ.
    """

    error: float | None = None
    worst: tuple[str, float] | None = None
    spoiled: dict[str, int] = field(default_factory=dict)
    exceeded: list[str] = field(default_factory=list)
    compared: int = 0
    zero: list[str] = field(default_factory=list)
    uncompared: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Bound:
    """What may differ.

    Attributes:
        limit: Relative difference allowed per floating tensor; ∞ for no bound.
        limits: The same for single tensors, by path.
        overall: Relative difference allowed over all floating tensors together.
        flips: Integer elements that may differ, by path; None for any number.
        scale: Root mean square of the inputs, which stands in for a reference that is zero.
    """

    limit: float = inf
    limits: Mapping[str, float] = field(default_factory=dict)
    overall: float = inf
    flips: Mapping[str, int] | None = None
    scale: float = 1.0


def compare(before: Flat, after: Flat, bound: Bound) -> Comparison:
    """Compares the values of two outputs, the first of which is the reference, within a bound."""
    result = Comparison()
    squares = norms = 0.0
    for path, reference in before.tensors.items():
        value = after.tensors.get(path)
        if value is None or value.shape != reference.shape:
            result.uncompared.append(path)
            continue
        if path not in before.floating:
            _count_flips(path, value, reference, bound, result)
            continue
        result.compared += 1
        difference, norm, spoiled = _norms(value, reference)
        if spoiled:
            result.spoiled[path] = spoiled
            continue
        limit = bound.limits.get(path, bound.limit)
        squares, norms = squares + difference**2, norms + norm**2
        if norm:
            error = difference / norm
            if not error <= limit:
                result.exceeded.append(f"output{path} differs by {error:.2e}, allowed {limit:.2e}")
        else:
            result.zero.append(path)
            error = inf if difference else 0.0
            allowed = min(limit, bound.overall) * bound.scale * sqrt(max(value.numel(), 1))
            if not difference <= allowed:
                result.exceeded.append(f"output{path} was zero, now has norm {difference:.2e}, allowed {allowed:.2e}")
        if result.worst is None or error > result.worst[1]:
            result.worst = path, error
    if norms or (result.compared and not squares and not result.spoiled):
        result.error = sqrt(squares / norms) if norms else 0.0
        if not result.error <= bound.overall:
            result.exceeded.append(f"the outputs differ by {result.error:.2e}, allowed {bound.overall:.2e}")
    return result


def _count_flips(path: str, value: Tensor, reference: Tensor, bound: Bound, result: Comparison) -> None:
    if bound.flips is None:
        return
    different = int((value != reference.to(value.device)).sum())
    allowed = max(bound.flips.get(path, 0), value.numel() // 1000)
    if different > allowed:
        result.exceeded.append(f"output{path} differs in {different} of {value.numel()} values, allowed {allowed}")


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


def agreeing(before: Tensor, after: Tensor) -> int:
    """How many rows have their largest score in the same place."""
    return int((before.argmax(1) == after.to(before.device).argmax(1)).sum())


def scale_of(inputs: Any) -> float:
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
    noise = torch.rand(t.shape, generator=generator).mul_(2).sub_(1).to(t.device)
    return (t.double() * (1 + torch.finfo(t.dtype).eps * noise)).to(t.dtype)
