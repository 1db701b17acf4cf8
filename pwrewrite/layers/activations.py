"""The activations that a kernel can apply while it still holds a convolution's output: `ACTIVATIONS`.

An activation is a name and a few numbers (``hardtanh`` has two, ``leaky_relu`` one), so that it can stand in a plan.
oneDNN knows others by other names: ``swish`` is ``silu``, ``relu6`` a ``hardtanh`` from 0 to 6. Not among its fused
ones, and so not here: ``elu``, ``selu``, ``celu``, ``mish``, ``softplus``, ``prelu``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Activation:
    """One activation.

    Attributes:
        plain: The same in plain torch: ``plain(x, *scalars)``.
        attr: What oneDNN calls it.
        count: How many numbers it takes.
        algorithm: Which of several approximations, as oneDNN calls it.
        fixed: Numbers that oneDNN wants and that its name already says.
    """

    plain: Callable[..., Tensor]
    attr: str
    count: int = 0
    algorithm: str = ""
    fixed: tuple[float, ...] = ()


def _same(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(_same, "none"),
    "relu": Activation(F.relu, "relu"),
    "relu6": Activation(F.relu6, "hardtanh", fixed=(0.0, 6.0)),
    "silu": Activation(F.silu, "swish"),
    "gelu": Activation(F.gelu, "gelu", algorithm="none"),
    "gelu_tanh": Activation(_gelu_tanh, "gelu", algorithm="tanh"),
    "hardswish": Activation(F.hardswish, "hardswish"),
    "hardsigmoid": Activation(F.hardsigmoid, "hardsigmoid"),
    "hardtanh": Activation(F.hardtanh, "hardtanh", 2),
    "leaky_relu": Activation(F.leaky_relu, "leaky_relu", 1),
    "sigmoid": Activation(torch.sigmoid, "sigmoid"),
    "tanh": Activation(torch.tanh, "tanh"),
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
