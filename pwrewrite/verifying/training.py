"""Both models in training: one forward, whose form and values are compared, and one backward.

The batch is two where the original takes that, since a batch norm needs more than one value. The spatial size is one
below the example's where both models were found to run there: form, NaN and which parameters get a gradient do not
depend on it. Values do, so models of which these are compared, and that are not costly, run at the example's size. Both
runs start from the same seed, so that random masks agree as long as both models draw alike.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from math import inf, sqrt

import torch
from torch import Tensor, nn

from ..capturing.dry_run import dry_runs
from .context import Context, Results, finite
from .evaluation import check_form
from .gradients import backward, complaints, gradient_difference, is_finite, origins
from .inputs import Arguments, Variant
from .outputs import Flat, differences, flatten
from .runs import Outcome, keeping_buffers, run
from .values import Verdict, check_finite, check_values

_SMALL_MACS = 1_000_000_000
"""MACs up to which a training run whose values are compared takes the example's spatial size."""


def gradient_limit(rounding: float) -> float:
    """Relative difference of all gradients together that an edit exact in training may make in float32.

    Rounding of relative size e turns about that part of the ReLUs and maxima the other way, each of which changes
    its piece of the gradient by its whole size: the norm of the change grows as √e. Honest rewrites of torchvision
    models with random weights come to 6·√e at most; 20·√e is allowed. Above 0.1 the comparison says nothing, since a
    lost path or factor changes gradients by tenths: infinite.
    """
    limit = max(1e-2, 20 * sqrt(rounding))
    return limit if limit <= 0.1 else inf


def check_training(context: Context) -> Results:
    """Checks form, values, running statistics and gradients."""
    context.say("training")
    alone = None if context.needs_values or context.options.exact_in("train") else _check_alone(context)
    if alone is not None:
        return alone
    results, verdict = Results(), Verdict()
    inputs, before, grad = _training_run(context)
    if before.ran:
        after = context.run(context.rewritten, inputs, training=True, grad=grad)
        context = check_form(context, results, "train", inputs, before, after)
        if after.ran:
            verdict = _check_values(context, results, inputs, before, after)
    else:
        results.notes.append(f"the original does not run in training mode ({before.error}): training was not checked")
        if not context.needs_values:
            grad = True
            before, after = context.run_both(context.draws.draw(), grad=True)
    if context.needs_values:
        results.notes.append("gradients were not checked: values decide which there are")
    elif not before.ran or not after.ran:
        return results
    elif not grad:
        results.notes.append("gradients were not checked: the original does not run with them")
    else:
        alike = before.drew_like(after)
        exact = alike and context.options.exact_in("train") and context.reference.precise(before.output)
        rounding = verdict.rounding if exact else None
        _check_gradients(context, results, before.output, after.output, rounding, None if alike else inputs)
    return results


def _check_alone(context: Context) -> Results | None:
    """The same where no values are compared, without the original: None where that has to run.

    Its form in training is known from shapes alone. Where the rewritten model returns that, finite values, and finite
    gradients for all its parameters, there is nothing that the original could add.
    """
    size = _sizes(context)[0]
    with dry_runs(context.original, training=True) as original:
        form = original(context.draws.shapes(*size))
    if form is None:
        return None
    with keeping_buffers(context.rewritten):
        after = context.run(context.rewritten, context.draws.draw(*size), training=True, grad=True)
        if not after.ran or not finite(after.output) or differences(flatten(form), after.output):
            return None
        gradients = backward(context.rewritten, after.output)
    if isinstance(gradients, str) or not all(map(is_finite, gradients.values())):
        return None
    results = Results()
    results.check("shapes (train)", [], after.output.describe())
    check_finite(results, "train", [])
    results.check("gradients", [], f"{len(gradients)} parameters get one")
    return results


def _training_run(context: Context) -> tuple[Arguments, Outcome, bool]:
    """Inputs that the original trains on, what came of it, and whether with gradients."""
    draws, model = context.draws, context.original
    choices = _sizes(context)
    saved = _buffers(model)
    for grad in (True, False):
        for choice in choices:
            inputs = draws.draw(*choice)
            outcome = context.run(model, inputs, training=True, grad=grad)
            if outcome.ran:
                return inputs, outcome, grad
            with torch.no_grad():
                for name, b in model.named_buffers():
                    if name in saved:
                        b.copy_(saved[name])
    return inputs, outcome, False


def _sizes(context: Context) -> list[Variant]:
    """Batch and spatial sizes to train at, the one to try first first.

    Where values are compared, or may overflow, a smaller size is half of the example's: in a quarter a norm sees four
    times fewer values, rounding weighs more, and gradients could not be compared as often.
    """
    draws, exact, size = context.draws, context.options.exact_in("train"), context.smaller
    batch = draws.batch if draws.batch and 2 <= draws.batch <= 4 else 2
    sizes: list[Variant] = [(batch, None), (None, None)]
    if size is None or (exact and context.macs <= _SMALL_MACS):
        return sizes
    if size == "quarter" and (exact or not context.reference.precise(Flat())):
        size = "half"
    return [(batch, size), *sizes]


