"""Finds a file's one obvious model.

In this order, the first that is there:

1. an ``nn.Module`` instance named ``model``;
2. a function ``build_model``, ``model``, ``get_model`` or ``create_model`` that ``--arg`` gives all it needs;
3. among the ``nn.Module`` subclasses *defined* in the file that have a ``forward``, the only one that constructs with
   ``--arg`` alone. Of several, each is constructed (with empty weights, or for real where that fails), and one that
   another makes an instance of is a building block and set aside;
4. the only function of the file that ``--arg`` gives all it needs and that returns a model, as its annotation or its
   ``return`` shows without a call.

A class whose constructor raises stays a candidate, and its error is the answer if it is the one obvious model, unless
another candidate inherits from it. Whatever is left over is an error that lists the candidates.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

from torch import nn

from ..capturing.state import replaced
from ..core.errors import TargetError, first_line
from .empty import empty_weights, real_weights
from .factories import construct, missing_args, unknown_args
from .user_code import origin_of, what_there_is

_FACTORY_NAMES = ("build_model", "model", "get_model", "create_model")
_EXPECTED = (
    "an nn.Module instance named model, a function build_model/get_model/create_model without arguments, "
    "or one nn.Module subclass that constructs without arguments"
)

Classes = dict[str, type[nn.Module]]


def find_model(module: ModuleType, args: Mapping[str, object], path: str) -> tuple[object, tuple[str, ...]]:
    """What should be the model of an imported file whose target names none, and notes on how it was chosen.

    ``args`` are for whatever makes it, ``path`` is the file as the user wrote it. A `TargetError` says that there is
    none, or several, or that it cannot be constructed.
    """
    origin = origin_of(module)
    instance = getattr(module, "model", None)
    if isinstance(instance, nn.Module):
        return construct(instance, args, f"model in {path}", origin), ()
    named = {name: getattr(module, name, None) for name in _FACTORY_NAMES}
    functions = {n: f for n, f in named.items() if callable(f) and not isinstance(f, (type, nn.Module))}
    for name, function in functions.items():
        if _can_call(function, args):
            return construct(function, args, f"{name}() in {path}", origin), ()
    own = {n: f for n, f in functions.items() if f.__module__ == module.__name__}
    classes = _model_classes(module)
    if own and not any(_can_call(c, args) for c in classes.values()):
        name, function = next(iter(own.items()))
        return construct(function, args, f"{name}() in {path}", origin), ()  # which says what does not fit
    if not any(_can_call(c, args) for c in classes.values()):
        makers = {n: f for n, f in _makers(module).items() if _can_call(f, args)}
        if len(makers) == 1:
            ((name, function),) = makers.items()
            return construct(function, args, f"{name}() in {path}", origin), (f"took {name}(), which returns a model",)
        if makers:
            shown = ", ".join(f"{n}()" for n in makers)
            raise TargetError(f"{path} makes several models: {shown}", hint=_which(path, list(makers)))
    if not classes:
        raise TargetError(f"no model in {path}", expected=_EXPECTED, got=what_there_is(module))
    return _construct_class(classes, args, path, origin)


def _construct_class(
    classes: Classes, args: Mapping[str, object], path: str, origin: Path | None
) -> tuple[object, tuple[str, ...]]:
    """The one class of a file that is a whole model, constructed, and a note on those that were passed over."""
    ready = {n: c for n, c in classes.items() if _can_call(c, args)}
    if not ready:
        if len(classes) == 1:
            name, cls = next(iter(classes.items()))
            return construct(cls, args, f"class {name} in {path}", origin), ()  # which says what does not fit
        needs = [f"{n} (needs {', '.join(missing_args(c, args)) or 'other arguments'})" for n, c in classes.items()]
        message = f"no class in {path} constructs with " + ("the given arguments" if args else "no arguments")
        raise TargetError(message, got=", ".join(needs), hint=f"{path}:NAME --arg name=VALUE")
    name = next(iter(ready)) if len(ready) == 1 else _whole_model(ready, args, path, origin)
    model = construct(ready[name], args, f"class {name} in {path}", origin)
    parts = {type(m) for m in model.modules()} if isinstance(model, nn.Module) else set()
    lacking = {n: missing_args(c, args) for n, c in classes.items() if c not in parts}
    waiting = [f"{n} (needs {', '.join(needed)})" for n, needed in lacking.items() if needed]
    note = f"took class {name}: it constructs without arguments, unlike {', '.join(waiting)}"
    return model, (note,) if waiting else ()


def _whole_model(ready: Classes, args: Mapping[str, object], path: str, origin: Path | None) -> str:
    """Of several classes that take these arguments, the one that is a part of no other."""
    tried = {name: _parts_of(cls, args, f"class {name} in {path}", origin) for name, cls in ready.items()}
    parts = {name: types for name, (types, _) in tried.items()}
    failed = {name: error for name, (_, error) in tried.items() if error is not None}
    bases = {n for n in failed if any(issubclass(c, ready[n]) for other, c in ready.items() if other not in failed)}
    whole = [n for n in ready if n not in bases and not any(ready[n] in parts[other] for other in ready if other != n)]
    if len(whole) == 1:
        if whole[0] in failed:
            raise failed[whole[0]]
        return whole[0]
    whole = whole or list(ready)
    raised = [f"{n} raised {first_line(e.__cause__ or e)}" for n, e in failed.items() if n in whole]
    message = f"{path} has several models: {', '.join(whole)}"
    raise TargetError(message, got="; ".join(raised) or None, hint=_which(path, whole))


def _which(path: str, names: Sequence[str]) -> str:
    return "say which one: " + " or ".join(f"{path}:{name}" for name in names[:3])


def _parts_of(
    cls: type[nn.Module], args: Mapping[str, object], what: str, origin: Path | None
) -> tuple[set[type], TargetError | None]:
    """The types of all modules that constructing a class makes, and the error if it fails for real."""
    parts: set[type] = set()
    failure: TargetError | None = None
    init = nn.Module.__init__

    def noting_init(self: nn.Module, *args: object, **kwargs: object) -> None:
        parts.add(type(self))
        init(self, *args, **kwargs)

    for building in (empty_weights, real_weights):
        with building(), replaced(nn.Module, "__init__", noting_init):
            try:
                model = construct(cls, args, what, origin)
            except TargetError as error:
                failure = error
                continue
        return parts | ({type(m) for m in model.modules()} if isinstance(model, nn.Module) else set()), None
    return parts, failure


def _model_classes(module: ModuleType) -> Classes:
    """The ``nn.Module`` subclasses that a file defines and that can run, in the order of their definition."""
    classes: Classes = {}
    for name, value in vars(module).items():
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__:
            runs = value.forward is not nn.Module.forward and not inspect.isabstract(value)
            if runs and value not in classes.values():
                classes[name] = value
    return classes


def _makers(module: ModuleType) -> dict[str, Callable[..., object]]:
    """The functions that a file defines, without a leading underscore, and that can be seen to return a model."""
    functions = {n: f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    return {n: f for n, f in functions.items() if not n.startswith("_") and _makes_model(f)}


def _makes_model(function: Callable[..., object]) -> bool:
    """Whether a function is annotated to return a model, or returns what calling a class of models gives."""
    if _annotated(function):
        return True
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(tree, ast.FunctionDef):
        return False
    names = getattr(function, "__globals__", {})
    made = {
        target.id
        for each in ast.walk(tree)
        if isinstance(each, ast.Assign) and _calls_model(each.value, names)
        for target in each.targets
        if isinstance(target, ast.Name)
    }
    returned = [each.value for each in ast.walk(tree) if isinstance(each, ast.Return) and each.value is not None]
    return any((isinstance(v, ast.Name) and v.id in made) or _calls_model(v, names) for v in returned)


def _calls_model(value: ast.expr, names: Mapping[str, object]) -> bool:
    """Whether an expression calls a class of models, or a function annotated to return one; then ``.eval()``, say."""
    if not isinstance(value, ast.Call):
        return False
    called, path = value.func, list[str]()
    while isinstance(called, ast.Attribute):
        if isinstance(called.value, ast.Call):
            return _calls_model(called.value, names)
        path.append(called.attr)
        called = called.value
    found = names.get(called.id) if isinstance(called, ast.Name) else None
    for name in reversed(path):
        found = getattr(found, name, None)
    return _is_model_class(found) or (callable(found) and _annotated(found))


def _annotated(function: Callable[..., object]) -> bool:
    try:
        return _is_model_class(get_type_hints(function).get("return"))
    except Exception:  # an annotation may name what is not there
        return False


def _is_model_class(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)


def _can_call(factory: Callable[..., object], args: Mapping[str, object]) -> bool:
    return not missing_args(factory, args) and not unknown_args(factory, args)
