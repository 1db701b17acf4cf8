"""Decides whether two outputs are close enough: finds out what rounding does to the original; applies `numerics`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import inf, sqrt

import torch
from torch import Tensor, nn

from .divergence import layer_differences, within
from .inputs import Arguments, map_leaves
from .numerics import Bound, Comparison, compare, errors, exact_limits, flips, nudged, roundoff, scale_of
from .outputs import Flat, differences
from .runs import Outcome, run

_SCRAMBLED = 0.05
"""Relative difference from which a reference says nothing: other random masks, or results in another order."""
_SCRAMBLED_HALF = 0.5
"""The same in half precision, where a deep network may come to some percents by rounding alone."""


@dataclass(slots=True)
class Verdict:
    """What came of one comparison.

    Attributes:
        error: Relative output error to the original; None where there is none to tell.
        spoiled: One sentence per tensor with NaN or Inf that the original's does not have.
        exceeded: One sentence per difference that is too large.
        detail: What was measured; empty where numerics were not compared.
        allowed: Relative difference up to which the two models' layers agree.
        scrambled: Whether rounding alone changes the original's output so much that it says nothing.
    """

    error: float | None = None
    spoiled: list[str] = field(default_factory=list)
    exceeded: list[str] = field(default_factory=list)
    detail: str = ""
    allowed: float = inf
    scrambled: bool = False


@dataclass(slots=True)
class _Rounding:
    """What rounding does to the original: a reference, its name, the errors to it, the bounds that follow."""

    reference: Flat
    errors: dict[str, float]
    limits: dict[str, float]
    floor: float
    name: str


class Judge:
    """Compares values of the original and the rewritten model.

    Args:
        original: The user's model; copied where a copy in another precision is needed.
        exact_in: Whether outputs must agree up to rounding in a mode.
        max_error: Bound on the relative error of approximate rewrites.
        seed: Of all runs.

    Attributes:
        depth: Layers that round, one after the other.
        needs_values: Whether the model's code looks at values, as that of detection models does.
        same_draws: Whether both models drew the same random numbers in the last run.
        notes: What a reader should know.
        train_rounding: Relative error that rounding made in the original's outputs in training.
        buffer_limit: Relative difference that running statistics may have after a training run.
    """

    def __init__(
        self, original: nn.Module, exact_in: Callable[[str], bool], max_error: float | None, seed: int
    ) -> None:
        self.original, self.exact_in, self.max_error, self.seed = original, exact_in, max_error, seed
        self.depth = 1
        self.needs_values = False
        self.same_draws = True
        self.notes: list[str] = []
        self.buffer_limit = inf
        self.train_rounding = 0.0
        self._pair: float | None = None
        self._references: dict[torch.dtype, nn.Module] = {}
        self._dtypes = {t.dtype for t in (*original.parameters(), *original.buffers())}

    def judge(
        self,
        mode: str,
        original: nn.Module,
        rewritten: nn.Module,
        inputs: Arguments,
        before: Outcome,
        after: Outcome,
        edited: Collection[str],
    ) -> Verdict:
        """Compares the values of a run in a mode."""
        assert before.output is not None
        assert after.output is not None
        plain = compare(before.output, after.output, Bound())
        verdict = Verdict(plain.error, [f"output{p} has {n} NaN or Inf" for p, n in plain.spoiled.items()])
        exact = self.exact_in(mode)
        self.same_draws = before.random_state == after.random_state
        if mode == "train" and not exact:
            return verdict
        if before.drew and not self.same_draws:
            verdict.error = None
            self.notes.append(f"numerics ({mode}) were not compared: the models draw random numbers, and not the same")
            return verdict
        if not plain.compared and plain.uncompared:
            self.notes.append(f"numerics ({mode}) were not compared: no output has the shape it had")
            return verdict
        if exact:
            self._exact(mode, inputs, before, after, verdict)
        else:
            self._approximate(inputs, before, after, verdict)
        verdict.detail += _remarks(plain)
        if verdict.scrambled or (verdict.exceeded and self.needs_values):
            compared = mode == "eval" and self._layers_instead(original, rewritten, inputs, edited, verdict)
            if verdict.scrambled and not compared and not verdict.exceeded:
                verdict.detail = ""
                self.notes.append(
                    f"numerics ({mode}) were not compared: rounding alone turns the original's outputs over"
                )
        return verdict

    def _exact(self, mode: str, inputs: Arguments, before: Outcome, after: Outcome, verdict: Verdict) -> None:
        assert before.output is not None
        assert after.output is not None
        known = self._rounding(inputs, before, mode == "train")
        may_flip = {path: 4 * n for path, n in flips(before.output, known.reference).items()}
        bound = Bound(known.floor, known.limits, flips=may_flip, scale=scale_of(inputs))
        judged = compare(known.reference, after.output, bound)
        limit = max(known.limits.values(), default=known.floor)
        rounding = max(known.errors.values(), default=0.0)
        if mode == "train":
            self.train_rounding = rounding
        verdict.scrambled = rounding > (_SCRAMBLED if self.precise(before.output) else _SCRAMBLED_HALF)
        if verdict.scrambled:
            verdict.allowed = 16 * known.floor
            return
        verdict.exceeded = judged.exceeded
        verdict.allowed = 2 * (limit + rounding)
        worst = judged.worst[1] if judged.worst else 0.0
        verdict.detail = f"error {worst:.1e} against {known.name}; the original's {rounding:.1e}, allowed {limit:.1e}"
        if mode == "eval":
            self._pair = verdict.allowed
        else:
            self.buffer_limit = max(16 * limit, 64 * known.floor)

    def _approximate(self, inputs: Arguments, before: Outcome, after: Outcome, verdict: Verdict) -> None:
        assert before.output is not None
        assert after.output is not None
        limit = inf if self.max_error is None else self.max_error
        judged = compare(before.output, after.output, Bound(overall=limit, scale=scale_of(inputs)))
        verdict.exceeded, verdict.allowed = judged.exceeded, limit
        verdict.detail = "no floating output" if verdict.error is None else f"relative error {verdict.error:.2e}"
        if judged.zero and verdict.error is None:
            verdict.detail = "the original's outputs are zero: no relative error"
        verdict.detail += f", allowed {limit:g}" if limit < inf else ""

    def elsewhere(self, inputs: Arguments, before: Outcome, after: Outcome) -> tuple[list[str], float]:
        """The same for an evaluation at another size, without a reference: what differs too much, what may."""
        assert before.output is not None
        assert after.output is not None
        skip = self.needs_values or (before.drew and before.random_state != after.random_state)
        exact = self.exact_in("eval")
        if exact and self._pair is not None:
            bound = Bound(self._pair, flips={}, scale=scale_of(inputs))
        else:
            bound = Bound(overall=inf if self.max_error is None or exact else self.max_error, scale=scale_of(inputs))
        judged = compare(before.output, after.output, bound)
        spoiled = [f"output{path} has {n} NaN or Inf" for path, n in judged.spoiled.items()]
        return spoiled + ([] if skip else judged.exceeded), min(bound.limit, bound.overall)

    def unlike(self, before: Outcome, after: Outcome) -> list[str]:
        """What differs between two runs of what should be one model with the same weights."""
        if before.output is None or after.output is None:
            return [f"after reloading, the model does not run: {after.error}"]
        found = differences(before.output, after.output)
        judged = compare(before.output, after.output, Bound(self._floor(before.output), flips={}))
        spoiled = [f"output{path} has {n} NaN or Inf" for path, n in judged.spoiled.items()]
        return [f"after reloading, {said}" for said in (*found, *spoiled, *judged.exceeded)]

    def precise(self, output: Flat) -> bool:
        """Whether everything is in float32 or finer."""
        dtypes = self._dtypes | {t.dtype for t in output.floating.values()}
        return all(torch.finfo(d).eps < 1e-4 for d in dtypes if d.is_floating_point or d.is_complex)

    def _floor(self, output: Flat) -> float:
        return roundoff(self._dtypes | {t.dtype for t in output.floating.values()})

    # ------------------------------------------------------------------------------------------------ rounding

    def _rounding(self, inputs: Arguments, before: Outcome, training: bool) -> _Rounding:
        """What rounding alone does to the original on these inputs."""
        assert before.output is not None
        floor = self._floor(before.output)
        half = not self.precise(before.output)
        for dtype in (torch.float64, torch.float32) if half else (torch.float64,):
            reference = self._in_precision(dtype, inputs, training)
            if reference is None or _shapes(reference) != _shapes(before.output):
                continue
            found = errors(before.output, reference)
            largest = max(found.values(), default=0.0)
            if largest == inf or (before.drew and largest > _SCRAMBLED):
                continue  # it overflows where this does not, or draws other random masks: not the same function
            name = str(dtype).removeprefix("torch.")
            return _Rounding(reference, found, exact_limits(found, floor), floor, name)
        probe = run(copy.deepcopy(self.original), _nudged(inputs, self.seed), seed=self.seed, training=training)
        found = errors(probe.output, before.output) if probe.output is not None else {}
        floor *= 4 * sqrt(self.depth)
        limits = exact_limits(found, floor, factor=16)
        return _Rounding(before.output, found, limits, floor, "the original (it does not run in float64)")

    def _in_precision(self, dtype: torch.dtype, inputs: Arguments, training: bool) -> Flat | None:
        model = self._reference(dtype)
        return None if model is None else run(model, _cast(inputs, dtype), seed=self.seed, training=training).output

    def _reference(self, dtype: torch.dtype) -> nn.Module | None:
        """A copy of the original in another precision."""
        if dtype not in self._references:
            try:
                self._references[dtype] = copy.deepcopy(self.original).to(dtype)
            except Exception:  # a model may hold what has no such precision
                return None
        return self._references[dtype]

    # ------------------------------------------------------------------------------- models that look at values

    def _layers_instead(
        self, original: nn.Module, rewritten: nn.Module, inputs: Arguments, edited: Collection[str], verdict: Verdict
    ) -> bool:
        """Where values decide which results come out, compares the layers up to where rounding changes that.

        The boundary is the first layer that the original's own copies part at by more than `_SCRAMBLED`: one in
        float64, one with its weights moved by a quarter of what is allowed.

        Returns:
            Whether there was a layer to compare.
        """
        limit = verdict.allowed
        if limit == inf:
            return False
        double = self._reference(torch.float64)
        references = [(noisy_copy(original, limit / 4, self.seed), inputs)]
        references += [(double, _cast(inputs, torch.float64))] if double is not None else []
        rounding: dict[tuple[str, int], float] = {}
        found: dict[tuple[str, int], float] = {}
        for model, given in references:
            found, alone, raised = layer_differences(
                original, rewritten, inputs, seed=self.seed, reference=model, reference_inputs=given
            )
            if raised is not None:
                return False
            rounding = {key: max(e, rounding.get(key, 0.0)) for key, e in alone.items()}
        worst, compared = 0.0, 0
        for key, error in found.items():
            if not rounding.get(key, inf) <= _SCRAMBLED:
                break
            if within(key[0], edited):
                continue
            allowed = max(limit, 4 * rounding[key])
            if not error <= allowed:
                verdict.exceeded = [f"{key[0]} differs by {error:.2e}, allowed {allowed:.2e}"]
                return True
            compared, worst = compared + 1, max(worst, error)
        if compared:
            verdict.exceeded = []
            verdict.detail = f"error {worst:.1e} over the {compared} layers before values decide, allowed {limit:.1e}"
            self.notes.append(
                "values decide which results come out, and rounding alone changes that: "
                f"the {compared} layers before were compared instead of the outputs"
            )
        return bool(compared)


def noisy_copy(model: nn.Module, noise: float, seed: int, *, scale: float = 1.0) -> nn.Module:
    """A copy with every floating parameter scaled and moved by ``noise``, relative, in the root mean square."""
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in noisy.parameters():
            if p.is_floating_point():
                p.mul_(scale + noise * torch.randn(p.shape, generator=generator).to(p.device, p.dtype))
    return noisy


def _remarks(plain: Comparison) -> str:
    said = ""
    if plain.zero:
        said += f"; the original's output{plain.zero[0]} is zero throughout, which proves little"
    if plain.uncompared:
        said += f"; not compared, as shapes differ: {', '.join(f'output{p}' for p in plain.uncompared[:4])}"
    return said


def _shapes(flat: Flat) -> dict[str, tuple[int, ...]]:
    return {path: tuple(t.shape) for path, t in flat.tensors.items()}


def _cast(inputs: Arguments, dtype: torch.dtype) -> Arguments:
    def convert(t: Tensor) -> Tensor:
        if t.dtype.is_complex:
            return t.to(dtype.to_complex())
        return t.to(dtype) if t.dtype.is_floating_point else t

    return map_leaves(inputs[0], convert), map_leaves(inputs[1], convert)


def _nudged(inputs: Arguments, seed: int) -> Arguments:
    def convert(t: Tensor) -> Tensor:
        return nudged(t, seed)

    return map_leaves(inputs[0], convert), map_leaves(inputs[1], convert)


def buffer_differences(before: Mapping[str, Tensor], after: Mapping[str, Tensor], limit: float) -> list[str]:
    """Modules whose buffers differ by more than ``limit``, all buffers of a module measured together.

    A running mean may be close to zero, and its rounding is that of the values that cancelled in it; the
    variance beside it knows their size.
    """
    modules: dict[str, list[tuple[Tensor, Tensor]]] = {}
    found = []
    for name, old in before.items():
        new = after.get(name)
        if new is None or new.shape != old.shape:
            continue
        if old.is_floating_point():
            modules.setdefault(name.rpartition(".")[0], []).append((old.double(), new.double()))
        elif not torch.equal(old, new.to(old.device)):
            found.append(f"{name} differs")
    for path, pairs in modules.items():
        difference = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
        norm = sum(float(a.square().sum()) for a, _ in pairs) ** 0.5
        if limit < inf and not difference <= limit * norm:
            found.append(f"buffers of {path or 'the model'} differ by {difference / norm if norm else inf:.1e}")
    return found
