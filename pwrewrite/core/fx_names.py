"""Modules whose names are keywords of Python, such as ``nn.ModuleDict({"in": …})``, in code that `torch.fx` writes."""

from __future__ import annotations

import keyword
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

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


def named_by_keyword(model: nn.Module) -> str | None:
    """The path of a module whose name is a keyword; None where there is none."""
    paths = (path for path, _ in model.named_modules())
    return next((path for path in paths if any(map(keyword.iskeyword, path.split(".")))), None)
