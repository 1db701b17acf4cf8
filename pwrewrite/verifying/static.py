"""Both models on shapes alone: the form of their outputs, and what they cost."""

from __future__ import annotations

from dataclasses import replace

from ..capturing import Capture, capture
from ..core.errors import CaptureError
from .context import Context, Results, as_inputs, recounted
from .divergence import first_shape_divergence
from .outputs import differences, flatten_captured


def check_static(context: Context) -> tuple[Results, Context]:
    """Compares what two captures return.

    Raises:
        CaptureError: If the models have no values and the original cannot be captured.
    """
    context.say("shapes, statically")
    results = Results()
    inputs = as_inputs(context.draws.draw() if context.has_values else context.draws.shapes())
    known = context.options.captured
    try:
        before = known if known is not None and known.coverage.values == "meta" else capture(context.original, inputs)
    except CaptureError as error:
        if not context.has_values:
            raise
        results.notes.append(f"the original cannot be captured ({error.message}): no static checks")
        return results, context
    try:
        after = capture(context.rewritten, inputs)
    except CaptureError as error:
        results.diverges_at = error.where
        results.check("shapes (static)", [f"the rewritten model cannot be captured: {error.message}"])
        return results, context
    context = replace(context, captures=(before, after))
    problems = static_differences(before, after)
    if problems and context.has_values and context.values_decide:
        results.notes.append("the model needs values: its sizes are compared in real runs only")
        return results, context
    if problems and not context.options.allow_output_change:
        problems.append(results.part_at(first_shape_divergence(before, after)))
    results.check_form("shapes (static)", problems, flatten_captured(before).describe(), context)
    return results, context


def static_differences(before: Capture, after: Capture) -> list[str]:
    """What differs in form between the outputs of two captures."""
    return differences(flatten_captured(before), flatten_captured(after))


def check_cost(context: Context) -> Results:
    """Recounts the rewritten model where a cost was predicted."""
    results, expected = Results(), context.options.expected
    if expected is None:
        return results
    at = context.options.expected_at
    rewritten = capture(context.rewritten, at) if at is not None else context.captures and context.captures[1]
    if rewritten is None:
        results.check("cost", ["nothing to recount: the rewritten model cannot be captured"])
        return results
    cost = recounted(rewritten)
    problems = []
    if cost.params != expected.params:
        problems.append(f"{cost.params:,} parameters, predicted {expected.params:,}")
    if cost.macs != expected.macs:
        problem = f"{cost.macs:,} MACs, predicted {expected.macs:,}"
        if context.values_decide:
            results.notes.append(f"MACs depend on values in this model and were not compared: {problem}")
        else:
            problems.append(problem)
    results.check("cost", problems, f"{cost.params:,} parameters and {cost.macs:,} MACs, recounted")
    return results
