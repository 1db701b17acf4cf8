"""Both models at other batch sizes and other spatial sizes: each on shapes alone, some in a real run.

One larger batch is run, and of the spatial sizes one below the example's and one above: code may branch on a size.

Below is a quarter of the size where that leaves 32 pixels, else half of it: what branches on a size above half of the
example's does so there, too, and a border that is computed wrongly is more of the map. Only under a bound on the error
of an approximate rewrite it is half: near borders that may err more than on the inputs that the bound is meant for.

What the original does not take is not a check; a note says so. A model whose code looks at values has no comparison on
shapes, and there one real run is all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..capturing import capture
from ..capturing.dry_run import dry_runs
from ..core.errors import CaptureError
from .context import Context, Results, Trial, as_inputs, finite
from .divergence import first_shape_divergence
from .evaluation import real_differences
from .inputs import BELOW, Arguments, Variant
from .outputs import Flat, differences, flatten
from .runs import Outcome
from .static import static_differences
from .values import judge_elsewhere

_REAL_MACS = 40_000_000_000
"""MACs that the run at a larger batch may take: 8 images of ResNet-50, 2 of VGG-16."""

Variants = Mapping[str, Variant]


def check_spatial_sizes(context: Context) -> tuple[Results, Context]:
    """Tries a smaller size, another aspect ratio and an odd size on shapes, one below and one above in a real run."""
    variants: Variants = {context.draws.size_text(size): (None, size) for size in _sizes(context)}
    groups: list[Variants] = [
        {k: v for k, v in variants.items() if (v[1] in BELOW) is below} for below in (True, False)
    ]
    return _check(context, "spatial sizes", variants, groups)


def _sizes(context: Context) -> list[str]:
    """The spatial sizes to try: of those below the example's the first that the original takes, where that is known."""
    bounded = context.options.max_error is not None and not context.options.exact_in("eval")
    below = next((size for size in BELOW if (None, size) in context.forms), None)
    left_out = {"quarter"} if bounded else set[str]()
    if below is not None:
        left_out |= {size for size in BELOW if size != below}
    return [size for size in context.draws.sizes() if size not in left_out]


def check_batch_sizes(context: Context, predicts: bool) -> tuple[Results, Context]:
    """Tries batches of 1, 2 and 3 on shapes, and a larger one in a real run: for classifiers, to count predictions.

    The real run is at the smaller size that both ran at before, if any: its values are variations and no data.
    """
    size, variants = context.smaller, _batches(context)
    many = max(2, min(8, _REAL_MACS // max(context.macs, 1))) if predicts else 2
    label = f"{many} at {context.draws.size_text(size)}" if size else str(many)
    first: Variants = {label: (many, size)} if many != context.draws.batch else {}
    results, context = _check(context, "batch sizes", variants, [{**first, **variants}])
    if predicts and not results.samples:
        _more_samples(context, results, many)
    return results, context


def _batches(context: Context) -> Variants:
    batch = context.draws.batch
    return {str(b): (b, None) for b in (1, 2, 3) if b != batch} if batch else {}


def _more_samples(context: Context, results: Results, many: int) -> None:
    """More samples for the agreement, one batch like the example's after the other."""
    had = context.draws.batch or 1
    for variant in range(1, many):
        if had + results.samples >= many:
            return
        before, after = context.run_both(context.draws.draw(variant=variant))
        if before.ran and after.ran:
            results.count_agreeing(context, before.output, after.output)


def _check(context: Context, name: str, variants: Variants, groups: Sequence[Variants]) -> tuple[Results, Context]:
    """Compares all variants on shapes, and the first of each group that the original takes in a real run."""
    context.say(name)
    results, problems, ran = Results(), list[str](), list[str]()
    static = context.captures is not None and not context.values_decide
    taken = {k: v for k, v in variants.items() if not static or _fits(context, results, k, v, problems)}
    for group in groups if taken else ():
        for label, variant in group.items():
            if label in variants and label not in taken:
                continue
            found = _run_at(context, results, variant)
            if found is not None:
                more, context = found
                problems += [f"at {label} {problem}" for problem in more]
                ran.append(label)
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


# ------------------------------------------------------------------------------------------------ on shapes alone


def with_forms(context: Context) -> Context:
    """Compares shapes at all sizes in runs that write nothing down, in a fraction of a capture's time.

    Where both models return the same is known then; only where they do not, or it cannot be told, they are captured.
    """
    if context.captures is None or context.values_decide:
        return context
    forms, alike = dict[Variant, Flat](), set[Variant]()
    with dry_runs(context.original) as original, dry_runs(context.rewritten) as rewritten:
        for variant in (*_batches(context).values(), *((None, size) for size in _sizes(context))):
            if variant[1] in BELOW and any(size in BELOW for _, size in forms):
                continue
            inputs = context.draws.shapes(*variant)
            before = original(inputs)
            if before is not None:
                form, after = flatten(before), rewritten(inputs)
                forms[variant] = form
                if after is not None and not differences(form, flatten(after)):
                    alike.add(variant)
    return replace(context, forms=forms, alike=frozenset(alike))


def _fits(context: Context, results: Results, label: str, variant: Variant, problems: list[str]) -> bool:
    """Compares what both return on shapes at a size; whether the original takes it."""
    if variant in context.alike:
        return True
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


# ------------------------------------------------------------------------------------------------- in a real run


def _run_at(context: Context, results: Results, variant: Variant) -> tuple[list[str], Context] | None:
    """Compares a real run: what is wrong, and what is known then; None where the original does not take it.

    Where no values are compared and no predictions counted, the form that the original has on shapes alone is enough,
    as long as the rewritten model returns that and nothing but finite values.
    """
    batch, size = variant
    inputs = context.draws.draw(batch, size)
    form = None if batch or context.compares_values else context.forms.get(variant)
    if form is not None:
        after = context.run(context.rewritten, inputs)
        if after.ran and finite(after.output) and not differences(form, after.output):
            return [], _agreed(context, size, inputs, after)
    before = context.run(context.original, inputs)
    if not before.ran:
        return None
    after = context.run(context.rewritten, inputs)
    if not after.ran:
        place = results.locate(context, inputs)
        return [f"the rewritten model does not run: {after.error}; {place}"], context
    problems, context = _compared(context, results, inputs, before, after)
    if batch:
        results.count_agreeing(context, before.output, after.output, batch)
    return problems, context if problems else _agreed(context, size, inputs, after)


def _agreed(context: Context, size: str | None, inputs: Arguments, after: Outcome) -> Context:
    """What is known after a run in which both agreed: the first such size, and that run."""
    if context.smaller is not None or size is None:
        return context
    return replace(context, smaller=size, trial=Trial(inputs, after))


def _compared(
    context: Context, results: Results, inputs: Arguments, before: Outcome, after: Outcome
) -> tuple[list[str], Context]:
    """What differs between two runs at another size in form and values."""
    problems = []
    different, context = real_differences(context, results, inputs, before.output, after.output)
    if different and not context.options.allow_output_change:
        problems.append(f"{different[0]}; {results.locate(context, inputs)}")
    exceeded, allowed = judge_elsewhere(context, inputs, before, after)
    if exceeded:
        problems.append(f"{exceeded[0]}; {results.locate(context, inputs, allowed=allowed)}")
    return problems, context
