"""Both models at other batch sizes and other spatial sizes: each statically, one in a real run.

What the original does not take is not a check; a note says so. A model whose code looks at values has no static
comparison, and there one real run is all.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from ..capturing import capture
from ..core.errors import CaptureError
from .divergence import first_shape_divergence
from .inputs import Arguments
from .runs import Outcome

if TYPE_CHECKING:
    from .session import Session

_REAL_MACS = 40_000_000_000
"""MACs that the run at a larger batch may take: 8 images of ResNet-50, 2 of VGG-16."""

Variants = dict[str, tuple[int | None, str | None]]
"""Label to batch size and name of a spatial size."""


def check_batch_sizes(session: Session) -> None:
    """Tries batches of 1, 2 and 3, and for classifiers up to 8 in the real run, whose predictions are counted."""
    batch = session.draws.batch
    variants: Variants = {str(b): (b, None) for b in (1, 2, 3) if b != batch} if batch else {}
    many = max(2, min(8, _REAL_MACS // max(session.macs(), 1))) if session.samples else 2
    first: Variants = {str(many): (many, None)} if many != batch else {}
    before = session.samples
    _check(session, "batch sizes", variants, first)
    if before and session.samples == before:
        _more_samples(session, many)


def _more_samples(session: Session, many: int) -> None:
    """More samples for the agreement, one batch like the example's after the other."""
    for variant in range(1, many):
        if session.samples >= many:
            return
        inputs = session.draws.draw(variant=variant)
        before, after = session.run(session.original, inputs), session.run(session.rewritten, inputs)
        if before.output is not None and after.output is not None:
            session.count_agreeing(before.output, after.output)


def check_spatial_sizes(session: Session) -> None:
    """Tries half the size, another aspect ratio and an odd size."""
    variants: Variants = {session.draws.size_text(size): (None, size) for size in session.draws.sizes()}
    _check(session, "spatial sizes", variants, {})


def _check(session: Session, name: str, variants: Variants, first: Variants) -> None:
    session.progress(name)
    problems: list[str] = []
    static = session.captures is not None and not session.values_decide()
    taken = {k: v for k, v in variants.items() if not static or _fits(session, k, v, problems)}
    ran = ""
    for label, (batch, size) in (first | taken if taken else {}).items():
        inputs = session.draws.draw(batch, size)
        before = session.run(session.original, inputs)
        if before.output is None:
            continue
        ran = label
        session.smaller = size or session.smaller
        _same_at(session, label, inputs, before, batch, problems)
        break
    if not variants:
        session.notes.append(f"the inputs have no axis to vary: no other {name} were tried")
        return
    if refused := [label for label in variants if label not in taken]:
        session.notes.append(f"{name} that the original does not take: {', '.join(refused)}")
    if not ran and not (static and taken):
        session.notes.append(f"no other {name} could be tried")
        return
    tried = [f"{', '.join(taken)} statically"] if static else []
    session.check(name, problems, "; ".join([*tried, f"{ran or 'none'} in a real run"]))


def _fits(session: Session, label: str, variant: tuple[int | None, str | None], problems: list[str]) -> bool:
    """Compares shapes statically at a size; whether the original takes it."""
    args, kwargs = session.draws.shapes(*variant)
    try:
        before = capture(session.original, kwargs or args, values="meta")
    except CaptureError:
        return False
    try:
        after = capture(session.rewritten, kwargs or args, values="meta")
    except CaptureError as error:
        problems.append(f"at {label} the rewritten model does not run: {error.message}")
        session.diverges_at = session.diverges_at or error.where
        return True
    found = session.static_differences(before, after)
    if found and not session.settings.allow_output_change:
        place = first_shape_divergence(before, after)
        session.diverges_at = session.diverges_at or place
        problems += [f"at {label} {found[0]}; they part at {place}"]
    return True


def _same_at(
    session: Session, label: str, inputs: Arguments, before: Outcome, batch: int | None, problems: list[str]
) -> None:
    """Compares a real run at a size."""
    after = session.run(session.rewritten, inputs)
    assert before.output is not None
    if after.output is None:
        place = session.locate(inputs, False, inf)
        problems.append(f"at {label} the rewritten model does not run: {after.error}; {place}")
        return
    found = session.real_differences(inputs, before.output, after.output)
    if found and not session.settings.allow_output_change:
        problems.append(f"at {label} {found[0]}; {session.locate(inputs, False, inf)}")
    exceeded, allowed = session.judge.elsewhere(inputs, before, after)
    if exceeded:
        problems.append(f"at {label} {exceeded[0]}; {session.locate(inputs, False, allowed)}")
    if batch:
        session.count_agreeing(before.output, after.output, batch)
