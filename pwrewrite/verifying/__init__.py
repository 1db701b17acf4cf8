"""Whether a rewritten model is still the same model: `verify`.

Both models are tried on copies, seeded, and compared in what can be observed: what they return (structure, shapes,
dtypes, values) in both modes and at several batch and spatial sizes, what they cost, whether they save, reload and
learn. What shapes alone can tell comes from captures and dry runs, which compute nothing. The real runs are few: of an
approximate rewrite without a bound on its error, all of verification takes as long as 6 to 9 forward passes of a ResNet
or DenseNet; of networks that run in a few milliseconds (MobileNet, ShuffleNet) 14 to 19, a third of it copies, shapes
and state. Where values are compared, the original runs wherever the rewritten model does. How much two outputs may
differ is argued in `numerics`.

Limits. Values are compared where the models run, on random or given inputs: equal there is evidence, not proof. A
branch that the random weights make negligible (a layer scale of 1e-6) hides its own mistakes. Where sizes depend on
values (detection), only structure and dtypes are compared for those sizes; where values decide *which* results come out
(the best thousand boxes), rounding alone reorders them, and if the outputs differ the layers before are compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..capturing.inputs import Inputs, split_inputs
from ..capturing.lazy import materialized
from ..core.collector import no_collection
from ..core.declaring import from_keywords, refuse_unknown
from ..core.errors import InputError, UsageError
from ..core.modes import plain_modes
from ..core.random_state import keeping_random_state
from ..core.subjects import check_model
from ..core.verification import Check, Verification
from .context import Context, Options, Results, context_of
from .evaluation import check_evaluation
from .reload import check_reloading
from .runs import device_of, plain_precision
from .sizes import check_batch_sizes, check_spatial_sizes, with_forms
from .static import check_cost, check_static
from .training import check_training
from .values import numerics_check

__all__ = ["Check", "Verification", "verify"]


def verify(original: nn.Module, rewritten: nn.Module, example_inputs: Inputs, **options: Any) -> Verification:
    """Compares a rewritten model with the one that it was made from.

    Args:
        original: The model before.
        rewritten: The model after.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs. They give the
            shapes; where their floating values are all constant, or on ``meta``, random ones are drawn.
        **options: Fields of `pwrewrite.verifying.context.Options`: ``max_error``, ``edits``, ….

    Returns:
        The checks, the measured error, and where the models first part if a check failed. Both models, their
        modes, the inputs and all random states are as before.

    Raises:
        InputError: If the original does not run on the example inputs.
        CaptureError: If the models have no values and the original cannot be captured.
        UsageError: If ``max_error`` is not a number from 0, or there is no such option.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Conv2d(3, 8, 3)
    >>> proof = verify(model, nn.Conv2d(3, 8, 1), torch.randn(1, 3, 8, 8))
    >>> proof.passed, proof.failures[0].name
    (False, 'shapes (static)')
    """
    for model, name in (original, "original"), (rewritten, "rewritten"):
        check_model(model, name)
    known = from_keywords(Options, options)
    refuse_unknown("verify", options, Options)
    if known.captured is not None and known.captured.model is not original:
        raise InputError("captured is of another model", expected="a capture of the original")
    bound = known.max_error
    if bound is not None and not bound >= 0:
        raise UsageError("max_error makes no sense", expected="a number from 0, such as 0.05", got=repr(bound))
    with no_collection(), keeping_random_state(), plain_modes(), plain_precision(device_of(original)):
        args, kwargs = split_inputs(example_inputs)
        original, rewritten = materialized(original, args, kwargs), materialized(rewritten, args, kwargs)
        results = _checked(context_of(original, rewritten, example_inputs, known))
    checks, agreement = tuple(results.checks), None
    if results.samples:
        agreement = results.agree / results.samples
        words = f"; the largest output agrees on {results.agree} of {results.samples} samples"
        checks = tuple(replace(c, detail=c.detail + words) if c.name == numerics_check("eval") else c for c in checks)
    notes, exact = tuple(results.notes), known.exact_in("eval")
    return Verification(checks, results.error, agreement, results.diverges_at, notes, results.samples, exact, bound)


def _checked(context: Context) -> Results:
    """Runs the checks in order, each with what those before it learned."""
    results, context = check_static(context)
    if not context.has_values:
        results.notes.append("the weights are on meta: numerics, training, gradients and reloading were not checked")
    else:
        more, context, runs = check_evaluation(context)
        results.add(more)
        if runs and context.options.thorough:
            spatial, context = check_spatial_sizes(with_forms(context))
            more, context = check_batch_sizes(context, bool(results.samples))
            results.add(more)
            results.add(spatial)
            results.add(check_reloading(context))
            results.add(check_training(context))
        if not context.options.thorough:
            results.notes.append("other sizes, training, gradients and reloading were not checked")
    results.add(check_cost(context))
    return results
