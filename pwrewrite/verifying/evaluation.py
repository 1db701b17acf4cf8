"""Both models on the example, in evaluation: the form of what they return, and its values."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from ..core.errors import InputError
from .context import Context, Results, finite
from .inputs import Arguments
from .outputs import Flat, differences, flatten, varying
from .rounding import noisy_copy
from .runs import Outcome
from .values import check_values


def check_evaluation(context: Context) -> tuple[Results, Context, bool]:
    """Compares one run in evaluation: what was found, what is known now, and whether the rewritten model runs.

    Raises:
        InputError: If the original does not run on the inputs.
    """
    context.say("one run in evaluation")
    results = Results()
    inputs, before, context = _first_run(context, results)
    after = context.run(context.rewritten, inputs)
    context = check_form(context, results, "eval", inputs, before, after)
    if not after.ran:
        return results, context, False
    verdict = check_values(context, results, "eval", inputs, before, after)
    results.error = verdict.error
    if context.options.exact_in("eval") and verdict.allowed < inf and not verdict.scrambled:
        context = replace(context, pair=verdict.allowed)
    _check_inputs(results, before, after)
    results.count_agreeing(context, before.output, after.output)
    return results, context, True


def _check_inputs(results: Results, before: Outcome, after: Outcome) -> None:
    """Whether the rewritten model writes into the caller's inputs where the original does, and nowhere else."""
    if gone := sorted(set(before.written) - set(after.written)):
        results.notes.append(
            f"the original writes into its inputs ({', '.join(map(_input_name, gone))}), the rewritten model does not: "
            "code that reads them afterwards sees what it passed"
        )
    if new := sorted(set(after.written) - set(before.written)):
        results.check("inputs (eval)", [f"{_input_name(path)} is written into, and was not before" for path in new])


def _input_name(path: str) -> str:
    """``[0][1]['mask']`` is input 1.mask: by position, then by key; ``[1]['mask']`` is the input mask."""
    keys = path.replace("'", "").strip("[]").split("][")
    return f"input {'.'.join(keys[1:])}"


def _first_run(context: Context, results: Results) -> tuple[Arguments, Outcome, Context]:
    """Inputs that the original takes, and what it makes of them: the given ones where it refuses random values."""
    inputs = context.draws.draw()
    before = context.run(context.original, inputs)
    if context.draws.drawn and not (before.ran and finite(before.output)):
        draws = context.draws.without_random_values()
        example = draws.draw()
        again = context.run(context.original, example)
        if again.ran and (not before.ran or finite(again.output)):
            results.notes.append("the original does not take random values: the given ones were used")
            inputs, before, context = example, again, replace(context, draws=draws)
    if not before.ran:
        hint = "check that model(*example_inputs) runs in plain PyTorch, in eval mode"
        raise InputError(f"the original does not run on these inputs: {before.error}", hint=hint)
    return inputs, before, context


def check_form(
    context: Context, results: Results, mode: str, inputs: Arguments, before: Outcome, after: Outcome
) -> Context:
    """Adds the check of structure, shapes and dtypes of a real run; gives the context with what it learned."""
    training = mode == "train"
    if not after.ran:
        place = results.locate(context, inputs, training)
        results.check(f"shapes ({mode})", [f"the rewritten model does not run: {after.error}; {place}"])
        return context
    problems, context = real_differences(context, results, inputs, before.output, after.output, training)
    if problems and not context.options.allow_output_change:
        problems.append(results.locate(context, inputs, training))
    results.check_form(f"shapes ({mode})", problems, after.output.describe(), context)
    return context


def real_differences(
    context: Context, results: Results, inputs: Arguments, before: Flat, after: Flat, training: bool = False
) -> tuple[list[str], Context]:
    """What differs in form between two runs, but for sizes that depend on values, which are looked for."""
    problems = differences(before, after, context.free)
    wanted = varying(before, after)
    if problems and not training and wanted - context.free:
        context = replace(context, free=_sizes_by_value(context, inputs, before, wanted))
        problems = differences(before, after, context.free)
        if context.free & wanted:
            places = ", ".join(f"output{path} (dim {dim})" for path, dim in sorted(context.free & wanted))
            results.notes.append(f"sizes that depend on values were not compared: {places}")
    return problems, context


def _sizes_by_value(
    context: Context, inputs: Arguments, before: Flat, wanted: set[tuple[str, int]]
) -> frozenset[tuple[str, int]]:
    """Finds sizes that other inputs change, or weights made smaller as a factorisation does (a detector finds less)."""
    original, seed, free = context.original, context.options.seed, set(context.free)
    noisy, smaller = noisy_copy(original, 0.1, seed), noisy_copy(original, 0.0, seed, scale=0.9)
    first, second, third = (context.draws.draw(variant=variant) for variant in (1, 2, 3))
    for model, tried in (original, first), (noisy, inputs), (smaller, inputs), (noisy, second), (original, third):
        if flatten(tried).shapes == flatten(inputs).shapes and not wanted <= free:
            free |= varying(before, context.run(model, tried).output)
    return frozenset(free)
