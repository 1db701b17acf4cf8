"""What rounding alone does to a model: measured against its copy in another precision, or by moving its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor, nn

from ..core.nested import deep_copy
from .inputs import Arguments, map_arguments
from .numerics import errors, exact_limits, nudged, roundoff
from .outputs import Flat
from .runs import Outcome, run

SCRAMBLED = 0.05
"""Relative difference from which a reference says nothing: other random masks, or results in another order."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounding does to the original: by output, its relative error and that which an exact rewrite may have."""

    reference: Flat  # what an exact computation gives
    errors: dict[str, float]
    limits: dict[str, float]
    floor: float  # what one layer may round differently
    name: str  # what the reference is


class Original:
    """The original model in other precisions, each made when it is first asked for."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.seed = model, seed
        self._copies: dict[torch.dtype, nn.Module | None] = {}
        self._dtypes = {t.dtype for t in (*model.parameters(), *model.buffers())}

    def precise(self, output: Flat) -> bool:
        """Whether everything is in float32 or finer."""
        dtypes = self._dtypes | {t.dtype for t in output.floating.values()}
        return all(torch.finfo(d).eps < 1e-4 for d in dtypes if d.is_floating_point or d.is_complex)

    def floor(self, output: Flat) -> float:
        """What one layer may round differently."""
        return roundoff(self._dtypes | {t.dtype for t in output.floating.values()})

    def in_precision(self, dtype: torch.dtype) -> nn.Module | None:
        """A copy in another precision; None where the model holds what has no such precision."""
        if dtype not in self._copies:
            try:
                self._copies[dtype] = deep_copy(self.model).to(dtype)
            except Exception:
                self._copies[dtype] = None
        return self._copies[dtype]

    def rounding(self, inputs: Arguments, before: Outcome, training: bool, depth: int) -> Rounding:
        """What rounding alone does to the original on these inputs; ``depth`` layers round, one after the other."""
        floor = self.floor(before.output)
        finer = [torch.float64] if floor > roundoff([torch.float64]) else []  # its own precision would measure nothing
        for dtype in finer if self.precise(before.output) else [*finer, torch.float32]:
            model = self.in_precision(dtype)
            reference = Flat() if model is None else self._run(model, cast(inputs, dtype), training)
            if model is None or reference.shapes != before.output.shapes:
                continue
            measured = errors(before.output, reference)
            largest = max(measured.values(), default=0.0)
            if largest == inf or (before.drew and largest > SCRAMBLED):
                continue  # it overflows where this does not, or draws other random masks: not the same function
            name = str(dtype).removeprefix("torch.")
            return Rounding(reference, measured, exact_limits(measured, floor), floor, name)
        moved = map_arguments(inputs, lambda t: nudged(t, self.seed))
        probes = [self._run(deep_copy(self.model), moved, training)]
        if not finer:  # a norm takes out again what moved its input, but not what moved its own or a later weight
            noisy = noisy_copy(self.model, torch.finfo(torch.float64).eps, self.seed)
            probes.append(self._run(noisy, inputs, training))
        measured = {}
        for probe in probes:
            measured |= {path: max(e, measured.get(path, 0.0)) for path, e in errors(probe, before.output).items()}
        floor *= 4 * sqrt(depth)
        limits = exact_limits(measured, floor, factor=16)
        why = "it does not run in float64" if finer else "nothing is finer than float64"
        return Rounding(before.output, measured, limits, floor, f"the original ({why})")

    def _run(self, model: nn.Module, inputs: Arguments, training: bool) -> Flat:
        return run(model, inputs, seed=self.seed, training=training).output


def noisy_copy(model: nn.Module, noise: float, seed: int, *, scale: float = 1.0) -> nn.Module:
    """A copy with every floating parameter scaled and moved by ``noise``, relative, in the root mean square."""
    noisy = deep_copy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in noisy.parameters():
            if p.is_floating_point():
                p.mul_(scale + noise * torch.randn(p.shape, generator=generator, device="cpu").to(p.device, p.dtype))
    return noisy


def cast(inputs: Arguments, dtype: torch.dtype) -> Arguments:
    """Inputs with their floating values in another precision."""

    def convert(t: Tensor) -> Tensor:
        if t.dtype.is_complex:
            return t.to(dtype.to_complex())
        return t.to(dtype) if t.dtype.is_floating_point else t

    return map_arguments(inputs, convert)
