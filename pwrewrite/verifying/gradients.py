"""Whether a rewritten model still learns: every parameter that got a gradient gets one, and every new one does.

One backward pass of a scalar that depends on every floating output: their means with fixed random weights. A
plain sum would do for reachability, but the gradient of a sum behind a softmax or a norm is nothing but rounding.

A new parameter may go without where the parameters that became it got none before, by the edits' own account; where
no edit tells, where the layer it belongs to got none (the innermost module around it that the original has too, with
parameters of its own), or, for a frozen one, where some of that layer got none.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..core.errors import first_line
from ..core.plan import Edit
from .numerics import norm_of
from .outputs import Flat


def backward(model: nn.Module, output: Flat) -> dict[str, Tensor | None] | str:
    """Gradients of a scalar of ``output`` by parameter name, None where there is none; or why there is no backward."""
    generator = torch.Generator().manual_seed(0)
    terms: list[Tensor] = []
    for t in output.floating.values():
        if t.requires_grad and t.numel():
            real = torch.view_as_real(t) if t.is_complex() else t
            real = real.float() if real.dtype.itemsize < 4 else real
            terms.append((real * torch.randn(real.shape, generator=generator, device="cpu").to(real)).mean())
    if not terms:
        return "no output depends on a parameter that needs a gradient"
    model.zero_grad(set_to_none=True)
    try:
        torch.autograd.backward(terms)
    except Exception as error:
        return first_line(error)
    gradients = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
    model.zero_grad(set_to_none=True)
    return gradients


def origins(edits: Iterable[Edit]) -> dict[str, set[str]]:
    """Names of the rewritten model's parameters to the original's; a later edit may rename what an earlier one made."""
    sources: dict[str, set[str]] = {}
    for edit in edits:
        before = dict(sources)
        for old, names in edit.renamed.items():
            for name in names:
                sources[name] = sources.get(name, set()) | before.get(old, {old})
    return sources


def complaints(
    before: Mapping[str, Tensor | None],
    after: Mapping[str, Tensor | None],
    sources: Mapping[str, set[str]] | None = None,
    frozen: Container[str] = (),
) -> list[str]:
    """What is wrong with the gradients ``after``, given those ``before``, the `origins` and what is frozen."""
    problems = []
    for name, gradient in after.items():
        old = name in before
        became = {source for source in (sources or {}).get(name, ()) if source in before}
        if old and before[name] is None and all(before[source] is None for source in became):
            continue
        if gradient is None:
            if old:
                problems.append(f"{name} got a gradient before and gets none now")
            elif any(before[s] is not None for s in became) if became else _should_learn(name, before, frozen):
                problems.append(f"{name} is new and gets no gradient")
        elif not is_finite(gradient) and (not old or is_finite(before[name])):
            problems.append(f"{name} gets a gradient that is not finite")
    return problems


def is_finite(gradient: Tensor | None) -> bool:
    """Whether there is a gradient, without NaN and Inf."""
    return gradient is not None and (bool(gradient.sum().isfinite()) or bool(gradient.isfinite().all()))


def _should_learn(name: str, before: Mapping[str, Tensor | None], frozen: Container[str]) -> bool:
    """Whether what is around a new parameter of unknown origin got a gradient in the original; all of it, if frozen."""
    place = name
    while place:
        place = place.rpartition(".")[0]
        own = [gradient is not None for old, gradient in before.items() if old.startswith(f"{place}." if place else "")]
        if own:
            return all(own) if name in frozen else any(own)
    return True


_NOISE = 1e-3
"""Part of the norm of all gradients below which those that both models have may be rounding alone."""


def gradient_difference(before: Mapping[str, Tensor | None], after: Mapping[str, Tensor | None]) -> float | None:
    """Relative difference of the gradients that both have, taken together; None where there are none.

    A bias before a norm has a gradient of rounding alone. Where nothing else is left that both have, the difference is
    measured by `_NOISE` of the original's whole gradient. What is not finite in the original, such as the gradient of a
    norm of zeros, is left out: no difference from it can be told.
    """
    difference = norm = whole = 0.0
    for name, old in before.items():
        new = after.get(name)
        if old is None or not is_finite(old):
            continue
        square = norm_of(old) ** 2
        whole += square
        if new is not None and old.shape == new.shape:
            difference += norm_of(new - old) ** 2
            norm += square
    return (difference / max(norm, _NOISE**2 * whole)) ** 0.5 if norm else None
