"""The activations that a kernel can apply while it still holds a convolution's output: `ACTIVATIONS`.

They are the rows of `pwrewrite.core.operations` that have such a kernel.

An activation is a name and a few numbers (``hardtanh`` has two, ``leaky_relu`` one), so that it can stand in a plan.
oneDNN knows others by other names: ``swish`` is ``silu``, ``relu6`` a ``hardtanh`` from 0 to 6. Not among its fused
ones, and so not here: ``elu``, ``selu``, ``celu``, ``mish``, ``softplus``, ``prelu``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core.errors import UsageError
from ..core.operations import OPERATIONS, FusedActivation


def _same(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, FusedActivation] = {
    "none": FusedActivation("none", _same, "none"),
    **{row.kernel.name: row.kernel for row in OPERATIONS if row.kernel is not None},
}
"""Name to activation; ``none`` is the convolution alone."""


def checked(name: str, scalars: Sequence[float]) -> tuple[float, ...]:
    """The numbers of an activation.

    Raises:
        UsageError: If there is no such activation or it takes other numbers.
    """
    found = ACTIVATIONS.get(name)
    if found is None:
        raise UsageError(f"unknown activation {name!r}", expected=f"one of {', '.join(ACTIVATIONS)}")
    numbers = tuple(float(number) for number in scalars)
    if len(numbers) != found.count:
        raise UsageError(f"{name} takes {found.count} number(s)", got=repr(list(scalars)))
    return numbers
