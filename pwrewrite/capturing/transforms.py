"""What torch runs on the model's behalf: function transforms, higher-order operators, compilation.

**Transforms** (``vmap``, ``grad``, ``jvp``) hand out wrappers: a tensor of one lane stands for all. What runs on them
reaches the dispatcher with all lanes, where it is priced. The interface to wrappers is private to torch and used in
this file only; without it no tensor counts as wrapped.

**Higher-order operators** (``torch.cond``, ``while_loop``, ``map``, ``flex_attention``) run as the Python that torch
has for them. Where that would need a value, both branches of a ``cond`` and one round of a ``while_loop`` are recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from types import FunctionType, ModuleType
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


_COMPILER = "torch._dynamo"


@contextmanager
def uncompiled() -> Iterator[None]:
    """Runs what is wrapped with ``torch.compile``, before or now, as the code it was made from."""

    def leave(model: object = None, **settings: object) -> object:
        return leave if model is None else model

    with replaced(torch, "compile", leave), _at_rest():
        yield


def _at_rest() -> AbstractContextManager[object]:
    """Nothing is compiled; a compiler that is not there yet is not loaded for that."""
    compiler = sys.modules.get(_COMPILER)
    if compiler is None:
        return _no_compiler()
    return nullcontext() if isinstance(compiler, _NoCompiler) else torch.compiler.set_stance("force_eager")


class _NoCompiler(ModuleType):
    """Stands for torch's compiler, which takes seconds to import, where all that is asked of it is to leave code alone.

    Many of torch's functions on ``meta`` ask for nothing else. Whoever asks for more gets the compiler itself.
    """

    def __init__(self) -> None:
        super().__init__(_COMPILER)
        self.__dict__["left"] = []

    def disable(self, fn: object = None, *args: object, **settings: object) -> object:
        """A function as it is."""
        if type(fn) is not FunctionType or sys.modules.get(_COMPILER) is not self:
            return self.__getattr__("disable")(fn, *args, **settings)
        self.__dict__["left"].append(fn)
        return fn

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__" and name != "__path__":  # of whoever looks through all modules
            raise AttributeError(name)
        _take_out(self)
        return getattr(import_module(_COMPILER), name)


@contextmanager
def _no_compiler() -> Iterator[None]:
    """A `_NoCompiler` in the compiler's place, of which afterwards nothing is left."""
    stand_in = sys.modules[_COMPILER] = _NoCompiler()
    try:
        yield
    finally:
        _take_out(stand_in)


def _take_out(stand_in: _NoCompiler) -> None:
    """Forgets what was left alone, too: once there is a compiler, it wants to be asked."""
    if sys.modules.get(_COMPILER) is stand_in:
        del sys.modules[_COMPILER]
    for function in stand_in.__dict__["left"]:
        vars(function).pop("__dynamo_disable", None)


def in_python(operator: HigherOrderOperator) -> Callable[..., object] | None:
    """The Python that torch runs for a higher-order operator in eager mode."""
    implementation: Callable[..., object] | None = operator.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
    return implementation
