"""Modules whose names `torch.fx` cannot write or hold.

These are keywords of Python, such as ``nn.ModuleDict({"in": …})``, and what a graph module calls things of its own.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

_graph: Any = torch.fx.graph


@contextmanager
def keywords_spelt_out() -> Iterator[None]:
    """Lets torch.fx write ``getattr(self.m, "in")`` in place of ``self.m.in``, which is no Python."""
    kept = getattr(_graph, "_format_target", None)
    _graph._format_target = _format_target
    try:
        yield
    finally:
        _graph._format_target = kept


def _format_target(base: str, target: str) -> str:
    for name in target.split("."):
        plain = name.isidentifier() and not keyword.iskeyword(name)
        base = f"{base}.{name}" if plain else f"getattr({base}, {name!r})"
    return base


def taken_by_graphs(module: nn.Module) -> str | None:
    """A child, parameter or buffer called as something that every ``GraphModule`` has, such as ``graph``."""
    names = (*module._modules, *module._parameters, *module._buffers)
    known = ("meta", *(name for name in vars(fx.GraphModule) if not hasattr(nn.Module, name)))
    return next((name for name in names if name in known), None)


def named_by_keyword(model: nn.Module) -> str | None:
    """The path of a module whose name is a keyword; None where there is none."""
    paths = (path for path, _ in model.named_modules())
    return next((path for path in paths if any(map(keyword.iskeyword, path.split(".")))), None)
