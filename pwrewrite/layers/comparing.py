"""Whether two functions of tensors are the same: the inputs that tell, and the values, the memory and the inputs after.

Values are compared by the norm of their difference. Values that are not finite have to be the same ones, and where
there are no finite ones, nothing was compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def trial_inputs(run: Function, inputs: Sequence[Tensor]) -> list[tuple[Tensor, ...]] | str:
    """Inputs to compare on: these, and the same values in another order, or moved a little where that is not finite."""
    generator = torch.Generator().manual_seed(1)
    shuffled = tuple(_shuffled(t, generator) for t in inputs)
    candidates = [shuffled, tuple(t * 0.875 for t in shuffled), tuple(t.flip(-1) if t.dim() else t for t in inputs)]
    first = tuple(inputs)
    if not any(bool(t.isfinite().any()) for t in outputs_of(run(*copies(first))) if t.numel()):
        return "its outputs hold no finite value for these inputs, so that nothing can be compared"
    for candidate in candidates:
        if all(bool(t.isfinite().all()) for t in outputs_of(run(*copies(candidate)))):
            return [first, candidate]
    return [first, tuple(t * 0.96875 for t in inputs)]


def _shuffled(t: Tensor, generator: torch.Generator) -> Tensor:
    values = t.flatten()
    if bool((values == values[0]).all()):
        values = torch.rand(values.shape, generator=generator, device="cpu")
    return torch.empty_like(t).copy_(values[torch.randperm(t.numel(), generator=generator, device="cpu")].view(t.shape))


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in the same memory formats."""
    return [torch.empty_like(t).copy_(t) for t in tensors]


def same_function(function: Function, run: Function, inputs: Sequence[Tensor], tolerance: float) -> bool:
    """Whether two functions give the same, in memory of its own where the other one's is, and leave their inputs.

    The interpreter makes one tensor of two that are equal, and returns ``x`` for ``x + 0``: who writes to one output
    would change the other, or the input.
    """
    ours, theirs = copies(inputs), copies(inputs)
    right, values = outputs_of(run(*theirs)), outputs_of(function(*ours))
    unchanged = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(ours, inputs))
    return unchanged and alike(values, right, tolerance) and _sharing(ours, values) == _sharing(theirs, right)


def _sharing(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[int]:
    """For each tensor, the first one in the same memory."""
    memory = [t.untyped_storage().data_ptr() for t in (*inputs, *outputs)]
    return [memory.index(pointer) for pointer in memory]


def alike(found: Sequence[Tensor], right: Sequence[Tensor], tolerance: float, floor: float = 0.0) -> bool:
    """Whether two runs gave the same up to rounding: as many tensors of the same shapes, dtypes and values.

    Differences whose mean square is below that of ``floor`` count as rounding.
    """
    same = [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in right]
    return same and all(_near(a, b, tolerance, floor) for a, b in zip(found, right))


def outputs_of(out: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a function returned, as a tuple."""
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _near(a: Tensor, b: Tensor, tolerance: float, floor: float) -> bool:
    """Whether ``a`` is ``b`` up to rounding; values that are not finite have to be the same ones."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    finite = b.isfinite()
    if not bool(finite.all()):
        if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return False
        a, b = a[finite], b[finite]
    return bool((a - b).norm() <= max(float(tolerance * b.norm()), floor * b.numel() ** 0.5))
