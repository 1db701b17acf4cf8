"""What the checks of one verification share: the models, the inputs, what is known so far; and what a check found.

A check is a function of a frozen `Context`. It returns `Results`, and a context in which what it learned is filled in
for the checks behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from math import inf

import torch
from torch import nn

from ..capturing import Capture, Inputs, info
from ..core.cost import Cost
from ..core.errors import InputError, first_line
from ..core.nested import deep_copy
from ..core.plan import Edit
from ..core.verification import Check
from .divergence import ROOT, layer_differences, within
from .inputs import Arguments, Draws, Variant
from .numerics import class_scores
from .outputs import Flat
from .rounding import Original
from .runs import Outcome, device_of, keeping_buffers, run


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `pwrewrite.verify`.

    Attributes:
        edits: What was done. Where all of them are exact in a mode, outputs must agree up to rounding in it;
            otherwise the error is reported. Without edits the models are taken for approximately equal.
        expected: Predicted parameters and MACs of the rewritten model, to be met by a recount; its bytes are
            not compared.
        expected_at: The inputs that this is predicted for, where they are not the example inputs.
        allow_output_change: Whether outputs may differ in structure, shape and dtype; what differs is then told.
        max_error: Largest relative output error ``‖y − ŷ‖ / ‖y‖`` that an approximate rewrite may have; None for any.
        captured: The original's capture on inputs of these shapes, if there is one already: saves making another.
        seed: Of drawn inputs and of the models' own randomness.
        thorough: Whether to try other sizes, reloading and training too; otherwise one static and one real comparison.
        progress: Called with a line at each step.
    """

    edits: Sequence[Edit] = ()
    expected: Cost | None = None
    expected_at: Inputs | None = None
    allow_output_change: bool = False
    max_error: float | None = None
    captured: Capture | None = None
    seed: int = 0
    thorough: bool = True
    progress: Callable[[str], None] | None = None

    def exact_in(self, mode: str) -> bool:
        """Whether every edit claims to change no output in this mode."""
        return bool(self.edits) and all(edit.exact in (mode, "both") for edit in self.edits)

    @property
    def largest_error(self) -> float:
        """`max_error` as a number."""
        return inf if self.max_error is None else self.max_error

    @property
    def edited(self) -> tuple[str, ...]:
        """Paths of what was edited, and of layers whose own output is another one after an exact edit beside them."""
        return tuple(
            path for e in self.edits for path in (e.path, *e.aliases, *(e.adapted if e.exact is not None else ()))
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """A run at another size in which the rewritten model is like the original."""

    inputs: Arguments
    after: Outcome  # of the rewritten model


@dataclass(frozen=True)
class Context:
    """One verification: copies of both models, what is asked, and what is known so far."""

    original: nn.Module
    rewritten: nn.Module
    options: Options
    draws: Draws
    reference: Original  # the original in other precisions
    has_values: bool  # whether both models have weights with values
    captures: tuple[Capture, Capture] | None = None  # the static view of both
    free: frozenset[tuple[str, int]] = frozenset()  # ``(path, dim)`` of the outputs' sizes that depend on values
    pair: float | None = None  # relative difference that exact models may have to each other in evaluation
    forms: Mapping[Variant, Flat] = field(default_factory=dict)  # the original's outputs at other sizes, without values
    alike: frozenset[Variant] = frozenset()  # the sizes at which those of the rewritten model are the same
    smaller: str | None = None  # name of a spatial size at which both are alike
    trial: Trial | None = None  # the run that showed it

    @property
    def values_decide(self) -> bool:
        """Whether shapes alone do not suffice to run the models."""
        return self.captures is not None and any(c.coverage.values == "real" for c in self.captures)

    @property
    def compares_values(self) -> bool:
        """Whether values in evaluation are held against a bound; NaN and Inf are in any case."""
        return self.options.exact_in("eval") or self.options.max_error is not None

    @property
    def needs_values(self) -> bool:
        """Whether the original's code looks at values, as that of detection models does."""
        return bool(self.free) or (self.captures is not None and self.captures[0].coverage.values == "real")

    @property
    def macs(self) -> int:
        """MACs of the original per item of the batch."""
        return recounted(self.captures[0]).macs // (self.draws.batch or 1) if self.captures else 0

    def say(self, step: str) -> None:
        """Tells the caller what comes next."""
        if self.options.progress is not None:
            self.options.progress(step)

    def run(self, model: nn.Module, inputs: Arguments, training: bool = False, grad: bool = False) -> Outcome:
        """One seeded run; only in training mode do buffers keep what it wrote, so that later runs start alike."""
        with nullcontext() if training else keeping_buffers(model):
            return run(model, inputs, seed=self.options.seed, training=training, grad=grad)

    def run_both(self, inputs: Arguments, training: bool = False, grad: bool = False) -> tuple[Outcome, Outcome]:
        """The same of the original and of the rewritten model."""
        return self.run(self.original, inputs, training, grad), self.run(self.rewritten, inputs, training, grad)


@dataclass
class Results:
    """What a check found."""

    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was not checked, and why
    diverges_at: str | None = None  # where the models part, if a check failed so
    error: float | None = None  # relative, of the outputs in evaluation
    agree: int = 0  # samples for which a classifier's prediction is the same, of ``samples`` looked at
    samples: int = 0

    def check(self, name: str, problems: list[str], detail: str = "") -> None:
        """Adds a check; ``detail`` is what it says where there are no problems."""
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        self.checks.append(Check(name, not problems, shown or detail))

    def check_form(self, name: str, problems: list[str], detail: str, context: Context) -> None:
        """The same for the form of outputs, of which changes may be allowed."""
        if problems and context.options.allow_output_change:
            problems, detail = [], "changed, as allowed: " + "; ".join(problems[:4])
        self.check(name, problems, detail)

    def part_at(self, place: str) -> str:
        """Notes where the models part, and says so."""
        self.diverges_at = self.diverges_at or place
        return f"they part at {place}"

    def locate(self, context: Context, inputs: Arguments, training: bool = False, allowed: float = inf) -> str:
        """Finds the first layer whose outputs differ by more than ``allowed`` (∞: shapes and NaN only), and says so.

        An edited layer may mean something else now (a norm folded in): it is named only where none behind it differs.
        """
        options = context.options
        edited = options.edited if options.exact_in("train" if training else "eval") else ()
        errors, _, raised = layer_differences(
            context.original, context.rewritten, inputs, seed=options.seed, training=training
        )
        apart = [path for (path, _), error in errors.items() if not error <= allowed or error == inf]
        outside = [path for path in apart if not within(path, edited)]
        return self.part_at(next(iter(outside + apart), raised or ROOT))

    def count_agreeing(self, context: Context, before: Flat, after: Flat, batch: int | None = None) -> None:
        """Counts the samples for which a classifier predicts the same."""
        old, new = (class_scores(flat, batch or context.draws.batch) for flat in (before, after))
        if old is not None and new is not None and old.shape == new.shape:
            self.agree += int((old.argmax(1) == new.to(old.device).argmax(1)).sum())
            self.samples += len(old)

    def add(self, other: Results) -> None:
        """Takes in what another check found."""
        self.checks += other.checks
        self.notes += [note for note in other.notes if note not in self.notes]
        self.diverges_at = self.diverges_at or other.diverges_at
        self.error = other.error if self.error is None else self.error
        self.agree, self.samples = self.agree + other.agree, self.samples + other.samples


def context_of(original: nn.Module, rewritten: nn.Module, example_inputs: Inputs, options: Options) -> Context:
    """The context of two models, which are copied.

    Raises:
        InputError: If one cannot be copied.
    """
    device = device_of(original)
    models = _copied(original, "original"), _copied(rewritten, "rewritten")
    has_values = not any(t.is_meta for m in (original, rewritten) for t in (*m.parameters(), *m.buffers()))
    draws = Draws(example_inputs, None if device is None or device.type == "meta" else device, options.seed)
    return Context(*models, options, draws, Original(original, options.seed), has_values)


def recounted(capture: Capture) -> Cost:
    """Parameters and MACs of a capture."""
    return Cost(params=capture.params, macs=sum(info(node).cost.macs for node in capture.graph.nodes))


def as_inputs(inputs: Arguments) -> Inputs:
    """Arguments as `capture` takes them: all by position or all by name."""
    args, kwargs = inputs
    return kwargs or args


def finite(flat: Flat) -> bool:
    """Whether every value is finite."""
    return all(bool(torch.isfinite(t).all()) for t in flat.floating.values())


def _copied(model: nn.Module, name: str) -> nn.Module:
    try:
        copied = deep_copy(model)
    except Exception as error:
        message, where = f"the {name} model cannot be copied: {first_line(error)}", type(model).__name__
        raise InputError(message, where=where) from error
    with suppress(Exception):
        copied.zero_grad(set_to_none=True)
    return copied
