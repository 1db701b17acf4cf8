"""Putting one module in another's place, by identity, under every name that it has.

Tracing reports only a module's first name; a model may hold it under several (tied blocks, a list beside an attribute).
References that are not registrations (a plain list, a bound method, a closure) would keep calling the old module:
`held_elsewhere` finds them by walking through what the model's modules hold. A reference that no module of the model
leads to, such as one in a global list, is not found.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Set
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import NamedTuple

from torch import Tensor, fx, nn

from ..core.errors import RefusedError, first_line
from ..core.nested import deep_copy

REGISTRIES = frozenset(("_modules", "_parameters", "_buffers"))
"""Attributes in which a module registers what it holds."""

_OPAQUE = (type, ModuleType, FrameType, CodeType, Tensor, fx.Graph, str, bytes, int, float)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy; raises `RefusedError` if the model cannot be copied."""
    try:
        return deep_copy(model)
    except Exception as error:
        message = f"the model cannot be copied, and it is never changed in place: {first_line(error)}"
        hint = "handles such as locks, files, generators or streams are the usual cause; make them in forward"
        raise RefusedError(message, where=type(model).__name__, hint=hint) from error


def names_of(model: nn.Module, module: nn.Module) -> tuple[str, ...]:
    """Every path under which ``model`` registers ``module``, first name first."""
    return tuple(".".join(place.names()) for place in _places(model, module))


def stem(path: str) -> str:
    """What the full names of all that a module holds begin with."""
    return f"{path}." if path else ""


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Puts a module in another's place, under every name; returns the model, or ``new`` where ``old`` was that."""
    for place in tuple(_places(model, old)):
        if place.parent is not None:
            place.parent.module._modules[place.name] = new
    return new if old is model else model


class _Place(NamedTuple):
    """A module, where it is registered."""

    module: nn.Module
    parent: _Place | None = None
    name: str = ""

    def names(self) -> list[str]:
        return [] if self.parent is None else [*self.parent.names(), self.name]


def _places(model: nn.Module, module: nn.Module) -> Iterator[_Place]:
    """All places of a module, in the order of ``named_modules``, which takes several times as long."""
    pending = [_Place(model)]
    while pending:
        place = pending.pop()
        if place.module is module:
            yield place
        inner = place.module._modules
        pending += [_Place(each, place, name) for name, each in reversed(inner.items()) if each is not None]


def held_elsewhere(copied: nn.Module, original: nn.Module) -> dict[int, str]:
    """Modules of a deep copy that are referred to other than by registration, or shadowed by the original; by what.

    A deep copy copies lists and bound methods, but not functions: a closure over the model (``lambda x: self.conv(x)``)
    still leads to the original, whose layers the copy then calls. Values are such as ``a list (block.convs)``.
    """
    own = {id(module) for module in copied.modules()}
    strange = {id(module): path for path, module in original.named_modules()}
    found, seen, known = dict[int, str](), set[int](), own.union(strange)
    for path, module in copied.named_modules():
        for name, value in vars(module).items():
            if name in REGISTRIES:
                continue
            for held, how in _held(value, seen, known):
                what = f"{how} ({stem(path)}{name})"
                if id(held) in own:
                    found.setdefault(id(held), what)
                elif id(held) in strange and not name.endswith("_hooks"):
                    for shadowed in copied.get_submodule(strange[id(held)]).modules():
                        found.setdefault(id(shadowed), what)
    return found


def _held(value: object, seen: set[int], known: Set[int]) -> Iterator[tuple[nn.Module, str]]:
    """Modules that an attribute's value leads to, each with the kind of its holder; does not look into known ones."""
    todo = [(value, "a plain attribute")]
    while todo:
        thing, how = todo.pop()
        if isinstance(thing, nn.Module):
            yield thing, how
        leads_on = isinstance(thing, weakref.ReferenceType) or gc.is_tracked(thing)
        if isinstance(thing, _OPAQUE) or id(thing) in seen or id(thing) in known or not leads_on:
            continue
        seen.add(id(thing))
        kind = _kind(thing)
        todo += [(inner, kind if isinstance(inner, nn.Module) else how) for inner in _contents(thing)]


def _contents(thing: object) -> list[object]:
    if isinstance(thing, FunctionType):
        cells = [inner for cell in thing.__closure__ or () for inner in gc.get_referents(cell)]
        return [*cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    return [thing()] if isinstance(thing, weakref.ReferenceType) else gc.get_referents(thing)


def _kind(thing: object) -> str:
    if isinstance(thing, (MethodType, FunctionType)):
        return f"a {'bound method' if isinstance(thing, MethodType) else 'closure'} {thing.__name__}"
    if isinstance(thing, weakref.ReferenceType):
        return "a weak reference"
    kind = type(thing)
    return f"{'a' if kind.__module__ in ('builtins', 'functools') else 'an object of class'} {kind.__name__}"
