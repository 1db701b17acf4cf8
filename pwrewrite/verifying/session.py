"""One verification, step by step: `Session` holds the copies and gathers the checks. Public as `pwrewrite.verify`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import nn

from ..capturing import Capture, Inputs, capture, info
from ..core.cost import Cost
from ..core.errors import CaptureError, InputError
from ..core.plan import Edit
from ..core.verification import Check, Verification
from .divergence import first_divergence, first_shape_divergence
from .inputs import Arguments, Draws
from .judge import Judge, noisy_copy
from .numerics import agreeing, class_scores
from .outputs import Flat, differences, flatten, flatten_captured, varying
from .reload import reloaded
from .runs import Outcome, device_of, first_line
from .runs import run as run_once
from .sizes import check_batch_sizes, check_spatial_sizes
from .training import check_training


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of `pwrewrite.verify`."""

    edits: tuple[Edit, ...] = ()
    expected: Cost | None = None
    allow_output_change: bool = False
    max_error: float | None = None
    seed: int = 0
    thorough: bool = True
    progress: Callable[[str], None] | None = None

    def exact_in(self, mode: str) -> bool:
        """Whether every edit claims to change no output in this mode."""
        return bool(self.edits) and all(edit.exact in (mode, "both") for edit in self.edits)

    @property
    def edited(self) -> tuple[str, ...]:
        """Paths of what was edited, and of layers whose own output is another one after an exact edit beside them."""
        return tuple(
            path for e in self.edits for path in (e.path, *e.aliases, *(e.adapted if e.exact is not None else ()))
        )


