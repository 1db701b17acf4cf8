"""Whether the values of two outputs are close enough: `judge` applies the bounds that are argued for in `numerics`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf

import torch

from .context import Context, Results
from .divergence import Key, layer_differences, within
from .inputs import Arguments
from .numerics import Bound, compare, flips, scale_of
from .outputs import Flat, differences
from .rounding import SCRAMBLED, Rounding, cast, noisy_copy
from .runs import Outcome

_SCRAMBLED_HALF = 0.5
"""As `SCRAMBLED`, in half precision, where a deep network may come to some percents by rounding alone."""


@dataclass(slots=True)
class Verdict:
    """What came of one comparison; errors and differences are relative."""

    error: float | None = None  # of the outputs to the original's; None where there is none to tell
    spoiled: list[str] = field(default_factory=list)  # NaN or Inf that the original does not have
    exceeded: list[str] = field(default_factory=list)
    detail: str = ""  # what was measured; empty where numerics were not compared
    allowed: float = inf  # up to which the two models' layers agree
    scrambled: bool = False  # whether rounding alone changes the original's output so much that it says nothing
    rounding: float = 0.0  # what rounding made in the original's outputs
    buffers: float = inf  # what running statistics may differ by after a training run
    notes: list[str] = field(default_factory=list)


def numerics_check(mode: str) -> str:
    """The name of the check of a mode's values."""
    return f"numerics ({mode})"


def check_values(
    context: Context, results: Results, mode: str, inputs: Arguments, before: Outcome, after: Outcome
) -> Verdict:
    """Adds the checks of a run's values in a mode: NaN and numerics."""
    verdict = judge(context, mode, inputs, before, after)
    results.notes += verdict.notes
    training = mode == "train"
    spoiled = [*verdict.spoiled, results.locate(context, inputs, training)] if verdict.spoiled else []
    check_finite(results, mode, spoiled)
    if verdict.exceeded:
        place = results.locate(context, inputs, training, verdict.allowed)
        results.check(numerics_check(mode), [*verdict.exceeded, place])
    elif verdict.detail:
        results.check(numerics_check(mode), [], verdict.detail)
    return verdict


def check_finite(results: Results, mode: str, spoiled: list[str]) -> None:
    """Adds the check of a mode's NaN and Inf."""
    results.check(f"finite ({mode})", spoiled, "no NaN or Inf where the original has none")


def judge(context: Context, mode: str, inputs: Arguments, before: Outcome, after: Outcome) -> Verdict:
    """Compares the values of a run in a mode."""
    plain = compare(before.output, after.output, Bound())
    verdict = Verdict(plain.error, plain.spoiled)
    exact = context.options.exact_in(mode)
    if mode == "train" and not exact:
        return verdict
    if before.drew and not before.drew_like(after):
        verdict.error = None
        verdict.notes.append(
            f"{numerics_check(mode)} were not compared: the models draw random numbers, and not the same"
        )
        return verdict
    if not plain.compared and plain.uncompared:
        verdict.notes.append(f"{numerics_check(mode)} were not compared: no output has the shape it had")
        return verdict
    if exact:
        _judge_exact(context, mode, inputs, before, after.output, verdict)
    else:
        _judge_approximate(context, inputs, before.output, after.output, verdict)
    if plain.zero:
        verdict.detail += f"; the original's output{plain.zero[0]} is zero throughout, which proves little"
    if plain.uncompared:
        paths = ", ".join(f"output{path}" for path in plain.uncompared[:4])
        verdict.detail += f"; not compared, as shapes differ: {paths}"
    if verdict.scrambled or (verdict.exceeded and context.needs_values):
        compared = mode == "eval" and _layers_instead(context, inputs, verdict)
        if verdict.scrambled and not compared and not verdict.exceeded:
            verdict.detail = ""
            why = "rounding alone turns the original's outputs over"
            verdict.notes.append(f"{numerics_check(mode)} were not compared: {why}")
    return verdict


def _rounding(context: Context, inputs: Arguments, before: Outcome, training: bool) -> tuple[Rounding, Bound]:
    """What rounding does to the original on some inputs, and the bound that follows for an exact rewrite."""
    depth = 1 + len(context.captures[0].calls) if context.captures else 1
    known = context.reference.rounding(inputs, before, training, depth)
    may_flip = {path: 4 * n for path, n in flips(before.output, known.reference).items()}
    return known, Bound(known.floor, known.limits, flips=may_flip, scale=scale_of(inputs))


