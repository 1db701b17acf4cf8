"""Conditions on which code only decides whether to raise: what checks them in a graph, and how they are found out."""

from __future__ import annotations

import builtins
from dis import get_instructions, opname
from types import FrameType
from typing import Any

from torch import fx, nn

from .state import CONTAINERS

Guard = tuple[int, str, str]
"""What `required` takes besides its condition; with a length in the first place, which is no bool, for ``len(x)``."""


@fx.has_side_effect
def required(condition: object, wanted: bool, kind: str, message: str) -> None:
    """Raises what code raises where a condition of it is not as wanted: an error of Python's own, by its name."""
    if bool(condition) != wanted:
        raise getattr(builtins, kind)(message)


_LENGTHS = (0, 1, 2, 3, 4097, 65537)
"""Lengths that code may go on with besides those that it names."""


def lengths_to_try(frame: FrameType | None, module: nn.Module) -> list[int]:
    """Lengths to ask code about: what its instructions, its variables and its module hold, and numbers beside these."""
    while frame is not None and _room(frame) in ("torch", __name__.partition(".")[0]):
        frame = frame.f_back
    if frame is None:
        return []
    found: list[Any] = [each.argval for each in get_instructions(frame.f_code)]
    for held in (*frame.f_locals.values(), *vars(module).values(), *module._modules.values()):
        sized = isinstance(held, (*CONTAINERS, tuple, nn.ModuleList, nn.ModuleDict, nn.Sequential))
        found.append(len(held) if sized else held)
    named = {n for each in found for n in (each if isinstance(each, (tuple, frozenset)) else [each]) if type(n) is int}
    beside = {n + step for n in named if 0 <= n <= 4096 for step in (-1, 0, 1)}
    return sorted(n for n in beside.union(_LENGTHS) if n >= 0)


def _room(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def raised_by_code(error: Exception) -> bool:
    """Whether the model's own code says ``raise``, for no other error; fx refuses code so, too."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or error.__context__ is not None:
        return False
    code, room = last.tb_frame.f_code, _room(last.tb_frame)
    own = room not in ("torch", __name__.partition(".")[0]) or code is required.__code__
    return own and opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
