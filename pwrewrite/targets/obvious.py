"""Finds a file's one obvious model.

In this order, the first that is there:

1. an ``nn.Module`` instance named ``model``;
2. a function ``build_model``, ``model``, ``get_model`` or ``create_model`` that needs no argument beyond what ``--arg``
   gives;
3. among the ``nn.Module`` subclasses *defined* in the file, the only one that constructs without arguments (beyond
   ``--arg``). Where several do, those that are building blocks of another are set aside: each is constructed (with
   empty weights, which cost nothing, or for real where that fails), the types of its ``modules()`` are read, and a
   class found inside another one is a block. A class without a ``forward`` of its own is a base class and no candidate.

Whatever is left over is an error that lists the candidates.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from torch import nn

from ..core.errors import TargetError
from .empty import empty_weights
from .factories import construct, missing_args, needs_error, unknown_args, unknown_error
from .user_code import nearest

_FACTORY_NAMES = ("build_model", "model", "get_model", "create_model")


def find_model(module: ModuleType, args: Mapping[str, object], path: str) -> tuple[object, tuple[str, ...]]:
    """The model of a file whose target names none.

    Args:
        module: The imported file.
        args: Arguments for whatever makes the model.
        path: The file, as the user wrote it.

    Returns:
        What should be a model, and notes on how it was chosen.

    Raises:
        TargetError: There is none, or several, or it cannot be constructed.
    """
    origin = Path(module.__file__) if module.__file__ else None
    instance = getattr(module, "model", None)
    if isinstance(instance, nn.Module):
        if args:
            raise instance_takes_no_args(f"model in {path}", args)
        return instance, ()
    functions: dict[str, Callable[..., object]] = {
        n: getattr(module, n) for n in _FACTORY_NAMES if _has_function(module, n)
    }
    for name, function in functions.items():
        if not missing_args(function, args) and not unknown_args(function, args):
            return construct(function, args, f"{name}() in {path}", origin), ()
    own = {n: f for n, f in functions.items() if f.__module__ == module.__name__}
    classes = model_classes(module)
    if own and not any(not missing_args(c, args) and not unknown_args(c, args) for c in classes.values()):
        name, function = next(iter(own.items()))
        raise _cannot_call(function, args, f"{name}() in {path}")
    return _find_class(module, classes, args, path, origin)


def _find_class(
    module: ModuleType, classes: dict[str, type[nn.Module]], args: Mapping[str, object], path: str, origin: Path | None
) -> tuple[object, tuple[str, ...]]:
    """The one class of a file that is a whole model, constructed."""
    if not classes:
        raise TargetError(f"no model in {path}", expected=_expected(), got=_what_there_is(module))
    ready = {n: c for n, c in classes.items() if not missing_args(c, args) and not unknown_args(c, args)}
    if not ready:
        if len(classes) == 1:
            name, cls = next(iter(classes.items()))
            raise _cannot_call(cls, args, f"class {name} in {path}")
        needs = [f"{n} (needs {', '.join(missing_args(c, args)) or 'other arguments'})" for n, c in classes.items()]
        raise TargetError(
            f"no class in {path} constructs with " + ("the given arguments" if args else "no arguments"),
            got=", ".join(needs),
            hint=f"{path}:NAME --arg name=VALUE",
        )
    if len(ready) == 1:
        ((name, cls),) = ready.items()
    else:
        name, cls = _top(ready, args, path)
    waiting = [f"{n} (needs {', '.join(missing_args(c, args))})" for n, c in classes.items() if missing_args(c, args)]
    made = construct(cls, args, f"class {name} in {path}", origin)
    inside = {type(m) for m in made.modules()} if isinstance(made, nn.Module) else set()
    waiting = [w for w in waiting if classes[w.partition(" ")[0]] not in inside]
    notes = (f"took class {name}: it constructs without arguments, unlike {', '.join(waiting)}",) if waiting else ()
    return made, notes


def _top(ready: dict[str, type[nn.Module]], args: Mapping[str, object], path: str) -> tuple[str, type[nn.Module]]:
    """Of several classes that construct, the one that is in none of the others."""
    inside: dict[str, set[type]] = {}
    failed: dict[str, str] = {}
    for name, cls in ready.items():
        try:
            inside[name] = _types_in(cls, args)
        except (Exception, SystemExit) as error:
            failed[name] = f"{name} raised {type(error.__cause__ or error).__name__}"
    tops = [n for n in inside if not any(ready[n] in types for other, types in inside.items() if other != n)]
    if len(tops) == 1:
        return tops[0], ready[tops[0]]
    if not tops and not inside:
        raise TargetError(f"no class in {path} constructs", got=", ".join(failed.values()), hint=f"{path}:NAME")
    tops = tops or list(inside)
    raise TargetError(
        f"{path} has several models: {', '.join(tops)}",
        got=f"besides, {', '.join(failed.values())} when constructed" if failed else None,
        hint="say which one: " + " or ".join(f"{path}:{n}" for n in tops[:3]),
    )


def _types_in(cls: type[nn.Module], args: Mapping[str, object]) -> set[type]:
    """The types of the modules in a freshly constructed model; with empty weights where the constructor bears it."""
    try:
        with empty_weights():
            made = construct(cls, args, cls.__name__, None)
    except TargetError:
        made = construct(cls, args, cls.__name__, None)
    return {type(m) for m in made.modules()} if isinstance(made, nn.Module) else set()


def model_classes(module: ModuleType) -> dict[str, type[nn.Module]]:
    """The ``nn.Module`` subclasses that a file defines and that can run, by name.

    Args:
        module: The imported file.

    Returns:
        Classes with a ``forward`` that are not abstract, in the order of their definition.
    """
    found: dict[str, type[nn.Module]] = {}
    for name, value in vars(module).items():
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__:
            runs = value.forward is not nn.Module.forward and not inspect.isabstract(value)
            if runs and value not in found.values():
                found[name] = value
    return found


def instance_takes_no_args(what: str, args: Mapping[str, object]) -> TargetError:
    """The error for arguments to a model that is made already.

    Args:
        what: What the instance is, for the message.
        args: The arguments.

    Returns:
        The error.
    """
    return TargetError(
        f"{what} is an instance: it is made already and takes no --arg",
        got=", ".join(args),
        hint="name a class or function that makes it: model.py:NAME --arg name=VALUE",
    )


def name_not_found(module: ModuleType, name: str, place: str) -> TargetError:
    """The error for a NAME that a file or module does not have.

    Args:
        module: The imported file or module.
        name: What was asked for.
        place: Where, as the user wrote it.

    Returns:
        The error, which lists what there is.
    """
    names = [n for n in vars(module) if not n.startswith("_")]
    near = nearest(name, names, n=3)
    return TargetError(
        f"{place} has no {name!r}",
        got=_what_there_is(module),
        hint=f"did you mean {', '.join(near)}?" if near else None,
    )


def _what_there_is(module: ModuleType) -> str:
    """The classes, functions and models that a module offers, to choose from."""
    offers: list[str] = []
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, nn.Module):
            offers.append(f"{name} (an instance of {type(value).__name__})")
        elif getattr(value, "__module__", None) == module.__name__:
            if inspect.isclass(value):
                offers.append(f"class {name}")
            elif inspect.isfunction(value):
                offers.append(f"{name}()")
    shown = ", ".join(offers[:12]) + (", …" if len(offers) > 12 else "")
    return shown or "a file that defines no class, no function and no model"


def _has_function(module: ModuleType, name: str) -> bool:
    """Whether a file has a callable under a name that is no class and no model."""
    value = getattr(module, name, None)
    return callable(value) and not inspect.isclass(value) and not isinstance(value, nn.Module)


def _cannot_call(factory: Callable[..., object], args: Mapping[str, object], what: str) -> TargetError:
    """The error for a factory whose arguments do not fit."""
    if unknown := unknown_args(factory, args):
        return unknown_error(factory, unknown, what)
    return needs_error(factory, missing_args(factory, args), what)


def _expected() -> str:
    """What makes a file a target."""
    return (
        "an nn.Module instance named model, a function build_model/get_model/create_model without arguments, "
        "or one nn.Module subclass that constructs without arguments"
    )
