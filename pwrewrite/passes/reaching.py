"""Whether code around a module may reach past its ``forward``, to what it holds or can: `reached`.

One run shows one way through the code; on other values ``self.block.conv(x)`` may be called in the place of
``self.block(x)``, or ``self.block.conv.in_channels`` be asked for in training. So what ``forward`` and the methods that
it names read of anything but ``self`` is looked for in their bytecode: by identity where it starts at ``self``, by name
where it starts elsewhere, such as at the variable of a loop.

Limits: ``getattr``, items, and functions outside of the class are not followed.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from itertools import chain as joined
from types import CodeType

from torch import nn

_Chain = tuple[bool, list[str]]
"""Whether it starts at ``self``, and the attributes that are read one of the other."""


def reached(owner: nn.Module, module: nn.Module, names: Collection[str]) -> str:
    """What the code of ``owner`` may read of a module: one of some names, or what its class has; ``""`` for nothing."""
    of_class = {name for kind in _classes(module) for name in vars(kind)} - {"forward"}
    for starts_at_self, chain in _chains(owner):
        if not starts_at_self:
            if name := next((name for name in chain if name in names), ""):
                return name
            continue
        place: nn.Module | None = owner
        for name in chain:
            if place is module and (name in names or name in of_class):
                return name
            place = None if place is None else place._modules.get(name)
    return ""


def reached_around(modules: Mapping[str, nn.Module], scope: str, names: Collection[str]) -> str:
    """That code around the module at a path may use some of its names by itself, for a person; ``""`` for nothing."""
    pieces = scope.split(".") if scope else []
    for owner in (".".join(pieces[:i]) for i in range(len(pieces))):
        if name := reached(modules[owner], modules[scope], names):
            return f"the code of {owner or 'the model'} may use {name} of {scope} by itself"
    return ""


def own_methods(module: nn.Module) -> list[str]:
    """The public methods that a module's class has beside ``forward``, which a graph in its place would not have."""
    members = {name: member for kind in _classes(module) for name, member in vars(kind).items()}
    return [name for name, member in members.items() if name[0] != "_" and name != "forward" and _code_of(member)]


def _classes(module: nn.Module) -> list[type]:
    """The classes of a module that are its user's."""
    kinds = type(module).__mro__
    return [kind for kind in kinds[: kinds.index(nn.Module)] if not kind.__module__.startswith("torch.nn.")]


def _chains(owner: nn.Module) -> Iterator[_Chain]:
    """What the code of a module reads, from ``forward`` on."""
    pending, seen = ["forward"], {"forward"}
    while pending:
        name = pending.pop()
        for kind in _classes(owner):
            code = _code_of(vars(kind).get(name))
            for starts_at_self, chain in () if code is None else _read(code, "".join(code.co_varnames[:1])):
                yield starts_at_self, chain
                pending += {chain[0]} - seen
                seen.add(chain[0])


def _code_of(member: object) -> CodeType | None:
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
    return code if isinstance(code, CodeType) else None


@cache
def _read(code: CodeType, own: str) -> tuple[_Chain, ...]:
    """The chains of attributes in some code, ``own`` being what it calls ``self``; those of globals are left out."""
    chains, chain, starts_at_self, known = list[_Chain](), list[str](), False, True
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(step.argval)
            continue
        if chain and known:
            chains.append((starts_at_self, chain))
        last = step.argval[-1:] if isinstance(step.argval, tuple) else (step.argval,)
        chain, starts_at_self = [], step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and last == (own,)
        known = step.opname != "LOAD_GLOBAL"
    inner = (_read(constant, own) for constant in code.co_consts if isinstance(constant, CodeType))
    return (*chains, *joined.from_iterable(inner))