class Session:
    """Runs the checks in order and remembers what they found.

    Args:
        original: The user's model before; copied.
        rewritten: The user's model after; copied.
        example_inputs: As `pwrewrite.verify` takes them.
        settings: Its options.

    Attributes:
        captures: The static view of both; None where there is none.
        smaller: Name of a spatial size that both ran at.
        agree: Samples for which a classifier's prediction is the same.
        samples: Samples looked at for that.
    """

    def __init__(self, original: nn.Module, rewritten: nn.Module, example_inputs: Inputs, settings: Settings) -> None:
        self.settings = settings
        self.original, self.rewritten = _copied(original, "original"), _copied(rewritten, "rewritten")
        self.draws = Draws(example_inputs, _real_device(original), settings.seed)
        self.judge = Judge(original, settings.exact_in, settings.max_error, settings.seed)
        self.has_values = not any(t.is_meta for m in (original, rewritten) for t in (*m.parameters(), *m.buffers()))
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self.error: float | None = None
        self.agree = self.samples = 0
        self.diverges_at: str | None = None
        self.captures: tuple[Capture, Capture] | None = None
        self.smaller: str | None = None
        self._places: dict[bool, str] = {}
        self._free: set[tuple[str, int]] = set()

    def verification(self) -> Verification:
        """Runs everything."""
        self._static()
        if not self.has_values:
            self.notes.append("the weights are on meta: numerics, training, gradients and reloading were not checked")
        elif self._first_run() and self.settings.thorough:
            check_batch_sizes(self)
            check_spatial_sizes(self)
            self._reload()
            check_training(self)
        if self.has_values and not self.settings.thorough:
            self.notes.append("other sizes, training, gradients and reloading were not checked")
        self._recount()
        self.notes += [note for note in self.judge.notes if note not in self.notes]
        agreement = self.agree / self.samples if self.samples else None
        if self.samples:
            said = f"; the largest output agrees on {self.agree} of {self.samples} samples"
            told = (replace(c, detail=c.detail + said) if c.name == "numerics (eval)" else c for c in self.checks)
            self.checks = list(told)
        return Verification(tuple(self.checks), self.error, agreement, self.diverges_at, tuple(self.notes))

    # ------------------------------------------------------------------------------------------------- helpers

    def progress(self, step: str) -> None:
        """Tells the caller what comes next."""
        if self.settings.progress is not None:
            self.settings.progress(step)

    def check(self, name: str, problems: list[str], detail: str) -> bool:
        """Adds a check; ``detail`` is what it says where there are no problems."""
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        self.checks.append(Check(name, not problems, shown or detail))
        return not problems

    def locate(self, inputs: Arguments, training: bool, allowed: float) -> str:
        """Where the models part in a mode: found once, noted for the first failure."""
        if training in self._places:
            return f"they part at {self._places[training]}"
        exact = self.settings.exact_in("train" if training else "eval")
        place = first_divergence(
            self.original,
            self.rewritten,
            inputs,
            seed=self.settings.seed,
            training=training,
            allowed=allowed,
            edited=self.settings.edited if exact else (),
        )
        self._places[training] = place
        self.diverges_at = self.diverges_at or place
        return f"they part at {place}"

    def run(self, model: nn.Module, inputs: Arguments, training: bool = False, grad: bool = False) -> Outcome:
        """One seeded run."""
        return run_once(model, inputs, seed=self.settings.seed, training=training, grad=grad)

    # -------------------------------------------------------------------------------------------------- static

    def _static(self) -> None:
        self.progress("shapes, statically")
        inputs = as_inputs(self.draws.draw() if self.has_values else self.draws.shapes())
        try:
            before = capture(self.original, inputs)
        except CaptureError as error:
            if not self.has_values:
                raise
            self.notes.append(f"the original cannot be captured ({error.message}): no static checks")
            return
        try:
            after = capture(self.rewritten, inputs)
        except CaptureError as error:
            self.diverges_at = error.where
            self.check("shapes (static)", [f"the rewritten model cannot be captured: {error.message}"], "")
            return
        self.captures = before, after
        self.judge.depth = 1 + len(before.calls)
        self.judge.needs_values = before.coverage.values == "real"
        found = self.static_differences(before, after)
        if found and self.has_values and self.values_decide():
            self.notes.append("the model needs values: its sizes are compared in real runs only")
            return
        if found and not self.settings.allow_output_change:
            self.diverges_at = first_shape_divergence(before, after)
            found.append(f"they part at {self.diverges_at}")
        self.changed("shapes (static)", found, flatten_captured(before).describe())

    def macs(self) -> int:
        """MACs of the original per item of the batch."""
        total = recounted(self.captures[0]).macs if self.captures else 0
        return total // (self.draws.batch or 1)

    def values_decide(self) -> bool:
        """Whether shapes alone do not suffice to run the models."""
        return self.captures is not None and any(c.coverage.values == "real" for c in self.captures)

    def static_differences(self, before: Capture, after: Capture) -> list[str]:
        """What differs in form between the outputs of two captures."""
        return differences(flatten_captured(before), flatten_captured(after))

    def changed(self, name: str, found: list[str], detail: str) -> bool:
        """A check of outputs' form, of which changes may be allowed."""
        if found and self.settings.allow_output_change:
            return self.check(name, [], "changed, as allowed: " + "; ".join(found[:4]))
        return self.check(name, found, detail)

    # ----------------------------------------------------------------------------------------------- real runs

    def _first_run(self) -> bool:
        """Both models on the example, in evaluation; whether it is worth going on."""
        self.progress("one run in evaluation")
        inputs = self.draws.draw()
        before = self.run(self.original, inputs)
        if self.draws.drawn and (before.output is None or not _finite(before.output)):
            self.draws.random = False
            given = self.draws.draw()
            again = self.run(self.original, given)
            if again.output is not None and (before.output is None or _finite(again.output)):
                self.notes.append("the original does not take random values: the given ones were used")
                inputs, before = given, again
            else:
                self.draws.random = True
        if before.output is None:
            raise InputError(
                f"the original does not run on these inputs: {before.error}",
                hint="check that model(*example_inputs) runs in plain PyTorch, in eval mode",
            )
        after = self.run(self.rewritten, inputs)
        ok = self.form("eval", inputs, before, after)
        if after.output is not None:
            self.values("eval", inputs, before, after)
            self.count_agreeing(before.output, after.output)
        return ok or after.ran

    def form(self, mode: str, inputs: Arguments, before: Outcome, after: Outcome) -> bool:
        """Structure, shapes and dtypes of a real run."""
        training = mode == "train"
        assert before.output is not None
        if after.output is None:
            problem = f"the rewritten model does not run: {after.error}; {self.locate(inputs, training, inf)}"
            return self.check(f"shapes ({mode})", [problem], "")
        found = self.real_differences(inputs, before.output, after.output, training)
        if found and not self.settings.allow_output_change:
            found.append(self.locate(inputs, training, inf))
        return self.changed(f"shapes ({mode})", found, after.output.describe())

    def real_differences(self, inputs: Arguments, before: Flat, after: Flat, training: bool = False) -> list[str]:
        """The same between two runs, but for sizes that depend on values."""
        found = differences(before, after, self._free)
        if found and not training and varying(before, after) - self._free:
            self._find_free(inputs, before, varying(before, after))
            found = differences(before, after, self._free)
        return found

    def _find_free(self, inputs: Arguments, before: Flat, wanted: set[tuple[str, int]]) -> None:
        """Finds sizes that depend on values: those that other inputs, or slightly other weights, change.

        The weights are moved, and made smaller, as a factorisation makes them: a detector that always finds as many
        boxes as it may then finds fewer.
        """
        noisy = noisy_copy(self.original, 0.1, self.settings.seed)
        smaller = noisy_copy(self.original, 0.0, self.settings.seed, scale=0.9)
        others = [self.draws.draw(variant=variant) for variant in (1, 2, 3)]
        first = [(self.original, others[0]), (noisy, inputs), (smaller, inputs)]
        trials = [*first, (noisy, others[1]), (self.original, others[2])]
        for model, tried in trials:
            if _shapes(tried) != _shapes(inputs):
                continue
            if wanted <= self._free:
                break
            outcome = self.run(model, tried)
            if outcome.output is not None:
                self._free |= varying(before, outcome.output)
        if self._free & wanted:
            self.judge.needs_values = True
            places = ", ".join(f"output{path} (dim {dim})" for path, dim in sorted(self._free & wanted))
            self.notes.append(f"sizes that depend on values were not compared: {places}")

    def values(self, mode: str, inputs: Arguments, before: Outcome, after: Outcome) -> None:
        """NaN and numerics of a real run."""
        verdict = self.judge.judge(mode, self.original, self.rewritten, inputs, before, after, self.settings.edited)
        if mode == "eval":
            self.error = verdict.error
        if verdict.spoiled:
            spoiled = [*verdict.spoiled, self.locate(inputs, mode == "train", inf)]
            self.check(f"finite ({mode})", spoiled, "")
        else:
            self.check(f"finite ({mode})", [], "no NaN or Inf where the original has none")
        if verdict.detail or verdict.exceeded:
            found = list(verdict.exceeded)
            if found:
                found.append(self.locate(inputs, mode == "train", verdict.allowed))
            self.check(f"numerics ({mode})", found, verdict.detail)

    def count_agreeing(self, before: Flat, after: Flat, batch: int | None = None) -> None:
        """Counts the samples for which a classifier predicts the same."""
        old, new = class_scores(before, batch or self.draws.batch), class_scores(after, batch or self.draws.batch)
        if old is not None and new is not None and old.shape == new.shape:
            self.agree += agreeing(old, new)
            self.samples += len(old)

    # ---------------------------------------------------------------------------------- reloading, cost

    def _reload(self) -> None:
        self.progress("saving and reloading")
        again, problems, notes = reloaded(self.rewritten, self.original)
        self.notes += notes
        if again is not None:
            inputs = self.draws.draw(size=self.smaller)
            before, after = self.run(self.rewritten, inputs), self.run(again, inputs)
            if before.output is not None:
                problems += self.judge.unlike(before, after)
        self.check("state_dict", problems, "saves, reloads and gives the same outputs")

    def _recount(self) -> None:
        expected = self.settings.expected
        if expected is None:
            return
        if self.captures is None:
            self.check("cost", ["nothing to recount: the rewritten model cannot be captured"], "")
            return
        cost = recounted(self.captures[1])
        found = []
        if cost.params != expected.params:
            found.append(f"{cost.params:,} parameters, predicted {expected.params:,}")
        if cost.macs != expected.macs:
            said = f"{cost.macs:,} MACs, predicted {expected.macs:,}"
            if self.values_decide():
                self.notes.append(f"MACs depend on values in this model and were not compared: {said}")
            else:
                found.append(said)
        self.check("cost", found, f"{cost.params:,} parameters and {cost.macs:,} MACs, recounted")


def recounted(found: Capture) -> Cost:
    """Parameters and MACs of a capture."""
    return Cost(params=found.params, macs=sum(info(node).cost.macs for node in found.graph.nodes))


def as_inputs(inputs: Arguments) -> Inputs:
    """Arguments as `capture` takes them: all by position or all by name."""
    args, kwargs = inputs
    return kwargs or args


def _finite(flat: Flat) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in flat.floating.values())


def _real_device(model: nn.Module) -> torch.device | None:
    device = device_of(model)
    return None if device is None or device.type == "meta" else device


def _copied(model: nn.Module, name: str) -> nn.Module:
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise InputError(
            f"the {name} model cannot be copied: {first_line(error)}", where=type(model).__name__
        ) from error
    with suppress(Exception):
        copied.zero_grad(set_to_none=True)
    return copied


def _shapes(inputs: Arguments) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in flatten(inputs).tensors.values()]
