"""Both models in training: one forward, whose form and values are compared, and one backward.

The batch is two where the original takes that, since a batch norm needs more than one value; a costly model runs at the
smaller spatial size that it was found to take. Both runs start from the same seed, so that random masks agree
as long as both models draw alike.
"""

from __future__ import annotations

import copy
from math import inf, sqrt
from typing import TYPE_CHECKING

import torch

from .gradients import Gradients, backward, complaints, gradient_difference
from .inputs import Arguments
from .judge import buffer_differences
from .outputs import Flat
from .runs import Outcome

if TYPE_CHECKING:
    from .session import Session

_SMALL_MACS = 1_000_000_000
"""MACs up to which the training run takes the full spatial size."""


def gradient_limit(rounding: float) -> float:
    """Relative difference of all gradients together that an edit exact in training may make in float32.

    Rounding of relative size e turns about that part of the ReLUs and maxima the other way, each of which changes
    its piece of the gradient by its whole size: the norm of the change grows as √e. Honest rewrites of torchvision
    models with random weights come to 6·√e at most; 20·√e is allowed. Above 0.1 the comparison says nothing, since a
    lost path or factor changes gradients by tenths: infinite.
    """
    limit = max(1e-2, 20 * sqrt(rounding))
    return limit if limit <= 0.1 else inf


def check_training(session: Session) -> None:
    """Checks form, values, running statistics and gradients."""
    session.progress("training")
    inputs, before, grad = _training_run(session)
    judge, notes = session.judge, session.notes
    if before.output is not None:
        after = session.run(session.rewritten, inputs, training=True, grad=grad)
        session.form("train", inputs, before, after)
        if after.output is not None:
            _values(session, inputs, before, after)
    else:
        notes.append(f"the original does not run in training mode ({before.error}): training was not checked")
        if judge.needs_values:
            notes.append("gradients were not checked: values decide which there are")
            return
        inputs, grad = session.draws.draw(), True
        before = session.run(session.original, inputs, grad=True)
        after = session.run(session.rewritten, inputs, grad=True)
    if before.output is None or after.output is None:
        return
    if judge.needs_values:
        notes.append("gradients were not checked: values decide which there are")
    elif not grad:
        notes.append("gradients were not checked: the original does not run with them")
    else:
        _gradients(session, backward(session.original, before.output), before.output, after.output)


def _training_run(session: Session) -> tuple[Arguments, Outcome, bool]:
    """Inputs that the original trains on, what came of it, and whether with gradients."""
    draws, model = session.draws, session.original
    batch = draws.batch if draws.batch and 2 <= draws.batch <= 4 else 2
    choices: list[tuple[int | None, str | None]] = [(batch, None), (None, None)]
    if session.smaller and session.macs() > _SMALL_MACS:
        choices.insert(0, (batch, session.smaller))
    saved = {name: b.clone() for name, b in model.named_buffers()}
    inputs, outcome = draws.draw(), None
    for grad in (True, False):
        for choice in choices:
            inputs = draws.draw(*choice)
            outcome = session.run(model, inputs, training=True, grad=grad)
            if outcome.ran:
                return inputs, outcome, grad
            with torch.no_grad():
                for name, b in model.named_buffers():
                    if name in saved:
                        b.copy_(saved[name])
    assert outcome is not None
    return inputs, outcome, False


def _values(session: Session, inputs: Arguments, before: Outcome, after: Outcome) -> None:
    """NaN, numerics and running statistics. These are read first: to find a divergence the models run again."""
    old = copy.deepcopy(dict(session.original.named_buffers()))
    new = copy.deepcopy(dict(session.rewritten.named_buffers()))
    session.values("train", inputs, before, after)
    if session.settings.exact_in("train") and old and session.judge.same_draws:
        found = buffer_differences(old, new, session.judge.buffer_limit)
        session.check("buffers (train)", found, "running statistics move alike")


def _gradients(session: Session, old: Gradients, before: Flat, after: Flat) -> None:
    if old.error:
        session.notes.append(f"gradients were not checked: {old.error}")
        return
    new = backward(session.rewritten, after)
    if new.error:
        session.check("gradients", [f"the rewritten model has no backward pass: {new.error}"], "")
        return
    found = complaints(old.of, new.of)
    detail = f"{sum(g is not None for g in new.of.values())} parameters get one"
    exact = session.settings.exact_in("train") and session.judge.same_draws
    difference = gradient_difference(old.of, new.of) if exact and session.judge.precise(before) else None
    if difference is not None:
        detail += f"; those that both have differ by {difference:.1e}"
        limit = gradient_limit(session.judge.train_rounding)
        if limit == inf:
            session.notes.append(
                "gradient values were not compared: rounding alone moves the original's outputs in training by "
                f"{session.judge.train_rounding:.1e}"
            )
        elif not difference <= limit:
            found.append(f"gradients differ by {difference:.1e}, allowed {limit:.1e}")
    session.check("gradients", found, detail)
