"""Builds models without memory for their weights.

Unlike under ``torch.device("meta")``, only what becomes a parameter goes to meta, at the moment it is registered
(``torch.empty`` behind it never touched its pages): constructors that compute with small tensors, such as torchvision's
RegNet, still can, and buffers stay real. The technique is that of accelerate's ``init_empty_weights``. A constructor
that looks at its weights (prints a norm, traces itself) does not bear it; whoever builds so tries again for real.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator

from torch import nn

from ..capturing.state import replaced

_empty = [False]
"""Whether parameters go to the meta device: what each context that is active says, the innermost last."""


def weights_are_empty() -> bool:
    """Whether parameters that are registered now go to the meta device."""
    return _empty[-1]


@contextlib.contextmanager
def empty_weights() -> Iterator[Callable[[], bool]]:
    """While it lasts, parameters that modules register are on the meta device; gives what tells whether any did."""
    register = nn.Module.register_parameter
    moved: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if weights_are_empty() and type(param) is nn.Parameter and not param.is_meta:
            known = moved.get(id(param))
            if known is None or known[0]() is not param:  # one parameter under two names stays one
                bare = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
                bare.__dict__.update(param.__dict__)
                known = moved[id(param)] = (weakref.ref(param), bare)
            param = known[1]
        register(module, name, param)

    with replaced(nn.Module, "register_parameter", register_empty), real_weights(False):
        yield lambda: bool(moved)


@contextlib.contextmanager
def real_weights(real: bool = True) -> Iterator[None]:
    """While it lasts, parameters keep their memory and values, even inside `empty_weights`."""
    _empty.append(not real)
    try:
        yield
    finally:
        _empty.pop()