def _check_values(context: Context, results: Results, inputs: Arguments, before: Outcome, after: Outcome) -> Verdict:
    """NaN, numerics and running statistics. These are read first: to find a divergence the models run again."""
    exact = context.options.exact_in("train")
    old, new = (_buffers(model) if exact else {} for model in (context.original, context.rewritten))
    verdict = check_values(context, results, "train", inputs, before, after)
    if old and before.drew_like(after):
        problems = buffer_differences(old, new, verdict.buffers)
        results.check("buffers (train)", problems, "running statistics move alike")
    return verdict


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def buffer_differences(before: Mapping[str, Tensor], after: Mapping[str, Tensor], limit: float) -> list[str]:
    """Modules whose buffers, measured together, differ by more than ``limit``: a mean near zero may be all rounding."""
    modules: dict[str, list[tuple[Tensor, Tensor]]] = {}
    problems = []
    for name, old in before.items():
        new = after.get(name)
        if new is None or new.shape != old.shape:
            continue
        if old.is_floating_point():
            modules.setdefault(name.rpartition(".")[0], []).append((old.double(), new.double()))
        elif not torch.equal(old, new.to(old.device)):
            problems.append(f"{name} differs")
    for path, pairs in modules.items():
        parts = [(a - b).masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0) for a, b in pairs]  # a mask holds -inf
        difference = sum(float(part.square().sum()) for part in parts) ** 0.5
        norm = sum(float(a[a.isfinite()].square().sum()) for a, _ in pairs) ** 0.5
        if limit < inf and not difference <= limit * norm:
            problems.append(f"buffers of {path or 'the model'} differ by {difference / norm if norm else inf:.1e}")
    return problems


def _untouched(
    model: nn.Module, gradients: Mapping[str, Tensor | None], sources: Container[str]
) -> dict[str, Tensor | None]:
    """The gradients of parameters that no edit made, under any name: others may have their shape, not their meaning."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    made = {id(parameter) for name, parameter in parameters.items() if name in sources}
    return {name: gradient for name, gradient in gradients.items() if id(parameters[name]) not in made}


_DRAWS = 8
"""Runs among which a parameter has to get a gradient once, where random numbers decide which of them do."""


def _drawn_again(
    context: Context, inputs: Arguments, gradients: Mapping[str, Tensor | None]
) -> Iterator[dict[str, Tensor | None]]:
    """The rewritten model's gradients, with those added that it has in one further run after another."""
    found = dict(gradients)
    for seed in range(1, _DRAWS):
        with keeping_buffers(context.rewritten):
            seeds = context.options.seed + seed
            outcome = run(context.rewritten, inputs, seed=seeds, training=True, grad=True)
            more = backward(context.rewritten, outcome.output) if outcome.ran else ""
        if not isinstance(more, str):
            found = {name: more.get(name) if gradient is None else gradient for name, gradient in found.items()}
            yield found


def _check_gradients(
    context: Context,
    results: Results,
    before: Flat,
    after: Flat,
    rounding: float | None,
    drawn: Arguments | None,
) -> None:
    """Compares which parameters get a gradient and, where rounding in training is known, the gradients' values.

    Inputs are ``drawn`` for again where both models draw other random numbers: a layer may have been left out by these.
    """
    old = backward(context.original, before)
    if isinstance(old, str):
        results.notes.append(f"gradients were not checked: {old}")
        return
    new = backward(context.rewritten, after)
    if isinstance(new, str):
        results.check("gradients", [f"the rewritten model has no backward pass: {new}"])
        return
    frozen = {name for name, p in context.rewritten.named_parameters(remove_duplicate=False) if not p.requires_grad}
    sources = origins(context.options.edits)
    problems = complaints(old, new, sources, frozen)
    again = _drawn_again(context, drawn, new) if drawn is not None else iter(())
    while problems and (more := next(again, None)) is not None:
        new, problems = more, complaints(old, more, sources, frozen)
    detail = f"{sum(g is not None for g in new.values())} parameters get one"
    difference = gradient_difference(old, _untouched(context.rewritten, new, sources)) if rounding is not None else None
    if rounding is not None and difference is not None:
        detail += f"; those that both have differ by {difference:.1e}"
        limit = gradient_limit(rounding)
        if limit == inf:
            moves = "rounding alone moves the original's outputs in training by"
            results.notes.append(f"gradient values were not compared: {moves} {rounding:.1e}")
        elif not difference <= limit:
            problems.append(f"gradients differ by {difference:.1e}, allowed {limit:.1e}")
    results.check("gradients", problems, detail)