def _judge_exact(context: Context, mode: str, inputs: Arguments, before: Outcome, new: Flat, verdict: Verdict) -> None:
    known, bound = _rounding(context, inputs, before, mode == "train")
    judged = compare(known.reference, new, bound)
    limit = max(known.limits.values(), default=known.floor)
    rounding = verdict.rounding = max(known.errors.values(), default=0.0)
    verdict.scrambled = rounding > (SCRAMBLED if context.reference.precise(before.output) else _SCRAMBLED_HALF)
    if verdict.scrambled:
        verdict.allowed = 16 * known.floor
        return
    verdict.exceeded = judged.exceeded
    verdict.allowed = 2 * (limit + rounding)
    verdict.buffers = max(16 * limit, 64 * known.floor)
    measured = f"error {judged.worst:.1e} against {known.name}"
    verdict.detail = f"{measured}; the original's {rounding:.1e}, allowed {limit:.1e}"


def _judge_approximate(context: Context, inputs: Arguments, old: Flat, new: Flat, verdict: Verdict) -> None:
    limit = context.options.largest_error
    judged = compare(old, new, Bound(overall=limit, scale=scale_of(inputs)))
    verdict.exceeded, verdict.allowed = judged.exceeded, limit
    verdict.detail = "no floating output" if verdict.error is None else f"relative error {verdict.error:.2e}"
    if judged.zero and verdict.error is None:
        verdict.detail = "the original's outputs are zero: no relative error"
    verdict.detail += f", allowed {limit:g}" if limit < inf else ""


def judge_elsewhere(context: Context, inputs: Arguments, before: Outcome, after: Outcome) -> tuple[list[str], float]:
    """The same for an evaluation at another size, without a reference: what differs too much, what may."""
    exact = context.options.exact_in("eval")
    skip = context.needs_values or (before.drew and not before.drew_like(after))
    bound = Bound(overall=inf if exact else context.options.largest_error, scale=scale_of(inputs))
    if exact and context.pair is not None:
        bound = replace(bound, limit=context.pair, flips={})
    judged = compare(before.output, after.output, bound)
    if judged.exceeded and exact and not skip:
        known, bound = _rounding(context, inputs, before, False)
        judged = compare(known.reference, after.output, bound)
    return judged.spoiled + ([] if skip else judged.exceeded), min(bound.limit, bound.overall)


def unlike(context: Context, before: Outcome, after: Outcome) -> list[str]:
    """What differs between two runs of what should be one model with the same weights."""
    if not after.ran:
        return [f"after reloading, the model does not run: {after.error}"]
    problems = differences(before.output, after.output)
    judged = compare(before.output, after.output, Bound(context.reference.floor(before.output), flips={}))
    return [f"after reloading, {problem}" for problem in (*problems, *judged.spoiled, *judged.exceeded)]


def _layers_instead(context: Context, inputs: Arguments, verdict: Verdict) -> bool:
    """Where values decide which results come out, compares the layers before; False where there is none.

    The boundary is the first layer where the original parts by more than `SCRAMBLED` from its float64 copy, or from one
    with its weights moved by a quarter of what is allowed.
    """
    limit, seed = verdict.allowed, context.options.seed
    if limit == inf:
        return False
    references = [(noisy_copy(context.original, limit / 4, seed), inputs)]
    double = context.reference.in_precision(torch.float64)
    if double is not None:
        references.append((double, cast(inputs, torch.float64)))
    rounding, between = dict[Key, float](), dict[Key, float]()
    for reference in references:
        models = context.original, context.rewritten
        between, alone, raised = layer_differences(*models, inputs, seed=seed, reference=reference)
        if raised is not None:
            return False
        rounding = {key: max(e, rounding.get(key, 0.0)) for key, e in alone.items()}
    nearest, compared = (0.0, limit), 0
    for key, error in between.items():
        if not rounding.get(key, inf) <= SCRAMBLED:
            break
        if within(key[0], context.options.edited):
            continue
        allowed = max(limit, 4 * rounding[key])
        if not error <= allowed:
            verdict.exceeded = [f"{key[0]} differs by {error:.2e}, allowed {allowed:.2e}"]
            return True
        compared, nearest = compared + 1, max(nearest, (error, allowed), key=lambda each: each[0] / each[1])
    if compared:
        verdict.exceeded = []
        error, allowed = nearest
        verdict.detail = f"error {error:.1e} over the {compared} layers before values decide, allowed {allowed:.1e}"
        verdict.detail += " there" if allowed > limit else ""
        verdict.notes.append(
            "values decide which results come out, and rounding alone changes that: "
            f"the {compared} layers before were compared instead of the outputs"
        )
    return bool(compared)
