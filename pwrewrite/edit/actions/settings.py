"""The settings of an op, read once from JSON into a typed record: `read`.

Each action declares a frozen dataclass, whose fields are the settings that an op of it may have. A field is a ``str``,
``bool``, ``int``, ``float``, a `ConvSpec` (shape facts of a layer), another record, a ``tuple`` (a list in JSON), a
``Mapping`` by string (an object), one of these or ``None``, or an ``Annotated`` one of these with what is `Allowed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, partial
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ...core.convolution import ConvSpec
from ...core.errors import PlanError
from ...core.plan import Op
from ...core.text import did_you_mean
from ...forms.specs import spec_from_dict

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_R = TypeVar("_R", bound="DataclassInstance")


@dataclass(frozen=True)
class Allowed:
    """Which values of a type make sense, and the same in words, for an error."""

    test: Callable[[Any], bool]
    expected: str


def one_of(*names: str) -> Allowed:
    """Only some words."""
    return Allowed(names.__contains__, f"one of {', '.join(names)}")


Count = Annotated[int, Allowed((1).__le__, "an integer from 1")]
Number = Annotated[float, Allowed(math.isfinite, "a finite number")]
Offset = Annotated[int, Allowed((0).__le__, "an integer from 0")]

_WORDS = {str: "a string", bool: "true or false", int: "an integer", float: "a number", tuple: "a list"}


def wrong(op: Op, key: str, message: str, expected: str, got: str | None = None, hint: str | None = None) -> PlanError:
    """A setting of an op that makes no sense, or does not fit the model."""
    return PlanError(message, where=op.where(key), expected=expected, got=got, hint=hint)


def read(record: type[_R], op: Op) -> _R:
    """The settings of an op, as the record that its action takes; a `PlanError` says what makes no sense, and where."""
    return _record(op, record, op.settings)


_types = cache(partial(get_type_hints, include_extras=True))


def _expected(kind: Any) -> str:
    """What a field holds, in words."""
    if get_origin(kind) in (Annotated, Union, UnionType):
        return _expected(get_args(kind)[0])
    return _WORDS.get(get_origin(kind) or kind, "the shape facts of a layer" if kind is ConvSpec else "an object")


def _record(op: Op, kind: type[_R], data: Mapping[str, Any]) -> _R:
    names = [field.name for field in fields(kind)]
    unknown = [key for key in data if key not in names]
    if unknown:
        message, hint = f"{op.action} has no setting {unknown[0]!r}", did_you_mean(names, unknown[0])
        raise wrong(op, unknown[0], message, f"one of {', '.join(names)}", hint=hint or "remove it")
    types, values = _types(kind), dict[str, Any]()
    for field in fields(kind):
        if field.name in data:
            values[field.name] = _value(op, types[field.name], data[field.name], field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            message = f"{op.action} needs the setting {field.name!r}"
            raise wrong(op, field.name, message, _expected(types[field.name]))
    return kind(**values)


def _value(op: Op, kind: Any, value: Any, key: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        result = _value(op, arguments[0], value, key)
        if result is not None and not arguments[1].test(result):
            message = f"unknown {key}" if isinstance(value, str) else f"this {key} makes no sense"
            raise wrong(op, key, message, arguments[1].expected, repr(value))
        return result
    if origin in (Union, UnionType):
        return None if value is None and NoneType in arguments else _value(op, arguments[0], value, key)
    if kind is ConvSpec:
        return spec_from_dict(value, op.where(key))
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping):
        return _record(op, kind, value)
    if origin is Mapping and isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _value(op, arguments[1], item, name) for name, item in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(kinds) == len(value):
            return tuple(_value(op, each, item, key) for each, item in zip(kinds, value))
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise wrong(op, key, f"{key} is not {_expected(kind)}", _expected(kind), repr(value))
