"""Calls whatever makes a model (a class, a function, an instance) and checks that a model came out.

Every failure on the way is told in the words of the command line: which argument is missing and how ``--arg`` gives it,
which one is unknown and what the factory takes, which line of the user's file raised.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..core.errors import TargetError
from ..core.text import did_you_mean
from .user_code import running_user_code

_SHOWN = 16
STARS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def parameters_of(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """The parameters of a callable by name; ``*args, **kwargs`` if it has no signature to read."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return dict(inspect.signature(lambda *args, **kwargs: None).parameters)


def missing_args(function: Callable[..., object], args: Container[str] = ()) -> list[str]:
    """The names of the parameters without a default that the arguments do not give, in order."""
    parameters = parameters_of(function).items()
    return [n for n, p in parameters if p.kind not in STARS and p.default is p.empty and n not in args]


def unknown_args(factory: Callable[..., object], args: Mapping[str, object]) -> list[str]:
    """The names of the arguments that a factory has no parameter for; none for one that takes any keyword."""
    parameters = parameters_of(factory)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return [name for name in args if not takes_any and name not in parameters]


def _takes(factory: Callable[..., object], but: Iterable[str] = ()) -> str:
    """A factory's parameters, without ``but``, as a person reads them: ``width, depth=2``; ``...`` for any keyword."""
    shown: list[str] = []
    for name, p in parameters_of(factory).items():
        if p.kind is inspect.Parameter.VAR_KEYWORD:
            shown.append("...")
        elif p.kind is not inspect.Parameter.VAR_POSITIONAL and name not in but:
            text = repr(p.default)
            plain = p.default is not p.empty and len(text) <= 30 and not text.startswith("<")
            shown.append(f"{name}={text}" if plain else name)
    if len(shown) > _SHOWN:
        shown[_SHOWN:] = [f"… ({len(shown)} in all)"]
    return ", ".join(shown) or "no arguments"


def _unknown_error(
    factory: Callable[..., object], unknown: list[str], what: str, but: Iterable[str] = ()
) -> TargetError:
    """The error for arguments that a factory does not take; ``but`` are parameters that are not the user's to give."""
    names = [n for n, p in parameters_of(factory).items() if p.kind in _NAMED and n not in but]
    message = f"{what} takes no argument{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}"
    return TargetError(message, expected=_takes(factory, but), hint=did_you_mean(names, *unknown))


def construct(
    factory: Callable[..., object], args: Mapping[str, object], what: str, origin: Path | None, but: Iterable[str] = ()
) -> object:
    """Calls a class or function with the arguments by name; a model is made already.

    Messages call it ``what`` (``class Net in model.py``), leave out the parameters ``but`` that are not the user's to
    give, and name the line where the user's file ``origin`` raised. A `TargetError` says that an argument is missing or
    unknown, or that the factory raised.
    """
    if isinstance(factory, nn.Module):
        if args:
            message = f"{what} is an instance: it is made already and takes no --arg"
            hint = "name a class or function that makes it: model.py:NAME --arg name=VALUE"
            raise TargetError(message, got=", ".join(args), hint=hint)
        return factory
    if unknown := unknown_args(factory, args):
        raise _unknown_error(factory, unknown, what, but)
    if missing := missing_args(factory, args):
        message = f"{what} needs the argument{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        hint = " ".join(f"--arg {name}=VALUE" for name in missing)
        raise TargetError(message, expected=_takes(factory), hint=hint)
    leading = [
        n for n, p in parameters_of(factory).items() if p.kind is inspect.Parameter.POSITIONAL_ONLY and n in args
    ]
    by_name = {name: value for name, value in args.items() if name not in leading}
    shown = ", ".join(f"{name}={value!r}" for name, value in args.items() if name not in but)
    with running_user_code(what, origin, f"check --arg {shown}" if shown else None):
        try:
            return factory(*(args[name] for name in leading), **by_name)
        except TypeError as error:  # a factory with **kwargs handed an argument on to what does not take it
            match = re.match(r"([\w.<>]+)\(\) got an unexpected keyword argument '(\w+)'", str(error))
            if match is None or match[2] not in args:
                raise
            owner = _owner(error, match[1].removesuffix(".__init__")) or factory
            raise _unknown_error(owner, [match[2]], what, {"self", *but}) from error


def _owner(error: TypeError, name: str) -> Callable[..., object] | None:
    """What is called ``name`` where an error was raised, or on the way there."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        values: list[object] = [*frame.f_locals.values(), *frame.f_globals.values()]
        for value in values:
            if callable(value) and getattr(value, "__qualname__", None) == name:
                return value
    return None


def as_model(value: object, what: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, without ``torch.compile`` and data-parallel wrappers and in eval mode, and notes on it; a
    `TargetError` for what is no ``nn.Module``, or a TorchScript module.
    """
    notes: list[str] = []
    while (inner := _unwrap(value)) is not None:
        notes.append(f"unwrapped {type(value).__name__} around {type(inner).__name__}")
        value = inner
    if isinstance(value, torch.jit.ScriptModule):
        message = f"{what} is a TorchScript module, which holds compiled code and cannot be traced or rewritten"
        raise TargetError(message, hint="give the Python model it was scripted from")
    if not isinstance(value, nn.Module):
        raise no_model(what, value)
    try:
        value.eval()
    except NotImplementedError:  # what torch.export's module() gives is fixed in the mode it was exported in
        notes.append(f"{type(value).__name__} cannot be put in eval mode: used as it is")
    return value, tuple(notes)


def no_model(what: str, value: object) -> TargetError:
    """The error for what is no model and makes none."""
    expected = "an nn.Module instance, an nn.Module subclass, or a function that returns one"
    return TargetError(f"{what} is not a model, and makes none", expected=expected, got=kind_of(value))


def _unwrap(value: object) -> object | None:
    """What a wrapper that adds nothing to the computation holds; None when the value is no such wrapper."""
    if isinstance(value, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return getattr(value, "module", None)
    compiled = isinstance(value, nn.Module) and type(value).__name__ == "OptimizedModule"  # importing it is slow
    return getattr(value, "_orig_mod", None) if compiled else None


def kind_of(value: object) -> str:
    """What a value is, in a few words: ``None``, ``a tuple of Linear, int``, ``the class dict``, ``a str``…"""
    if value is None:
        return "None"
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if inspect.ismodule(value):
        return f"the Python module {value.__name__}"
    if isinstance(value, (tuple, list)) and value:
        return f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, list(value)[:5]))}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"
