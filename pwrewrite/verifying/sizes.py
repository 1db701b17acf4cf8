"""Both models at other batch sizes and other spatial sizes: each statically, some in a real run.

One larger batch is run, and of the spatial sizes one below the example's and one above: code may branch on a size.

What the original does not take is not a check; a note says so. A model whose code looks at values has no static
comparison, and there one real run is all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..capturing import capture
from ..core.errors import CaptureError
from .context import Context, Results, as_inputs
from .divergence import first_shape_divergence
from .evaluation import real_differences
from .inputs import Arguments
from .runs import Outcome
from .static import static_differences
from .values import judge_elsewhere

_REAL_MACS = 40_000_000_000
"""MACs that the run at a larger batch may take: 8 images of ResNet-50, 2 of VGG-16."""

Variant = tuple[int | None, str | None]
"""Batch size and name of a spatial size; the example's where None."""

Variants = Mapping[str, Variant]


def check_batch_sizes(context: Context, predicts: bool) -> tuple[Results, Context]:
    """Tries batches of 1, 2 and 3, and for classifiers up to 8 in the real run, whose predictions are counted.

    The real run is at the smaller size that both ran at before, if any: its values are variations and no data.
    """
    batch, size = context.draws.batch, context.smaller
    variants: Variants = {str(b): (b, None) for b in (1, 2, 3) if b != batch} if batch else {}
    many = max(2, min(8, _REAL_MACS // max(context.macs, 1))) if predicts else 2
    label = f"{many} at {context.draws.size_text(size)}" if size else str(many)
    first: Variants = {label: (many, size)} if many != batch else {}
    results, context = _check(context, "batch sizes", variants, [{**first, **variants}])
    if predicts and not results.samples:
        _more_samples(context, results, many)
    return results, context


def _more_samples(context: Context, results: Results, many: int) -> None:
    """More samples for the agreement, one batch like the example's after the other."""
    had = context.draws.batch or 1
    for variant in range(1, many):
        if had + results.samples >= many:
            return
        before, after = context.run_both(context.draws.draw(variant=variant))
        if before.ran and after.ran:
            results.count_agreeing(context, before.output, after.output)


def check_spatial_sizes(context: Context) -> tuple[Results, Context]:
    """Tries half the size, another aspect ratio and an odd size."""
    variants: Variants = {context.draws.size_text(size): (None, size) for size in context.draws.sizes()}
    groups = [{k: v for k, v in variants.items() if (v[1] == "half") is below} for below in (True, False)]
    return _check(context, "spatial sizes", variants, groups)


def _check(context: Context, name: str, variants: Variants, groups: Sequence[Variants]) -> tuple[Results, Context]:
    """Compares all variants statically, and the first of each group that the original takes in a real run."""
    context.say(name)
    results, problems, ran = Results(), list[str](), list[str]()
    static = context.captures is not None and not context.values_decide
    taken = {k: v for k, v in variants.items() if not static or _fits(context, results, k, v, problems)}
    for group in groups if taken else ():
        for label, (batch, size) in group.items():
            if label in variants and label not in taken:
                continue
            inputs = context.draws.draw(batch, size)
            before = context.run(context.original, inputs)
            if before.ran:
                ran.append(label)
                more, context = _same_at(context, results, inputs, before, batch)
                if not more:
                    context = replace(context, smaller=context.smaller or size)
                problems += [f"at {label} {problem}" for problem in more]
                break
    if not variants:
        results.notes.append(f"the inputs have no axis to vary: no other {name} were tried")
        return results, context
    if refused := [label for label in variants if label not in taken]:
        results.notes.append(f"{name} that the original does not take: {', '.join(refused)}")
    if not ran and not (static and taken):
        results.notes.append(f"no other {name} could be tried")
        return results, context
    tried = [f"{', '.join(taken)} statically"] if static else []
    results.check(name, problems, "; ".join([*tried, f"{' and '.join(ran) or 'none'} in a real run"]))
    return results, context


def _fits(context: Context, results: Results, label: str, variant: Variant, problems: list[str]) -> bool:
    """Compares shapes statically at a size; whether the original takes it."""
    inputs = as_inputs(context.draws.shapes(*variant))
    try:
        before = capture(context.original, inputs, values="meta")
    except CaptureError:
        return False
    try:
        after = capture(context.rewritten, inputs, values="meta")
    except CaptureError as error:
        problems.append(f"at {label} the rewritten model does not run: {error.message}")
        results.diverges_at = results.diverges_at or error.where
        return True
    different = static_differences(before, after)
    if different and not context.options.allow_output_change:
        problems.append(f"at {label} {different[0]}; {results.part_at(first_shape_divergence(before, after))}")
    return True


def _same_at(
    context: Context, results: Results, inputs: Arguments, before: Outcome, batch: int | None
) -> tuple[list[str], Context]:
    """Compares a real run at a size."""
    after = context.run(context.rewritten, inputs)
    if not after.ran:
        return [f"the rewritten model does not run: {after.error}; {results.locate(context, inputs)}"], context
    problems = []
    different, context = real_differences(context, results, inputs, before.output, after.output)
    if different and not context.options.allow_output_change:
        problems.append(f"{different[0]}; {results.locate(context, inputs)}")
    exceeded, allowed = judge_elsewhere(context, inputs, before, after)
    if exceeded:
        problems.append(f"{exceeded[0]}; {results.locate(context, inputs, allowed=allowed)}")
    if batch:
        results.count_agreeing(context, before.output, after.output, batch)
    return problems, context
