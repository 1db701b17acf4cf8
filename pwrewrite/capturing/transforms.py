"""What torch runs on the model's behalf: function transforms, higher-order operators, compilation.

**Transforms** (``vmap``, ``grad``, ``jvp``) hand out wrappers: a tensor of one lane stands for all. What runs on them
reaches the dispatcher with all lanes, where it is priced. The interface to wrappers is private to torch and used in
this file only; without it no tensor counts as wrapped.

**Higher-order operators** (``torch.cond``, ``while_loop``, ``map``, ``flex_attention``) run as the Python that torch
has for them. Where that would need a value, both branches of a ``cond`` and one round of a ``while_loop`` are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator

from .state import replaced

_functorch: Any = getattr(torch._C, "_functorch", None)


transforming: Callable[[], object] = getattr(_functorch, "peek_interpreter_stack", lambda: None)
"""Returns None where no function transform is running."""


def unwrapped(t: Tensor) -> Tensor:
    """The tensor in a wrapper, which holds all lanes; the tensor itself where it is none."""
    while _functorch is not None and _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.get_unwrapped(t)
    return t


def is_wrapped(t: Tensor) -> bool:
    """Whether a tensor is a wrapper of a running transform."""
    return bool(_functorch.is_functorch_wrapped_tensor(t))


def rewrapped(t: Tensor, inner: Tensor) -> Tensor | None:
    """A wrapper like ``t`` around another tensor; None where gradients flow to it, which would be lost."""
    if not _functorch.is_functorch_wrapped_tensor(t):
        return inner
    around = rewrapped(_functorch.get_unwrapped(t), inner)
    if around is None or not _functorch.is_batchedtensor(t):
        return None
    wrapper: Tensor = _functorch._add_batch_dim(around, _functorch.maybe_get_bdim(t), _functorch.maybe_get_level(t))
    return wrapper


@contextmanager
def uncompiled() -> Iterator[None]:
    """Runs what is wrapped with ``torch.compile``, before or now, as the code it was made from."""
    import sys

    stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()

    def leave(model: object = None, **settings: object) -> object:
        return leave if model is None else model

    with replaced(torch, "compile", leave), stance:
        yield


def in_python(operator: HigherOrderOperator) -> Callable[..., object] | None:
    """The Python that torch runs for a higher-order operator in eager mode."""
    implementation: Callable[..., object] | None = operator.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
    return implementation
