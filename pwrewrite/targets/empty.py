"""Builds models without memory for their weights.

``with torch.device("meta")`` does that too, but also turns every other tensor of a constructor into one without values,
and constructors that compute with small tensors (torchvision's RegNet its widths, others drop-path rates) then fail.
Here only what becomes a parameter goes to meta, at the moment it is registered; ``torch.empty`` behind it never touched
its pages, so nothing was spent. Buffers stay real: they are small, and their values often matter.

The technique is that of accelerate's ``init_empty_weights``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """While it lasts, parameters that modules register are on the meta device.

    Yields:
        Nothing.
    """
    register = nn.Module.register_parameter
    moved: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if type(param) is nn.Parameter and not param.is_meta:
            known = moved.get(id(param))
            if known is None or known[0]() is not param:  # one parameter under two names stays one
                bare = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
                bare.__dict__.update(param.__dict__)
                known = moved[id(param)] = (weakref.ref(param), bare)
            param = known[1]
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
